"""Train the small Falcon of the pages on the published walk-through, and keep it where `small_falcon` finds it.

    python nbs/experiments/small_falcon.py nbs/results/small_falcon [--steps 240]

On one thread, from a fixed seed. What a processor adds up in another order it trains to other weights, so a second run gives another
model that is as good; `held_out.json` has the rows that it was not trained on.
"""
import argparse, json
from pathlib import Path

from qlora_nb.base.core import versions
from qlora_nb.base.small_falcon import held_out_loss, train_falcon

import torch


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--steps", type=int, default=240)
    a = p.parse_args()
    torch.set_num_threads(1)
    model, _, held_out = train_falcon(a.out, a.steps)
    found = dict(steps=a.steps, loss=held_out_loss(model, held_out), versions=versions(), rows=held_out.tolist())
    (a.out/"held_out.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print({k: v for k, v in found.items() if k != "rows"})


if __name__ == "__main__": main()
