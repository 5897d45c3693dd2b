"""Learned scales and mixed bits on SmolLM2-135M: two experiments on one model, its text and its teacher.

    python nbs/experiments/scales_and_bits.py scales nbs/results/learned_scales.json [--size full|cpu|tiny] [--device cuda] [--only NAME ...] [--limit SECONDS]
    python nbs/experiments/scales_and_bits.py bits nbs/results/mixed_bits.json [--size full|cpu|tiny] [--device cuda] [--limit SECONDS]
    python nbs/experiments/scales_and_bits.py four nbs/results/mixed_bits.json --size part --device cpu

`full` is for one GPU: about ten minutes each. The first call was cut off after six minutes, without the codes of error feedback and
without the budgets from four bits on; `four` measures at four bits what that run could not, on a CPU. `cpu` is what two cores do in about
seven minutes of computing, and `tiny` only tries it. All is computed in float32. A run goes on with what its file has, and begins anew
when the file is of another size or model; after `--limit` seconds no row is begun. `--model` takes another model than the packaged one,
and `--text` a file to read instead of the reference.

The text is the Python reference. Its first tokens, in rows, are the test, and nothing else sees them. Moments come from tokens 32,768
to 34,816; scales are learned, and sensitivities measured, on rows from token 40,960 on; the learning rate is chosen on rows from token
81,920 on. A second test, of another kind, are support tickets with their answers. The packaged weights come from a file of 4 bits
(Q4_1), so "unquantized" means: not quantized by us. A row is one sample of the intervals, which are bootstraps over rows.

The rules, written before the first run. All on the test rows, in pairs:
- Learned scales *help* when the 95 % interval of KL less that of the same codes with the scales that they began with, at the same
  storage, lies below zero; they *harm* when it lies above; else they are *not told apart*. The learning rate of each is the best of those
  that were tried, on other rows, and is called *bracketed* when a lower and a higher one were tried. (In the first call the best one was
  the highest of three. Then 1e-2 and 3e-2 were added, and the codes of error feedback measured; the rules stayed.)
- Learned scales *add to error feedback* when the interval of KL less that of its codes as they were lies below zero. The two together are
  *better than search and learned scales* when the interval of the KL of the one less that of the other, each at its best rate, does.
- Scales fitted by row, layer by layer, and scales learned from the whole model are compared by the same rule; so are 8 bits that
  training sees, and 8 bits that it does not.
- *Sensitivity is worth measuring* when at a budget the chosen bits have less KL than every random allocation of that budget and than
  every shuffling of themselves. It is refuted when the mean KL of the shuffled ones is not above that of the chosen bits by more than
  its interval.
- *Mixed bits help* when at four bits a weight the interval of KL less that of NF4 everywhere lies below zero.
- *The parts add up* when the predicted KL of the chosen bits lies within 10 % of what is measured on the rows of the sensitivities, at
  every budget; the prediction *ranks* when its rank correlation with the measured KL over all allocations is above 0.9.
"""
import argparse, json, time
from pathlib import Path

import torch
from finer import Bench, rounded as digits
from qlora_nb.base.core import cpu_kind, versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.beyond.error_feedback import feedback_quantize
from qlora_nb.beyond.learned_scales import fit_scales, learn_scales, with_scales
from qlora_nb.beyond.mixed_bits import (best_bits, greedy_bits, mean_bits, predicted, random_bits, round_bits, sensitivities,
                                        shuffled_bits)
from qlora_nb.beyond.scale_search import search_quantize
from qlora_nb.beyond.which_error import divergence, log_probs, relative_errors
from qlora_nb.foundations.double_quantization import quantize
from qlora_nb.training.tickets import make_tickets

LEARN, CHOOSE = 40960, 81920   # first tokens
ARMS = ["searched, 8 bits", "absmax, 8 bits", "feedback, 8 bits", "searched, 32 bits", "absmax, 32 bits"]
RATES = [3e-3, 1e-2, 1e-3, 3e-2, 3e-4]   # in the order of what is wanted most
SIZES = dict(full=dict(window=512, rows=16, others=4, learn=64, choose=8, steps=64, batch=4, rates=RATES, seeds=3, arms=ARMS,
                       sensitive=4, bases=["unquantized", "nf4"], options=[2, 3, 4, 8, 16], budgets=[3, 3.5, 4, 4.5, 5], draws=8),
             cpu=dict(window=128, rows=8, others=2, learn=16, choose=2, steps=16, batch=1, rates=[1e-3, 3e-3], seeds=1, arms=ARMS[:2],
                      sensitive=1, bases=["nf4"], options=[2, 4, 8], budgets=[4], draws=4),
             part=dict(window=512, rows=6, others=1, learn=1, choose=1),   # for `four`
             tiny=dict(window=32, rows=2, others=1, learn=2, choose=1, steps=2, batch=1, rates=[1e-3], seeds=1, arms=ARMS[1:2],
                       sensitive=1, bases=["nf4"], options=[3, 4], budgets=[3.5], draws=1))
SLICE = "model.layers.2.self_attn.v_proj"   # what a page measures again


def tickets(n, window, name):
    "Rows of support tickets and their answers, one after the other."
    text = "\n\n".join(f"{o['prompt']}\n{o['response']}" for o in make_tickets("test"))
    return load_tokenizer(name)(text[:n*window*8], add_special_tokens=False, return_tensors="pt").input_ids[0, :n*window].view(n, window)


class Trial:
    "The model and its rows: test, tickets, and those to learn from and to choose by."
    def __init__(self, o, device, name="smollm2", text=None):
        self.o, self.bench = o, Bench(o["rows"], o["window"], torch.float32, device, name, text)
        self.model, ids = self.bench.model.requires_grad_(False), self.bench.ids
        def rows(first, n): return ids[first:first + n*o["window"]].view(n, o["window"])
        self.learn, self.choose = rows(LEARN, o["learn"]), rows(CHOOSE, o["choose"])
        self.others = tickets(o["others"], o["window"], name).to(device)
        self.answers = {k: [log_probs(self.model, r).exp() for r in getattr(self, k)] for k in ("choose", "others")}

    def fill(self, weights):
        for n, m in self.bench.layers.items(): m.weight.data = weights[n]

    def kl(self, rows): return divergence(self.model, self.answers[rows], getattr(self, rows))[0]

    def judge(self):
        "Of the weights that the layers hold."
        kl, loss = divergence(self.model, self.bench.reference, self.bench.rows)
        return dict(kl=sum(kl)/len(kl), perplexity=torch.tensor(loss).double().mean().exp().item(), kl_rows=kl, loss_rows=loss)


# ---- learned scales ----

def starts(trial):
    "{(codes, double): () → {name: QuantizedTensor}}"
    W, H = trial.bench.W, trial.bench.H

    def searched(n, double): return search_quantize(W[n], double=double, weights=H[n].diagonal(), signed=True)

    def fed(n, double):
        with torch.device(W[n].device): return feedback_quantize(W[n], H[n], double=double)
    ways = dict(absmax=lambda n, double: quantize(W[n], double=double), searched=searched, feedback=fed)
    arms = [(o.split(",")[0], " 8 " in o) for o in trial.o["arms"]]
    return {(k, d): (lambda f=ways[k], d=d: {n: f(n, d) for n in W}) for k, d in arms}


def scales_row(trial, name, packed, **more):
    W, H = trial.bench.W, trial.bench.H
    weights = {n: Q.dequantize() for n, Q in packed.items()}
    errors = [relative_errors(W[n], Q, H[n]) for n, Q in weights.items()]
    trial.fill(weights)
    row = dict(name=name, **more, **trial.judge())
    for k in ("choose", "others"): row[k] = trial.kl(k)
    trial.fill(W)
    return row | dict(zip(("weight", "weighted", "output"), ((sum(v*v for v in e)/len(e))**.5 for e in zip(*errors))))


def scales(trial, kept, save, only):
    o, rows = trial.o, {r["name"]: r for r in kept["rows"]}
    W, H = trial.bench.W[SLICE], trial.bench.H[SLICE]
    Q = quantize(W)
    kept.setdefault("slice_hardware", kept["hardware"])
    if "slice" not in kept: kept["slice"] = {k: relative_errors(W, P.dequantize(), H)[2] for k, P in
                     dict(start=Q, rows=with_scales(Q, fit_scales(W, Q, H))).items()}

    def learned(packed, name, lr, seed=0, learn=None, **more):
        curve, start = [], time.perf_counter()
        got = learn_scales(trial.model, packed, trial.learn if learn is None else trial.learn[:learn], o["steps"], lr, o["batch"],
                           seed, watch=lambda k, kl: curve.append(kl), through=more.get("through", True))
        changed = torch.cat([(got[n].absmax/Q.absmax - 1).abs() for n, Q in packed.items()]).mean().item()
        return scales_row(trial, name, got, scales="learned", lr=lr, seed=seed, curve=curve, changed=changed,
                          seconds=round(time.perf_counter() - start, 1), **more)

    arms = starts(trial)
    for (codes, double), make in arms.items():
        base, packed = f"{codes}, {8 if double else 32} bits", None
        about = dict(codes=codes, double=double)

        def keep(name, f):
            nonlocal packed
            if name in rows or only and not any(k in name for k in only) or time.time() > trial.until: return rows.get(name)
            packed = packed or make()
            rows[name] = f(name)
            kept["rows"] = [*rows.values()]
            kept["best"] = {f"{codes}, {8 if double else 32} bits": best_rate(rows, codes, double) for codes, double in arms}
            save()
            print(name, *(f"{k} {rows[name][k]:.5g}" for k in ("output", "kl", "perplexity")), rows[name].get("seconds", ""), flush=True)
            return rows[name]

        def fitted(name):
            W, H = trial.bench.W, trial.bench.H
            return scales_row(trial, name, {n: with_scales(Q, fit_scales(W[n], Q, H[n])) for n, Q in packed.items()}, scales="rows", **about)
        keep(f"{base}: start", lambda name: scales_row(trial, name, packed, scales="start", **about))
        keep(f"{base}: rows", fitted)
        before = [r["lr"] for r in rows.values() if (r["codes"], r["double"], r["scales"]) == (codes, double, "learned")]
        rates = o["rates"] if double else before or [best_rate(rows, codes, True) or o["rates"][0]]
        for lr in rates: keep(f"{base}: learned at {lr:g}", lambda name: learned(packed, name, lr, **about))
        lr = best_rate(rows, codes, double)
        if not double or lr is None: continue
        if codes == "searched":
            # seeds, few rows and 32 bits keep the rate that they were first measured at
            for seed in range(1, o["seeds"]): keep(f"{base}: learned, seed {seed}", lambda name: learned(packed, name, lr, seed, **about))
            few = max(1, o["learn"]//16)
            keep(f"{base}: learned from {few} rows", lambda name: learned(packed, name, lr, learn=few, few=True, **about))
        if codes != "feedback":
            keep(f"{base}: learned in 32 bits", lambda name: learned(packed, name, lr, through=False, **about))


def best_rate(rows, codes, double):
    "Of the runs of seed 0 on all rows: the rate with the least KL on the rows to choose by."
    tried = [r for r in rows.values() if (r["codes"], r["double"], r["scales"]) == (codes, double, "learned")
             and not r["seed"] and r.get("through", True) and not r.get("few")]
    return min(tried, key=lambda r: sum(r["choose"]))["lr"] if tried else None


# ---- mixed bits ----

def letters(bits): return "".join(f"{b:x}" if b < 16 else "g" for b in bits.values())   # in the order of `names`


def bits(trial, kept, save, only):
    o, W, H, layers = trial.o, trial.bench.W, trial.bench.H, trial.bench.layers
    choices = {n: {b: round_bits(w, b) for b in sorted({*o["options"], *(dict(nf4=4, unquantized=16)[k] for k in o["bases"])})}
               for n, w in W.items()}
    size = {n: w.numel() for n, w in W.items()}
    rows = trial.learn[:o["sensitive"]]
    reference = [log_probs(trial.model, r).exp() for r in rows]

    def measure(): return sum(divergence(trial.model, reference, rows)[0])/len(rows)
    costs = {}
    for base in o["bases"]:
        found = kept.setdefault("sensitivity", {})
        if base not in found:
            start = time.perf_counter()
            found[base] = sensitivities(layers, choices, dict(nf4=4, unquantized=16)[base], measure)
            kept.setdefault("seconds", {})[base] = round(time.perf_counter() - start, 1)
            save()
            print(base, kept["seconds"], flush=True)
        costs[base] = {n: {int(b): v for b, v in c.items() if int(b) in o["options"]} for n, c in found[base].items()}
    errors = {n: {b: relative_errors(W[n], Q, H[n]) for b, Q in c.items() if b in o["options"]} for n, c in choices.items()}
    proxies = dict(weight={n: {b: e[0]**2*size[n] for b, e in c.items()} for n, c in errors.items()},
                   output={n: {b: e[2]**2*size[n] for b, e in c.items()} for n, c in errors.items()})
    kept |= dict(names=[*W], sizes=[*size.values()], weight=proxies["weight"], output=proxies["output"])
    done = {(r["options"], r["budget"], r["way"], r["seed"]) for r in kept.setdefault("allocations", [])}
    bases = dict(nf4=4, unquantized=16)

    def add(options, budget, way, made, seed=0):
        if (options, budget, way, seed) in done or time.time() > trial.until: return
        trial.fill({n: choices[n][b] for n, b in made.items()})
        row = dict(options=options, budget=budget, way=way, seed=seed, mean=mean_bits(made, size), bits=letters(made),
                   predicted={k: predicted(made, c, bases[k]) for k, c in costs.items() if bases[k] in next(iter(c.values()))},
                   measured=measure(), **trial.judge(), others=trial.kl("others"))
        trial.fill(W)
        kept["allocations"].append(row)
        if not seed: print(options, budget, way, *(f"{k} {row[k]:.4g}" for k in ("mean", "measured", "kl", "perplexity")),
                           {k: f"{v:.4g}" for k, v in row["predicted"].items()}, flush=True)
    sets = {"all": o["options"]} | ({"4 or 16": [4, 16]} if 16 in o["options"] else {})
    for options, allowed in sets.items():
        some = {k: {n: {b: v for b, v in c.items() if b in allowed} for n, c in cost.items()} for k, cost in (costs | proxies).items()}
        for budget in o["budgets"]:
            if budget < min(allowed) or options != "all" and budget == min(allowed): continue
            if budget in allowed: add(options, budget, "uniform", dict.fromkeys(W, int(budget)))
            for k in costs: add(options, budget, f"best by {k}", best_bits(some[k], size, budget))
            add(options, budget, "greedy by nf4", greedy_bits(some["nf4"], size, budget))
            for k in proxies: add(options, budget, f"best by {k} error", best_bits(some[k], size, budget))
            chosen = best_bits(some["nf4"], size, budget)
            for seed in range(o["draws"]):
                add(options, budget, "random", random_bits(allowed, size, budget, seed), seed)
                add(options, budget, "shuffled", shuffled_bits(chosen, size, seed), seed)
            save()
    if "slice" not in kept:
        first = {n: c for n, c in choices.items() if ".layers.0." in n or ".layers.1." in n}
        kept["slice"] = two_blocks(trial, first)


def four(trial, kept, save, only):
    "At four bits a weight, on this machine and a part of the test: bits chosen by stored sensitivities, and four bits everywhere."
    W = trial.bench.W
    size, sets = {n: w.numel() for n, w in W.items()}, {"uniform": dict.fromkeys(W, 4)}
    for base, cost in kept["sensitivity"].items():
        cost = {n: {int(b): v for b, v in c.items()} for n, c in cost.items()}
        sets[f"best by {base}"] = best_bits(cost, size, 4)
    sets["shuffled"] = shuffled_bits(sets["best by unquantized"], size, 0)
    kept["four"] = dict(hardware=cpu_kind(), rows=len(trial.bench.rows), window=trial.o["window"], allocations=[])
    for way, made in sets.items():
        trial.fill({n: round_bits(w, made[n]) for n, w in W.items()})
        kept["four"]["allocations"].append(dict(way=way, mean=mean_bits(made, size), bits=letters(made), **trial.judge()))
        trial.fill(W)
        print(way, kept["four"]["allocations"][-1]["kl"], flush=True)
        save()
    first = {n: 0 for n in W if ".layers.0." in n or ".layers.1." in n}
    kept["slice"], kept["slice_hardware"] = two_blocks(trial, first), cpu_kind()


def two_blocks(trial, choices):
    "The page's own model: two blocks and 64 tokens, one matrix at a time."
    model, every = trial.model, trial.model.model.layers
    model.model.layers = every[:2]
    text = "\n".join(o["prompt"].splitlines()[-1] for o in make_tickets("train", 8))   # the reference is another with each Python
    rows = load_tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :64].to(model.device)
    p = [log_probs(model, rows[0]).exp()]
    some = {n: {b: round_bits(trial.bench.W[n], b) for b in (2, 3, 4, 8)} for n in choices}
    got = sensitivities({n: trial.bench.layers[n] for n in choices}, some, 4, lambda: divergence(model, p, rows)[0][0])
    model.model.layers = every
    return got


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["scales", "bits", "four"]), p.add_argument("out", type=Path)
    p.add_argument("--size", choices=SIZES, default="full"), p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--only", nargs="+", help="parts of names of rows"), p.add_argument("--model", default="smollm2"), p.add_argument("--text")
    p.add_argument("--limit", type=float, default=1e9, help="seconds after which no row is begun")
    a = p.parse_args()
    kept = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else {}
    name = "SmolLM2-135M-Instruct, from Q4_1" if a.model == "smollm2" else Path(a.model).name
    settings, until = dict(size=a.size, **SIZES[a.size], dtype="float32", model=name), time.time() + a.limit
    def fixed(s): return {k: v for k, v in (s or {}).items() if k not in ("rates", "arms")}   # of which there may be more by and by
    if a.what != "four" and fixed(kept.get("settings")) != fixed(settings): kept = dict(rows=[]) if a.what == "scales" else {}
    if a.what != "four": kept["settings"] = settings
    trial = Trial(SIZES[a.size], a.device, a.model, a.text)
    trial.until = until
    device = torch.cuda.get_device_name() if a.device.startswith("cuda") else cpu_kind()
    bench = trial.bench
    kept = dict(hardware=device, versions=versions(), settings=settings, threads=torch.get_num_threads(),
                unquantized=dict(loss_rows=bench.loss, perplexity=torch.tensor(bench.loss).double().mean().exp().item())) | kept

    def save():
        text = json.dumps(digits(kept), separators=(",", ":"))
        for k in ('{"name"', '{"options"', '"sensitivity"', '"allocations"', '"model.layers'): text = text.replace(k, "\n" + k)
        a.out.write_text(text + "\n", encoding="utf-8")
    print("unquantized", kept["unquantized"]["perplexity"], flush=True)
    dict(scales=scales, bits=bits, four=four)[a.what](trial, kept, save, a.only)
    save()


if __name__ == "__main__": main()
