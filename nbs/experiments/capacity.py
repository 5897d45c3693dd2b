"""How many bits adapters can hold: random strings of known entropy, ranks 1 to 16, more and more strings.

    python nbs/experiments/capacity.py nbs/results/capacity.json [--ranks 1 2 4 8 16] [--seeds 3] [--steps 600]

Three groups of rows. `load`: rank 1 with more and more strings, until no more fits. `rank`: for each rank, six bits offered for
each trained number, which is more than fits. `rate`: rank 1 at several learning rates, so that the best one can be seen to lie
inside. Rows are written as they come in, and those that are there are not measured again. One thread; rank 8 takes a minute or
so, rank 16 several. `nbs/6_beyond/67_capacity.ipynb` shows the results and measures a slice again.
"""
import argparse, json, time
from pathlib import Path

import torch

from qlora_nb.base.core import versions
from qlora_nb.beyond.capacity import memorize

LOADS, RATES = (16, 32, 64, 128, 256, 512), (.005, .01, .02, .04, .08)


def tasks(ranks, seeds, steps):
    for seed in range(seeds):
        for n in LOADS: yield "load", dict(r=1, n=n, seed=seed, steps=steps)
        for lr in RATES: yield "rate", dict(r=1, n=256, seed=seed, steps=steps, lr=lr)
        for r in ranks: yield "rank", dict(r=r, n=256*r, seed=seed, steps=steps)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=600)
    a = p.parse_args()
    torch.set_num_threads(1)
    doc = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(rows=[])
    done = [o["task"] for o in doc["rows"]]
    for group, task in tasks(a.ranks, a.seeds, a.steps):
        if task in done: continue   # the same task of another group has the same row
        begin = time.process_time()
        row = memorize(**task)
        doc["rows"].append(dict(group=group, task=task) | row | dict(cpu_seconds=round(time.process_time() - begin, 1)))
        doc["versions"] = versions()
        a.out.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(doc["rows"][-1]), flush=True)
        done.append(task)


if __name__ == "__main__": main()
