"""The main job's score with adapters on the upper layers alone, where the backward pass ends early: seed by seed.

    python nbs/experiments/upper_layers.py nbs/results/upper_layers.json [--seeds 1 2 3 4] [--device cuda] [--part 0 2]

Data and score are those of seeds.py: words set aside from the training words, and 256 tickets made of them. Adapters sit on all
linear layers from `first_layer` on, of 30; bfloat16. `--part i n` makes each n-th run from number i on, for several processes beside
each other, whose files are joined afterwards. The stored rows are of seeds 1 to 4 and of several others, as many as there was time for.
"""
import argparse, json, tempfile
from pathlib import Path

import torch

from seeds import score, set_words_aside
from qlora_nb.base.core import versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.foundations.loading import load_model
from qlora_nb.training import tickets
from qlora_nb.training.finetune import finetune

CASES = ((0, 150, 2e-3), (8, 150, 2e-3), (10, 135, 2e-3), (10, 150, 1.5e-3), (10, 150, 2e-3), (10, 150, 3e-3), (10, 165, 2e-3), (10, 180, 2e-3),
         (12, 150, 2e-3), (15, 150, 2e-3), (15, 200, 2e-3), (20, 220, 3e-3))   # first layer, steps, rate
NAMES = [f"self_attn.{o}_proj" for o in "qkvo"] + [f"mlp.{o}_proj" for o in ("gate", "up", "down")]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    p.add_argument("--device", default="cuda"), p.add_argument("--part", type=int, nargs=2, default=(0, 1))
    a = p.parse_args()
    set_words_aside()
    test, train, tokenizer, rows = tickets.make_tickets("test", 256, seed=7), tickets.make_tickets("train", 800), load_tokenizer(), []
    first_run, step = a.part
    for (first, steps, rate), seed in [(c, s) for c in CASES for s in a.seeds][first_run::step]:
        model = load_model(device=a.device, dtype=torch.bfloat16)
        targets = [f"layers.{i}.{n}" for i in range(first, 30) for n in NAMES] if first else "all-linear"
        with tempfile.TemporaryDirectory() as folder:
            run = finetune(model, train, f"{folder}/run", tokenizer=tokenizer, max_steps=steps, learning_rate=rate, seed=seed,
                           target_modules=targets, progress=False)
        share, loss = score(run.model, tokenizer, test)
        rows.append(dict(first_layer=first, steps=steps, learning_rate=rate, seed=seed, exact_match=share, answer_loss=round(loss, 4)))
        print(json.dumps(rows[-1]), flush=True)
    a.out.write_text(json.dumps(dict(rows=rows, versions=versions()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
