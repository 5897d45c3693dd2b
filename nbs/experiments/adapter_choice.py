"""Which rate, which rank, which variant, which layers? SmolLM2 on the support tickets in 4 bits, about 120 runs on one GPU.

    python nbs/experiments/adapter_choice.py nbs/results/adapter_choice.json [--device cuda] [--steps 150] [--limit SECONDS]

One run is a fine-tune of 150 steps and takes some 40 s on one GPU. Rows are written as they come in, and a second call goes on
where the first one ended. The 64 held-out tickets of the main job are not looked at: as in `seeds.py`, the last words of each
list make 256 tickets of their own. Prose is the Python reference, for what is forgotten.

Four stages, each of which needs the ones before it:

  bracket   each arm at rates half a power of ten apart, seed 0, until its best rate has a worse one on both sides
  seeds     each arm at its best rate, seeds 0 to 4; the seed fixes the rows' order, A and the batches, so arms are paired
  where     one kind of layer alone (leave one in) and all but one (leave one out), at the parameters of rank 8 on all layers
  allocate  the same budget by layer: uniform, random (three draws), by gradient spectra (water-filling), by input variance (EVA's)

Rules, written before any run:

  1. The measure is the mean loss of an answer's token on the 256 tickets. Exact matches and the perplexity of prose are shown.
  2. An arm whose best rate lies at the edge of its bracket has no result.
  3. Arms are compared at their own best rates by the five paired differences to plain LoRA of rank 16, with a 95 % t interval.
     Better or worse: the interval leaves out zero, and its mean is more than 2 % of LoRA's loss. Equal: all of the interval
     lies within 2 %. Anything else is undecided, and is called that.
  4. An allocation helps if it is better, by rule 3, than uniform and than random, taken over its draws. If random is equal to
     it, the measure that it allocates by is of no use, whatever its distance to uniform.
  5. `suggest_lr(r)` is the line through log rate against log rank of `lora-1`, `lora-16` and `lora-64`. If its slope is within
     the grid's half power of ten of zero over that range, the rate does not depend on the rank. The default of `finetune`
     changes only where the best rate of rank 16 is more than a factor of three away from it.
  6. `where` has two seeds a kind and ranks kinds by their mean; the rank correlation with gradient spectra and with input
     variance is given with an interval over the seven kinds, and is no result when that holds zero.
"""
import argparse, json, math, random, statistics, tempfile, time
from pathlib import Path

import torch

from qlora_nb.base.core import free_memory, set_seed, versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.base.targets import match_targets
from qlora_nb.evaluation.perplexity import perplexity, prose
from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.foundations.loading import load_model
from qlora_nb.training import tickets
from qlora_nb.training.data import collate, encode_rows
from qlora_nb.training.finetune import make_trainer
from seeds import score, set_words_aside

ARMS = {f"lora-{r}": dict(r=r) for r in (1, 16, 64)}
ARMS |= {f"rslora-{r}": dict(r=r, use_rslora=True) for r in (1, 64)}
ARMS |= {"lora+": dict(r=16, loraplus=16.), "dora": dict(r=16, use_dora=True), "lora-fa": dict(r=16, freeze_a=True)}
KINDS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
START, FACTOR, SEEDS = 2e-3, 10**.5, 5


def sizes(model, targets="all-linear"):
    "Name of a layer → numbers that one rank trains on it."
    layers = {n: model.get_submodule(n) for n in match_targets(model, targets)}
    return {n: m.in_features + m.out_features for n, m in layers.items()}


def ranks_within(budget, cost, wanted):
    "Ranks of at least 1 that use up `budget` numbers, as near to `wanted` (any scale) as whole numbers allow."
    low, high = 0., 1e9
    for _ in range(100):
        mid = (low + high)/2
        ranks = {n: max(1, round(mid*wanted[n])) for n in cost}
        low, high = (mid, high) if sum(ranks[n]*cost[n] for n in cost) <= budget else (low, mid)
    return {n: max(1, round(low*wanted[n])) for n in cost}


def water_fill(budget, cost, spectra):
    "Ranks by buying, again and again, the direction that brings the most energy for its numbers."
    ranks, left = {n: 1 for n in cost}, budget - sum(cost.values())
    gains = sorted(((s[k].item()**2/cost[n], n) for n, s in spectra.items() for k in range(1, len(s))), reverse=True)
    for _, n in gains:
        if cost[n] <= left: ranks[n], left = ranks[n] + 1, left - cost[n]
    return ranks


def look(model, tokenizer, rows, names, what):
    "Of 64 rows, for each layer: the singular values of its gradient (`gradient`), or of its inputs (`inputs`)."
    sums, hooks = {}, []
    def add(n, M): sums[n] = sums.get(n, 0) + M
    for n in names:
        def after(m, args, y, n=n):
            x = args[0].detach().flatten(0, -2).float()
            if what == "inputs": add(n, x.T @ x)
            elif y.requires_grad: y.register_hook(lambda dy: add(n, dy.flatten(0, -2).float().T @ x))
        hooks.append(model.get_submodule(n).register_forward_hook(after))
    model.enable_input_require_grads()
    for k in range(0, 64, 8):
        batch = collate(encode_rows(rows[k:k+8], tokenizer), tokenizer.pad_token_id)
        model(**{o: v.to(model.device) for o, v in batch.items()}).loss.backward()
    for o in hooks: o.remove()
    model.disable_input_require_grads()
    values = {n: torch.linalg.svdvals(M) for n, M in sums.items()}
    return {n: v.sqrt() if what == "inputs" else v for n, v in values.items()}


def rank_pattern(kind, budget, model, tokenizer, rows, draw=0):
    cost = sizes(model)
    if kind == "uniform": return ranks_within(budget, cost, {n: 1. for n in cost})
    if kind == "random":
        draws = random.Random(draw)
        return ranks_within(budget, cost, {n: math.exp(draws.gauss(0, 1)) for n in cost})
    spectra = look(model, tokenizer, rows, cost, dict(gradient="gradient", eva="inputs")[kind])
    if kind == "gradient": return water_fill(budget, cost, spectra)
    # EVA ranks directions by the share of a layer's variance that they explain
    return water_fill(budget, {n: c for n, c in cost.items()},
                      {n: (s.square()/s.square().sum()*cost[n]).sqrt() for n, s in spectra.items()})


def learn(task, steps, device, train, test):
    "One fine-tune: what it scored, and what it cost in prose."
    set_seed(task["seed"])
    model, tokenizer = load_model(device=device), load_tokenizer()
    how, targets = {k: v for k, v in task.items() if k == "use_rslora" or k == "use_dora"}, task.get("targets", "all-linear")
    if kind := task.get("allocation"):
        ranks = rank_pattern(kind, task["budget"], model, tokenizer, train, task.get("draw", 0))
        how |= dict(rank_pattern={f"^{n.replace('.', chr(92) + '.')}$": r for n, r in ranks.items()},
                    alpha_pattern={f"^{n.replace('.', chr(92) + '.')}$": 2*r for n, r in ranks.items()})
        set_seed(task["seed"])
    model = add_adapters(model, task["r"], task.get("alpha", 2*task["r"]), 0., targets, **how)
    if task.get("freeze_a"):
        for n, p in model.named_parameters():
            if "lora_A" in n: p.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, encode_rows(train, tokenizer), folder, progress=False, max_steps=steps,
                               learning_rate=task["lr"], seed=task["seed"], save_steps=10**6, optim="adamw_torch",
                               loraplus_lr_ratio=task.get("loraplus"))
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    share, loss = score(model.eval(), tokenizer, test)
    row = task | dict(answer_loss=loss, exact_match=share, trained=trained, seconds=round(seconds, 1), last_loss=losses[-1])
    row["prose"] = perplexity(model, tokenizer, prose())
    free_memory()
    return row


class Rows:
    "Rows in a file, by task: what is there is not measured again."
    def __init__(self, path, run, **settings):
        self.path, self.run, self.start = path, run, time.time()
        self.doc = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(rows=[])
        if self.doc.setdefault("settings", settings) != settings: raise SystemExit(f"{path} holds runs of other settings")
    def get(self, stage, **task):
        for o in self.doc["rows"]:
            if all(o.get(k) == v for k, v in task.items()): return o
        row = dict(stage=stage) | self.run(task)
        self.doc["rows"].append(row)
        self.doc["versions"] = versions()
        self.path.write_text(json.dumps(self.doc, indent=1) + "\n", encoding="utf-8")
        print(round(time.time() - self.start), "s", len(self.doc["rows"]), json.dumps(row)[:240], flush=True)
        return row


def bracket(rows, name, start=START, most=7):
    "The best rate of an arm, with a worse one on both sides; None where there is none within `most` rates."
    def loss(k):
        found = rows.get("bracket", arm=name, seed=0, lr=float(f"{start*FACTOR**k:.3g}"), **ARMS[name])["answer_loss"]
        return found if math.isfinite(found) else math.inf
    known = {k: loss(k) for k in (-1, 0, 1)}
    while len(known) < most:
        best = min(known, key=known.get)
        if best not in (min(known), max(known)): break
        k = best - 1 if best == min(known) else best + 1
        known[k] = loss(k)
    best = min(known, key=known.get)
    return float(f"{start*FACTOR**best:.3g}") if best not in (min(known), max(known)) else None


def compare(rows, name, lr, base_lr):
    "Rule 3: (mean difference in % of LoRA's loss, half of its 95 % interval, verdict)."
    def losses(arm, lr):
        return [rows.get("seeds", arm=arm, seed=s, lr=lr, **ARMS[arm])["answer_loss"] for s in range(SEEDS)]
    mine, base = losses(name, lr), losses("lora-16", base_lr)
    diff = [100*(a - b)/statistics.mean(base) for a, b in zip(mine, base)]
    mean, half = statistics.mean(diff), 2.776*statistics.stdev(diff)/SEEDS**.5   # t, four degrees of freedom
    if abs(mean) + half <= 2: return mean, half, "equal"
    if abs(mean) > half and abs(mean) > 2: return mean, half, "better" if mean < 0 else "worse"
    return mean, half, "undecided"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--device", default="cuda")
    for name, default in dict(steps=150, train=800, test=256).items(): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    p.add_argument("--stages", nargs="+", default=["bracket", "seeds", "where", "allocate"])
    a = p.parse_args()
    set_words_aside()
    test, train = tickets.make_tickets("test", a.test, seed=7), tickets.make_tickets("train", a.train)
    rows = Rows(a.out, lambda task: learn(task, a.steps, a.device, train, test), steps=a.steps, train=a.train, test=a.test)
    rates = {k: bracket(rows, k) for k in a.arms} if "bracket" in a.stages else {}
    print("best rates", rates, flush=True)
    lr = rates.get("lora-16")
    if "seeds" in a.stages and lr:
        for k in a.arms:
            if rates[k]: print(k, *compare(rows, k, rates[k], lr), flush=True)
    if lr is None: return
    model = load_model(device="cpu")
    cost = sizes(model)
    budget = 8*sum(cost.values())
    of_kind = {k: sum(c for n, c in cost.items() if n.endswith(k)) for k in KINDS}
    del model
    for seed in (0, 1)*("where" in a.stages):
        for k in KINDS:
            alone, rest = round(budget/of_kind[k]), round(budget/(sum(of_kind.values()) - of_kind[k]))
            rows.get("where", only=k, seed=seed, lr=lr, r=alone, targets=[k])
            rows.get("where", without=k, seed=seed, lr=lr, r=rest, targets=[o for o in KINDS if o != k])
    for seed in range(SEEDS*("allocate" in a.stages)):
        for kind in ("uniform", "gradient", "eva"): rows.get("allocate", allocation=kind, seed=seed, lr=lr, r=8, budget=budget)
        for draw in range(3 if seed < 2 else 1):
            rows.get("allocate", allocation="random", draw=draw, seed=seed, lr=lr, r=8, budget=budget)


if __name__ == "__main__": main()
