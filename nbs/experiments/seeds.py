"""The main job's score from seed to seed, in float32 and in bfloat16, on words that are set aside from the training words.

    python nbs/experiments/seeds.py nbs/results/seeds.json [--seeds 6] [--device cuda]

The 64 held-out tickets of the main job are not looked at: the last words of each list of training words make 256 tickets of
their own, and the model trains on 800 tickets made of the others. An answer is right when each of its tokens is the likeliest one.
"""
import argparse, json, tempfile
from pathlib import Path

import torch

from qlora_nb.training import tickets
from qlora_nb.base.core import versions
from qlora_nb.training.data import collate, encode_rows
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.foundations.loading import load_model
from qlora_nb.training.finetune import finetune

ASIDE = dict(products=12, order=1, shapes=2, issues=2, cues=2)   # words of each list that only the tickets of the test hold


def set_words_aside():
    "Let the words of the test be the last of the training words."
    words, kept = tickets.WORDS["train"], {}
    for k, n in ASIDE.items():
        kinds = words[k] if isinstance(words[k], dict) else {None: words[k]}
        cut = {o: (v[:-n], v[-n:]) for o, v in kinds.items()}
        kept[k] = tuple({o: v[i] for o, v in cut.items()} if isinstance(words[k], dict) else cut[None][i] for i in (0, 1))
    tickets.WORDS["train"] = words | {k: v[0] for k, v in kept.items()}
    tickets.WORDS["test"] = {k: words[k] for k in ("digits", "hello", "bye")} | {k: v[1] for k, v in kept.items()}


@torch.no_grad()
def score(model, tokenizer, rows):
    "(share of right answers, mean loss of a token of the answers)"
    examples, right, losses, n = encode_rows(rows, tokenizer, "auto", 512), 0, 0., 0
    for k in range(0, len(examples), 32):
        batch = {o: v.to(model.device) for o, v in collate(examples[k:k+32], tokenizer.pad_token_id).items()}
        labels = batch.pop("labels")[:, 1:]
        logits, mask = model(**batch).logits[:, :-1].float(), labels != -100
        right += ((logits.argmax(-1) == labels) | ~mask).all(1).sum().item()
        losses += torch.nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum").item()
        n += mask.sum().item()
    return right/len(examples), losses/n


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--seeds", type=int, default=6), p.add_argument("--device", default="cuda")
    a = p.parse_args()
    set_words_aside()
    test, train, tokenizer, rows = tickets.make_tickets("test", 256, seed=7), tickets.make_tickets("train", 800), load_tokenizer(), []
    for dtype in ("float32", "bfloat16"):
        for seed in range(a.seeds):
            model = load_model(device=a.device, dtype=getattr(torch, dtype))
            with tempfile.TemporaryDirectory() as folder:
                run = finetune(model, train, f"{folder}/run", tokenizer=tokenizer, max_steps=150, learning_rate=2e-3, seed=seed, progress=False)
            share, loss = score(run.model, tokenizer, test)
            rows.append(dict(dtype=dtype, seed=seed, exact_match=share, answer_loss=loss))
            print(json.dumps(rows[-1]), flush=True)
    a.out.write_text(json.dumps(dict(rows=rows, versions=versions()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
