"""How many bits adapters can hold: random strings of known entropy, ranks 1 to 16, more and more strings.

    python nbs/experiments/capacity.py nbs/results/capacity.json [--ranks 1 2 4 8 16] [--seeds 5] [--steps 600] [--workers 6]

Three groups of rows. `load`: rank 1 with more and more strings, until no more fits. `rank`: for each rank, six bits offered for
each trained number, which is more than fits. `rate`: rank 1 at several learning rates, so that the best one can be seen to lie
inside. Rows are written as they come in, and those that are there are not measured again. One thread for each worker; rank 8 takes
a minute or so, rank 16 several, five seeds of all some 25 minutes of computing. `nbs/6_beyond/69_capacity.ipynb` shows the results and measures a slice again.
"""
import argparse, json, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor, as_completed
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


def measure(group, task):
    torch.set_num_threads(1)
    begin = time.process_time()
    row = memorize(**task)
    return dict(group=group, task=task) | row | dict(cpu_seconds=round(time.process_time() - begin, 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--steps", type=int, default=600)
    a = p.parse_args()
    doc = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(rows=[])
    done, wanted = [o["task"] for o in doc["rows"]], []
    for group, task in tasks(a.ranks, a.seeds, a.steps):   # the same task of another group has the same row
        if task not in done: wanted.append((group, task)), done.append(task)
    wanted.sort(key=lambda o: -o[1]["r"]*o[1]["n"])   # the longest first
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context("spawn")) as pool:
        for f in as_completed([pool.submit(measure, *o) for o in wanted]):
            doc["rows"].append(f.result())
            doc["versions"] = versions()
            a.out.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(doc["rows"][-1]), flush=True)


if __name__ == "__main__": main()
