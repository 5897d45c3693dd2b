"""How far right ways to the loss of one batch lie apart: the model's own logits and `fast_loss`, on one thread and on two.

    python nbs/experiments/first_loss.py nbs/results/first_loss.json [--batches 24]

SmolLM2 in 4 bits with new adapters, computing in bfloat16, on batches of four tickets drawn at random; the own loss in float32
is the reference. `make_fast` compares the first loss of a training in this way, and its bound is held against these numbers.
"""
import argparse, json, random
from pathlib import Path

import torch

from qlora_nb.base.core import versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.foundations.loading import load_model
from qlora_nb.speed.fast_training import fast_loss, make_fast, make_plain
from qlora_nb.speed.logits import own_loss
from qlora_nb.training.data import collate, encode_rows, load_rows
from qlora_nb.training.optimizers import float32_adapters


@torch.no_grad()
def losses(dtype, threads, batches):
    "Way → the loss of each batch."
    model = float32_adapters(add_adapters(load_model(device="cpu", dtype=dtype))).train()
    found = []
    for n in threads:
        torch.set_num_threads(n)
        make_plain(model)
        found.append(dict(dtype=str(dtype)[6:], threads=n, way="own", losses=[own_loss(model, b).item() for b in batches]))
        make_fast(model)
        found.append(dict(dtype=str(dtype)[6:], threads=n, way="fast", losses=[fast_loss(model, b).item() for b in batches]))
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--batches", type=int, default=24)
    a = p.parse_args()
    tokenizer = load_tokenizer()
    rows = random.Random(0).sample(load_rows("tickets"), 4*a.batches)
    examples = encode_rows(rows, tokenizer)
    batches = [collate(examples[i:i+4], tokenizer.pad_token_id) for i in range(0, len(examples), 4)]
    found = losses(torch.float32, (2,), batches) + losses(torch.bfloat16, (1, 2), batches)
    a.out.write_text(json.dumps(dict(rows=found, versions=versions()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
