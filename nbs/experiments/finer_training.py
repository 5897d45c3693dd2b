"""Does a finer quantization survive training? Score and loss after QLoRA on bases that differ in how NF4 was filled.

    python nbs/experiments/finer_training.py nbs/results/finer_training.json [--device cuda] [--seeds 5]

One call on one GPU: five bases (not quantized, plain NF4, searched scales, searched and weighted by the inputs, error feedback; all of
the last four NF4 with double quantization, which differ in nothing that training code sees), four rates, and for each base more rates
until the best one by mean loss lies within its grid and not at the edge of it. Seeds are paired: seed s gives the same adapters and the
same order of rows on every base. Data and score are those of seeds.py: words set aside, 256 tickets made of them; and the perplexity
of prose, for what is forgotten. Finished runs are kept in the file, so that a call that was cut off goes on.

The rule for decisions, written before the first run: at each base's own best rate, over the five seeds, a base helps when the paired
95 % interval of its answer loss less that of plain NF4 lies below zero. No result is stored yet.
"""
import argparse, json, tempfile
from pathlib import Path

import bitsandbytes as bnb, torch

from seeds import score, set_words_aside
from qlora_nb.base.core import versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.beyond.error_feedback import feedback_quantize
from qlora_nb.beyond.scale_search import put_weight, search_model
from qlora_nb.beyond.which_error import input_moments, linear_layers
from qlora_nb.evaluation.perplexity import perplexity, prose
from qlora_nb.foundations.loading import load_model
from qlora_nb.training import tickets
from qlora_nb.training.finetune import finetune

RATES, STEPS = [2e-4, 5e-4, 1e-3, 2e-3], 150
BASES = "none", "plain", "search", "weighted", "feedback"


def make_base(kind, device, weights, moments):
    "A base for one run. Scales and codes are found on the CPU."
    model = load_model(device=device, dtype=torch.bfloat16, bits=None if kind == "none" else 4)
    if kind == "search": search_model(model, weights)
    if kind == "weighted": search_model(model, weights, moments)
    if kind == "feedback":
        for n, m in model.named_modules():
            if isinstance(m, bnb.nn.Linear4bit): put_weight(m, feedback_quantize(weights[n], moments[n]))
    return model


def wider(rates, losses):
    "Another rate beyond the edge at which the best one lies, or None."
    best = min(rates, key=losses.__getitem__)
    if best == max(rates): return best*2
    return best/2 if best == min(rates) else None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--device", default="cuda"), p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--bases", nargs="+", default=BASES), p.add_argument("--steps", type=int, default=STEPS)
    a = p.parse_args()
    set_words_aside()
    test, train, tokenizer = tickets.make_tickets("test", 256, seed=7), tickets.make_tickets("train", 800), load_tokenizer()
    rows = json.loads(a.out.read_text(encoding="utf-8"))["rows"] if a.out.exists() else []
    wide = load_model(bits=None, dtype=torch.float32, device="cpu")
    weights = {n: m.weight.detach().clone() for n, m in linear_layers(wide).items()}
    ids = tokenizer(prose(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    moments = input_moments(wide, ids[32768:32768 + 2048])
    del wide

    def run(kind, rate, seed):
        found = [r for r in rows if (r["base"], r["learning_rate"], r["seed"]) == (kind, rate, seed)]
        if found: return found[0]
        model = make_base(kind, a.device, weights, moments)
        before = score(model, tokenizer, test)[1]
        with tempfile.TemporaryDirectory() as folder:
            done = finetune(model, train, f"{folder}/run", tokenizer=tokenizer, max_steps=a.steps, learning_rate=rate, seed=seed,
                            progress=False)
        share, loss = score(done.model, tokenizer, test)
        rows.append(dict(base=kind, learning_rate=rate, seed=seed, steps=a.steps, answer_loss_before=before, exact_match=share,
                         answer_loss=loss, prose_after=perplexity(done.model, tokenizer, prose(), max_tokens=2048)))
        a.out.write_text(json.dumps(dict(rows=rows, versions=versions()), indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rows[-1]), flush=True)
        return rows[-1]

    for kind in a.bases:
        rates = [*RATES]
        while True:
            losses = {r: sum(run(kind, r, s)["answer_loss"] for s in range(a.seeds))/a.seeds for r in rates}
            if not (more := wider(rates, losses)) or len(rates) > 8: break
            rates.append(more)


if __name__ == "__main__": main()
