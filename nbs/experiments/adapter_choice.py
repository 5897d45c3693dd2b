"""Which rate, which rank, which variant, which layers? SmolLM2 on the support tickets, about 430 runs on one GPU.

    python nbs/experiments/adapter_choice.py nbs/results/adapter_choice.json [--workers 8] [--limit SECONDS] [--steps 150]

One run is a fine-tune of 150 steps. A step of a model this small is launch-bound, so it is recorded as a CUDA graph and replayed,
and several processes share one GPU. Rows are written as they come in; a second call goes on where the first one ended, and after
`--limit` seconds no new run is begun. The 64 held-out tickets of the main job are not looked at: as in `seeds.py`, the last words
of each list make 256 tickets of their own. Prose is the Python reference, for what is forgotten.

Stages, each of which needs the ones before it:

  bracket   each arm at rates half a power of ten apart, seed 0, until its best rate has a worse one on both sides
  seeds     each arm at its best rate, seeds 0 to 4; the seed fixes the rows' order, A and the batches, so arms are paired
  same      arms whose best rate is another than that of LoRA of rank 16, at LoRA's: one seed has chosen their own, and at a high rate
            runs differ more from seed to seed; for bases and formats only
  again     arms at their best rate with five seeds that nothing was chosen by: one in twenty is told apart by chance
  pace      what a step of each variant takes beside one of LoRA, and what its start costs, in one process while the others wait
  equal     variants whose step is more than 2 % slower or quicker than LoRA's, at their best rates, for as many steps as fit into
            the milliseconds of LoRA's; seeds 0 to 4
  where     one kind of layer alone (leave one in) and all but one (leave one out), at the parameters of rank 8 on all layers
  allocate  the same budget by layer: uniform, random (three draws), by gradient spectra (water-filling), by input variance (EVA's),
            and by the directions that AdaLoRA of 12, reduced to a mean of 8, has left on: AdaLoRA itself at its own rate, and LoRA with its ranks

Arms (`--groups`): `ranks`, LoRA of five ranks, scaled by α/r with α = 2r; `scalings`, α = 32 at every rank, and rsLoRA with α = 8,
so that all three rules scale by two at rank 16; `variants` at rank 16, and LoRA-FA at 32
as well, where it trains as many numbers as LoRA does at 16; `methods`, all weights trained; `finer`, does a finer
quantization survive training: a base that is not quantized, NF4 with double quantization filled by searched scales, by scales searched
for the inputs, by error feedback, with the scales of absmax or of the weighted search learned (`learned`, `learned-search`: 64 steps on
four rows of 512 tokens of the prose, from token 40,960 on, at 3e-3, rounded in the end), and adapters that begin with what plain NF4 has lost, as a matrix (LoftQ, one round) or in outputs;
`types`, the same adapters on bases rounded to other formats; `formats`, on the other steps of part 6: rotated blocks, BOF4-S and levels
that FP8 holds, the mixture of 2 to 16 bits that `mixed_bits.json` has chosen at four, LoftQ with five rounds, and the closed form on a
base filled by error feedback.

Rules, written before any run:

  1. The measure is the mean loss of an answer's token on the 256 tickets. Exact matches and the perplexity of prose are shown.
  2. An arm whose best rate lies at the edge of its bracket has no result.
  3. Arms are compared at their own best rates by the five paired differences to plain LoRA of rank 16, with a 95 % t interval.
     Better or worse: the interval leaves out zero, and its mean is more than 2 % of LoRA's loss. Equal: all of the interval
     lies within 2 %. Anything else is undecided, and is called that.
  4. An allocation helps if it is better, by rule 3, than uniform and than random, taken over its draws. If random is equal to
     it, the measure that it allocates by is of no use, whatever its distance to uniform.
  5. `suggest_lr(r)` is the line through log rate against log rank of `lora-1` to `lora-256`. If its slope is within the grid's
     half power of ten of zero over that range, the rate does not depend on the rank. The default of `finetune` changes only
     where the best rate of rank 16 is more than a factor of three away from it.
  6. `where` has two seeds a kind and ranks kinds by their mean; the rank correlation with gradient spectra and with input
     variance is given with an interval over the seven kinds, and is no result when that holds zero.
  7. An intruder is one of the ten strongest left singular vectors of a trained weight whose cosine with every one of the base's
     is below 0.5 (PEFT's numbers; three blocks, seven layers each). Arms differ in it, or in prose, when the 95 % t interval of
     the five paired differences leaves out zero.
  8. A step's time is the median of seven rounds of thirty steps, the variants taking turns, recorded and replayed as in these runs.
     What a start costs is said apart, in steps of LoRA, and is not taken from a variant's steps.
"""
import argparse, functools, gc, heapq, json, math, multiprocessing, os, statistics, tempfile, threading, time, traceback
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from filelock import FileLock
from peft import AdaLoraConfig, get_peft_model
from torch.nn import functional as F

from qlora_nb.base.core import free_memory, set_seed, versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.base.nf4_config import quiet
from qlora_nb.base.targets import match_targets
from qlora_nb.beyond.allocation import look, random_ranks, ranks_within, spectrum, water_fill
from qlora_nb.beyond.error_feedback import feedback_quantize
from qlora_nb.beyond.learned_scales import learn_scales
from qlora_nb.beyond.mixed_bits import round_bits
from qlora_nb.beyond.scale_search import put_weight, search_quantize
from qlora_nb.beyond.variants import lora_ga, lorafa_gradient
from qlora_nb.beyond.which_error import input_moments
from qlora_nb.evaluation.data_types import round_weights
from qlora_nb.evaluation.perplexity import perplexity
from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.foundations.double_quantization import quantize
from qlora_nb.foundations.loading import load_model
from qlora_nb.speed.cuda_graphs import capture
from qlora_nb.speed.dequantized import dequantized_weight, four_bit_layers
from qlora_nb.training import tickets
from qlora_nb.training.data import collate, encode_rows
from finer import codebooks, read, rotated
from seeds import score, set_words_aside

FILLED = "search", "weighted", "feedback", "learned", "learned-search"   # NF4 with double quantization, its scales and codes found in another way
CALIBRATION = 32768, 2048   # first token of the prose, tokens
LEARN = 40960, 64*512       # the same, of what scales are learned from
MIXED = Path(__file__).parents[1]/"results"/"mixed_bits.json"   # of scales_and_bits.py
GROUPS = dict(
    ranks={f"lora-{r}": dict(r=r) for r in (16, 1, 64, 4, 256)},
    finer={"lora-16bit": dict(r=16, base="none"), **{k: dict(r=16, base=k) for k in FILLED}, **{k: dict(r=16, start=k) for k in ("loftq", "closed")}},
    variants={"dora": dict(r=16, use_dora=True), "lora+": dict(r=16, loraplus=16.), "lora-fa": dict(r=16, freeze_a=True),
              "lora-fa-32": dict(r=32, freeze_a=True),
              "pissa": dict(r=16, start="pissa"), "lora-ga": dict(r=16, start="lora-ga"), "bf16": dict(r=16, dtype="bfloat16")},
    scalings={f"alpha32-{r}": dict(r=r, alpha=32) for r in (1, 64)} | {f"rslora-{r}": dict(r=r, alpha=8, use_rslora=True) for r in (1, 64)},
    methods={"full": dict(r=0, base="all weights")}, adalora={"adalora": dict(r=8, adalora=True)},
    formats={**{k: dict(r=16, base=k) for k in ("rotated", "bof4s", "e4m3", "mixed")}, "loftq-5": dict(r=16, start="loftq-5"),
             "feedback-closed": dict(r=16, base="feedback", start="closed")},
    types={f"{t}{'+dq'*d}": dict(r=16, base=t, double=d) for t, d in
           [("nf4", False), ("nf4", True), ("fp4", False), ("int4", False), ("int8", False)]})
ARMS = {k: v for o in GROUPS.values() for k, v in o.items()}
KINDS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
FACTOR, SEEDS, START = 10**.5, 5, 2e-3/10**.5
STARTS = {"full": START/10, "lora+": START/FACTOR, "adalora": START*FACTOR, "pissa": START/FACTOR, "lora-ga": START/FACTOR, "alpha32-1": START/FACTOR,
          "lora-256": START/FACTOR}   # where a bracket begins; it moves until the best one lies inside
PIECE = "model.layers.29.self_attn.v_proj"   # of which a page measures the spectrum again
BLOCKS, TOP, COSINES = (5, 15, 25), 10, (.3, .5, .7, .9)   # where intruders are looked for, among how many, below what


def sizes(model, targets="all-linear"):
    "Name of a layer → numbers that one rank trains on it."
    layers = {n: model.get_submodule(n) for n in match_targets(model, targets)}
    return {n: m.in_features + m.out_features for n, m in layers.items()}


def spectra_of(sums, what):
    "`spectrum` of each layer."
    return {n: spectrum(M, what) for n, M in sums.items()}


@functools.cache
def roundings():
    "{base: (name of a layer, weight) → what stands in its place}, of the group `formats`."
    books, mixed = codebooks(), json.loads(MIXED.read_text(encoding="utf-8"))
    best = next(r for r in mixed["allocations"] if (r["way"], r["budget"], r["options"]) == ("best by unquantized", 4, "all"))
    bits = {n: 16 if b == "g" else int(b) for n, b in zip(mixed["names"], best["bits"])}
    of = {"bof4s": "bof4s 64", "e4m3": "nf4 on e4m3 64"}
    return {"rotated": lambda n, W: rotated(W, None), "mixed": lambda n, W: round_bits(W, bits[n]),
            **{k: lambda n, W, f=books[v][1]: f(W, None) for k, v in of.items()}}


def rank_pattern(kind, budget, cost, spectra, draw=0, left=None):
    "Ranks by layer. `spectra`: a function of `gradient` or `inputs`; `left`: the directions that AdaLoRA has left on, a letter a layer."
    if kind == "adalora": return ranks_within(budget, cost, {n: float(int(c, 16)) for n, c in zip(cost, left)})
    if kind == "uniform": return ranks_within(budget, cost, {n: 1. for n in cost})
    if kind == "random": return random_ranks(budget, cost, draw)
    if kind == "gradient": return water_fill(budget, cost, spectra("gradient"))
    # EVA ranks directions by the share of a layer's variance that they explain
    return water_fill(budget, cost, {n: (s.square()/s.square().sum()*cost[n]).sqrt() for n, s in spectra("inputs").items()})


class Worker:
    "What a process keeps from run to run: rows, a tokenizer, the base, its weights before quantization."
    def __init__(self, a):
        torch.set_num_threads(max(1, os.cpu_count()//a["workers"]//2))
        self.usual = tickets.make_tickets("train", 8)   # what a page measures again
        set_words_aside()
        self.steps, self.device, self.graphs = a["steps"], a["device"], a["graphs"] and a["device"] == "cuda"
        self.test, self.train = tickets.make_tickets("test", a["test"], seed=7), tickets.make_tickets("train", a["train"])
        self.name, self.text = a["model"], read(a["text"])
        self.tokenizer, self.prose_tokens = load_tokenizer(self.name), a["prose"]
        self.examples = encode_rows(self.train, self.tokenizer)
        self.kept, self.weights, self.vectors, self.seen = {}, None, {}, {}

    def load(self, **how): return load_model(self.name, **how)

    def base(self, task):
        "A base for a run. Those that no run changes are kept."
        kind = task.get("base", "qlora"), task.get("double")
        if kind not in self.kept:
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            if kind[0] == "qlora": model = self.load(device=self.device)
            elif kind[0] in FILLED:
                model, found = self.load(device=self.device), self.filled(kind[0])
                for n in found: put_weight(model.get_submodule(n), found[n])
            elif kind[0] == "all weights": model = self.load(device=self.device, bits=None, dtype=torch.float32)
            else:
                model = self.load(device=self.device, bits=None, dtype=torch.float32)
                if kind[0] in roundings():
                    for n in sizes(model):
                        W = model.get_submodule(n).weight
                        W.data = roundings()[kind[0]](n, W.data.cpu()).to(W.device)
                elif kind[0] != "none": round_weights(model, kind[0], 64, kind[1])
                model = model.to(dtype)
            if kind[0] == "all weights": return model
            if self.device == "cuda": keep_wide(model)
            self.kept = {kind: model.requires_grad_(False)}   # one at a time
        return self.kept[kind]

    def wide(self):
        "The weights before quantization, on the CPU."
        if self.weights is None:
            model = self.load(device="cpu", bits=None, dtype=torch.float32)
            self.weights = {n: model.get_submodule(n).weight.detach() for n in sizes(model)}
        return self.weights

    def moments(self):
        "What each layer is given on average, of a text that nothing else looks at."
        if "moments" not in self.seen:
            ids = self.tokenizer(self.text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            first, n = CALIBRATION
            model = self.load(device=self.device, bits=None, dtype=torch.float32)
            self.seen["moments"] = {k: v.cpu() for k, v in input_moments(model, ids[first:first + n]).items()}
        return self.seen["moments"]

    def filled(self, kind):
        "All weights in NF4, filled in this way: made by the first process that asks, read by the others."
        path = Path(tempfile.gettempdir())/"filled_nf4"/f"{kind}.pt"
        path.parent.mkdir(exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                W, H = self.wide(), self.moments() if kind not in ("search", "learned") else None
                def fill(n):
                    if kind == "learned": return quantize(W[n].float())
                    if kind == "feedback": return feedback_quantize(W[n].float(), H[n])
                    return search_quantize(W[n].float(), weights=H[n].diagonal() if H else None, signed=True)
                made = {n: fill(n) for n in W}
                torch.save(self.learned(made) if kind.startswith("learned") else made, f"{path}.new")
                Path(f"{path}.new").replace(path)
        return torch.load(path, weights_only=False)   # our own file, of this call

    def learned(self, packed):
        "The same codes with scales that are learned."
        ids = self.tokenizer(self.text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        model = self.load(device=self.device, bits=None, dtype=torch.float32).requires_grad_(False)
        rows = ids[LEARN[0]:sum(LEARN)].view(-1, 512).to(self.device)
        got = learn_scales(model, {n: Q.to(self.device) for n, Q in packed.items()}, rows, 64, 3e-3, through=False)
        return {n: Q.to("cpu") for n, Q in got.items()}

    def look(self, model, what):
        "`look` at the 4-bit base, once."
        if what not in self.seen: self.seen[what] = look(model, self.tokenizer, self.train[:64], sizes(model), what)
        return self.seen[what]

    def spectra(self, model, what):
        if (key := what + " spectra") not in self.seen: self.seen[key] = spectra_of(self.look(model, what), what)
        return self.seen[key]

    def strongest(self, r, s):
        "`pissa` of each weight, by eigenvectors, which a GPU finds sooner."
        if ("pissa", r) not in self.seen:
            def parts(W):
                U = left_vectors(W)[:, :r]
                S = (W.double().T @ U).norm(dim=0)
                root = (S/s).sqrt()
                return (root[:, None]*(U.T @ W.double()/S[:, None])).float(), (U*root).float()
            self.seen["pissa", r] = {n: parts(W.to(self.device)) for n, W in self.wide().items()}
        return self.seen["pissa", r]


def keep_wide(model):
    "Let 4-bit layers multiply with weights that were dequantized once: the same bits, fewer kernels."
    for m in four_bit_layers(model):
        W, _ = dequantized_weight(m)
        m.forward = lambda x, W=W: F.linear(x.to(W.dtype), W).to(x.dtype)


def lost_parts(E, H, r, s, damp=.01):
    "A and B of an adapter that makes good most of E: as a matrix (LoftQ's first round), or of outputs, for inputs of moments H (QERA)."
    L = torch.eye(E.shape[1], device=E.device, dtype=torch.float64)
    if H is not None:
        H = H.double()
        L = torch.linalg.cholesky(H + damp*H.diagonal().mean()*torch.eye(len(H), device=E.device, dtype=H.dtype))
    M = E.double() @ L
    U = left_vectors(M)[:, :r]
    S = (M.T @ U).norm(dim=0)
    root = (S/s).sqrt()
    A = root[:, None]*(U.T @ M/S[:, None])
    return torch.linalg.solve_triangular(L, A, upper=False, left=False).float(), (U*root).float()


def adapted(w, model, task):
    "The model with this task's adapters, and how to take them off again."
    if not task["r"]:
        return model.requires_grad_(True), lambda: None
    how, targets = {k: v for k, v in task.items() if k == "use_rslora" or k == "use_dora"}, task.get("targets", "all-linear")
    alpha, undo = task.get("alpha", 2*task["r"]), []
    if kind := task.get("allocation"):
        ranks = rank_pattern(kind, task["budget"], sizes(model), lambda what: w.spectra(model, what), task.get("draw", 0), task.get("left"))
        w.ranks = ranks
        how |= dict(rank_pattern={f"^{n.replace('.', chr(92) + '.')}$": r for n, r in ranks.items()},
                    alpha_pattern={f"^{n.replace('.', chr(92) + '.')}$": 2*r for n, r in ranks.items()})
    start = task.get("start")
    grads = w.look(model, "gradient") if start == "lora-ga" else {}
    set_seed(task["seed"])
    model = add_adapters(model, task["r"], alpha, 0., targets, **how)
    for n in sizes(model.get_base_model(), targets) if start or task.get("freeze_a") else []:
        m = model.get_base_model().get_submodule(n)
        A, B, s = m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]
        if task.get("freeze_a"):
            A.requires_grad_(False)
            G = lorafa_gradient(A.detach(), torch.eye(len(A), device=A.device), s)
            B.register_hook(lambda g, G=G: g @ G)
        if start in ("loftq", "closed"):   # A and B begin as what rounding has lost, the base stays
            E = w.wide()[n].to(A.device).float() - dequantized_weight(m.base_layer)[0].float()
            a, b = lost_parts(E, w.moments()[n].to(A.device) if start == "closed" else None, task["r"], s)
            A.data.copy_(a), B.data.copy_(b)
        elif start:   # A and B begin as directions of W or of its gradient, and what is left of W is quantized
            W = w.wide()[n].to(A.device)
            old, q = m.base_layer.weight, m.base_layer.weight.quant_state
            def pack(a, b): return quantize(W.float() - s*b.to(W.device) @ a.to(W.device), q.quant_type, q.blocksize, q.nested)
            a, b = torch.zeros_like(A), torch.zeros_like(B)
            for _ in range(5*(start == "loftq-5")):   # the adapter holds what Q has lost, Q is made of what the adapter leaves
                Q = pack(a, b)
                a, b = lost_parts(W.float() - Q.dequantize(), None, task["r"], s)
            if start == "pissa": a, b = w.strongest(task["r"], s)[n]
            elif start == "lora-ga": a, b = lora_ga(grads[n], task["r"])
            A.data.copy_(a), B.data.copy_(b)
            undo.append((m.base_layer, old.data.clone(), q.absmax.clone(), q.state2.absmax.clone(), q.offset.clone()))
            put_weight(m.base_layer, Q if start == "loftq-5" else pack(A.data, B.data))
    if undo and w.device == "cuda": keep_wide(model)
    if task.get("dtype"):
        for p in model.parameters():
            if p.requires_grad: p.data = p.data.bfloat16()
    def off():
        for m, data, absmax, second, offset in undo:
            m.weight.data, q = data, m.weight.quant_state
            q.absmax, q.state2.absmax, q.offset = absmax, second, offset
        plain = model.unload()
        if undo and w.device == "cuda": keep_wide(plain)
    return model, off


def batches(w, seed, steps, size=4):
    "Numbers of the rows of each step."
    order, draw = [], torch.Generator().manual_seed(seed)
    while len(order) < steps*size: order += torch.randperm(len(w.examples), generator=draw).tolist()
    return [order[k:k+size] for k in range(0, steps*size, size)]


def rate(i, steps):
    "What `finetune` multiplies its learning rate with: warm-up, then half a cosine."
    warm = min(steps - 1, max(1, steps//20))
    return i/warm if i < warm else .5*(1 + math.cos(math.pi*(i - warm)/(steps - warm)))


def train(w, model, task):
    "Losses of the steps of a task, and whether they were replayed."
    losses, ran = [], steps_of(w, model, task)
    for loss, used in ran: losses.append(loss)
    return torch.stack(losses).tolist(), used


def steps_of(w, model, task):
    """As `finetune` trains: AdamW, 0.3 as the norm of gradients at most. Every batch is padded to one length, so one graph does.
    Gives the loss of each step, and whether the graph was used."""
    cuda, pad, steps = w.device == "cuda", w.tokenizer.pad_token_id, task.get("steps", w.steps)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fast = {n for n in named if "lora_B" in n} if task.get("loraplus") else set()
    sets = [([p for n, p in named.items() if n not in fast], 1.), ([p for n, p in named.items() if n in fast], task.get("loraplus", 1.))]
    groups = [dict(params=p, lr=torch.tensor(0., device=w.device), factor=f) for p, f in sets if p]
    opt = torch.optim.AdamW(groups, weight_decay=0., fused=True, capturable=cuda)
    longest = -(-max(len(e["input_ids"]) for e in w.examples)//8)*8
    ids = torch.full((4, longest), pad, device=w.device)
    labels = torch.full((4, longest), -100, device=w.device)
    width = longest
    def put(rows, lr, i):
        new = collate([w.examples[k] for k in rows], pad)
        ids.fill_(pad), labels.fill_(-100)
        ids[:, :new["input_ids"].shape[1]] = new["input_ids"].to(w.device)
        labels[:, :new["labels"].shape[1]] = new["labels"].to(w.device)
        nonlocal width
        width = longest if w.graphs else new["labels"].shape[1]
        for g in opt.param_groups: g["lr"].fill_(lr*g["factor"]*rate(i, steps))
    causal = torch.ones(longest, longest, dtype=torch.bool, device=w.device).tril().expand(4, 1, -1, -1)
    def loss_now():   # rows are padded on the right, where nothing looks
        with torch.autocast(w.device, torch.bfloat16, enabled=cuda):
            logits = model(input_ids=ids[:, :width], attention_mask=causal[..., :width, :width], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:width].flatten())
    def step():
        loss = loss_now()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), .3)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return [loss.detach()]
    model.train()
    plan, again, used = batches(w, task["seed"], steps), None, False
    side = torch.cuda.Stream() if cuda else None
    for i, rows in enumerate(plan):
        put(rows, task["lr"], i)
        if w.graphs and i == 3:   # the first steps have set up everything that allocates
            gc.collect()
            torch.cuda.current_stream().wait_stream(side), torch.cuda.synchronize()
            with torch.no_grad(): expected = loss_now().item()
            try: out, again = capture(step, torch.cuda.graph_pool_handle())
            except Exception as e:
                print("no graph:", type(e).__name__, str(e)[:300], flush=True)
                w.graphs = False
        if again:
            again()
            loss = out[0].clone()
            if not used and not math.isclose(loss.item(), expected, rel_tol=.02):
                raise RuntimeError(f"the graph's first loss is {loss.item()}, and has to be {expected}")
            used = True
        elif side:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side): loss, = step()
            torch.cuda.current_stream().wait_stream(side)
        else: loss, = step()
        yield loss, used
    del again


def pace(w, task, rounds=7, many=30, warm=10):
    "Milliseconds of a step of each variant, in turns, and seconds of its start. Each has a base of its own, as some change theirs."
    sync = torch.cuda.synchronize if w.device == "cuda" else lambda: None
    def timed(f):
        sync()
        begin, got = time.perf_counter(), f()
        sync()
        return time.perf_counter() - begin, got
    w.wide(), look(w.base({}), w.tokenizer, w.usual[:4], [PIECE], "gradient")   # what is loaded and set up once
    ran, starts, times = {}, {}, {name: [] for name in task["pace"]}
    for name in task["pace"]:
        how = ARMS[name] | dict(seed=0, lr=1e-4, steps=warm + rounds*many)
        w.kept, w.seen = {}, {}
        model = w.base(how)
        starts[name], (model, _) = timed(lambda: adapted(w, model, how))
        ran[name] = steps_of(w, model, how)
        for _ in range(warm): next(ran[name])   # the graph is recorded in the fourth
    for _ in range(rounds):
        for name, steps in ran.items(): times[name].append(timed(lambda: [next(steps) for _ in range(many)])[0]*1e3/many)
    w.kept, w.seen = {}, {}   # with adapters, some of them with other weights
    return task | dict(ms=times, start_seconds=starts, device=torch.cuda.get_device_name() if w.device == "cuda" else "cpu")


def train_adalora(w, model, task, cost, start=1.5):
    "PEFT's AdaLoRA as its paper has it: half as many directions again, the budget falls between a tenth and a half of the steps."
    set_seed(task["seed"])
    first = round(start*task["r"])
    with quiet():
        model = get_peft_model(model, AdaLoraConfig(init_r=first, target_r=task["r"], lora_alpha=2*first, tinit=w.steps//10, tfinal=w.steps//2,
                                                    total_step=w.steps, target_modules="all-linear", task_type="CAUSAL_LM"))
    params, losses = [p for p in model.parameters() if p.requires_grad], []
    opt = torch.optim.AdamW(params, weight_decay=0.)
    model.train()
    for i, rows in enumerate(batches(w, task["seed"], w.steps)):
        for g in opt.param_groups: g["lr"] = task["lr"]*rate(i, w.steps)
        batch = {k: v.to(w.device) for k, v in collate([w.examples[k] for k in rows], w.tokenizer.pad_token_id).items()}
        with torch.autocast(w.device, torch.bfloat16, enabled=w.device == "cuda"): loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, .3)
        opt.step()
        model.base_model.update_and_allocate(i)
        opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
    left = {k.split(".lora_E")[0]: sum(v) for k, v in model.peft_config["default"].rank_pattern.items()}
    return model, losses, "".join(f"{left[n]:x}" for n in cost)


def trained_weight(m):
    "A layer's weight with what its adapter has made of it."
    if not hasattr(m, "lora_A"): return (dequantized_weight(m)[0] if hasattr(m.weight, "quant_state") else m.weight.detach()).float()
    base = m.base_layer
    W = (dequantized_weight(base)[0] if hasattr(base.weight, "quant_state") else base.weight.detach()).float()
    V = W + m.scaling["default"]*(m.lora_B["default"].weight.detach().float() @ m.lora_A["default"].weight.detach().float())
    if not getattr(m, "lora_magnitude_vector", None): return V
    return m.lora_magnitude_vector["default"].weight.detach().float()[:, None]/V.norm(dim=1, keepdim=True)*V


def left_vectors(W):
    "Left singular vectors of a matrix, the strongest first."
    W, tall = W.double(), W.shape[0] > W.shape[1]
    values, vectors = torch.linalg.eigh(W.T @ W if tall else W @ W.T)
    vectors = vectors.flip(1)
    return W @ vectors/values.flip(0).clamp_min(1e-20).sqrt() if tall else vectors


@torch.no_grad()
def intruders(w, model, task):
    "How many of the strongest directions of trained weights are none of the base's, and how long the updates are."
    near, lengths = [], []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    key = task.get("base", "qlora"), task.get("double")
    for n in [n for n in w.wide() if int(n.split(".layers.")[1].split(".")[0]) in BLOCKS]:
        if (key, n) not in w.vectors:
            before = w.wide()[n] if key[0] in ("all weights", "none") else w.before[n]
            w.vectors[key, n] = before.to(w.device).float(), left_vectors(before.to(w.device))
        before, U = w.vectors[key, n]
        after = trained_weight(inner.get_submodule(n))
        lengths.append(((after - before).norm()/before.norm()).item())
        near.append((left_vectors(after)[:, :TOP].T @ U).abs().max(1).values)
    near = torch.cat(near)
    return dict(intruders={str(c): int((near < c).sum()) for c in COSINES}, directions=len(near), update=statistics.mean(lengths))


def keep_before(w, model, task):
    "The base's weights in the blocks where intruders are looked for."
    if task.get("base", "qlora") in ("all weights", "none"): return
    def weight(m): return dequantized_weight(m)[0].float() if hasattr(m.weight, "quant_state") else m.weight.detach().float()
    w.before = {n: weight(model.get_submodule(n)).cpu() for n in w.wide() if int(n.split(".layers.")[1].split(".")[0]) in BLOCKS}


def kinds_seen(w, model, budget):
    "What spectra promise: of each kind of layer, the energy that its share of the budget would hold; and of each block, all of it."
    cost, row = sizes(model), {}
    for what in ("gradient", "inputs"):
        spectra, found, alone, shape = w.spectra(model, what), {}, {}, {}
        for k in KINDS:
            mine = {n: s for n, s in spectra.items() if n.endswith(k)}
            r = round(budget/sum(cost[n] for n in mine))
            shares = [(s.square()/s.square().sum()).cumsum(0) for s in mine.values()]
            found[k] = sum(s[:r].square().sum().item() for s in mine.values())
            alone[k] = statistics.mean(s[min(r, len(s)) - 1].item() for s in shares)
            shape[k] = [round(statistics.mean(s[i - 1].item() for s in shares), 4) for i in (1, 2, 4, 8, 16, 32, 64, 128)]
        again = look(model, w.tokenizer, w.usual, [PIECE], what)
        row[what] = dict(slice=spectra_of(again, what)[PIECE][:8].tolist(), energy=found, share=alone, shares=shape,
                         layers={n: float(f"{s.square().sum().item():.4g}") for n, s in spectra.items()})
    return row


def scores(w, model):
    "Of a trained model, on the held-out tickets and on prose."
    with torch.autocast(w.device, torch.bfloat16, enabled=w.device == "cuda"):
        share, loss = score(model.eval(), w.tokenizer, w.test)
        return dict(answer_loss=loss, exact_match=share, prose=perplexity(model, w.tokenizer, w.text, max_tokens=w.prose_tokens))


def learn(w, task):
    "One fine-tune: what it scored, and what it cost in prose."
    begin = time.perf_counter()
    if "pace" in task: return pace(w, task)
    model = w.base(task)
    if "spectra" in task: return task | kinds_seen(w, model, task["budget"])
    if task.get("lr") == 0:   # a base before it is trained
        share, loss = score(model.eval(), w.tokenizer, w.test)
        return task | dict(answer_loss=loss, exact_match=share, slice=score(model, w.tokenizer, w.usual)[1], prose=perplexity(model, w.tokenizer, w.text, max_tokens=w.prose_tokens))
    if (task.get("base", "qlora"), task.get("double")) not in {k for k, _ in w.vectors}: keep_before(w, model, task)
    if task.get("adalora"): return learn_adalora(w, model, task, begin)
    model, off = adapted(w, model, task)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        start = time.perf_counter()
        losses, graph = train(w, model, task)
        seconds = time.perf_counter() - start
        for p in model.parameters(): p.grad = None
        row = task | scores(w, model) | dict(trained=trained, train_seconds=round(seconds, 1), graph=graph,
                          first_loss=losses[0], last_loss=statistics.mean(losses[-10:])) | intruders(w, model, task)
    finally: off()
    if task.get("allocation"): row["ranks"] = {k: statistics.mean(r for n, r in w.ranks.items() if n.endswith(k)) for k in KINDS}
    if task.get("base") == "all weights":
        del model
        w.kept = {}
    gc.collect(), free_memory()
    return row | dict(seconds=round(time.perf_counter() - begin, 1))


def learn_adalora(w, model, task, begin):
    "A run of AdaLoRA: its scores, and the directions that it has left on."
    cost = sizes(model)
    model, losses, left = train_adalora(w, model, task, cost)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    numbers = sum(int(c, 16)*k for c, k in zip(left, cost.values()))
    row = task | scores(w, model)
    model.unload()
    gc.collect(), free_memory()
    return row | dict(left=left, left_numbers=numbers, trained=trained, first_loss=losses[0],
                       last_loss=statistics.mean(losses[-10:]), seconds=round(time.perf_counter() - begin, 1))


WORKER = None

def begin_worker(a, number):
    "Workers take the GPUs in turn."
    global WORKER
    with number.get_lock(): mine, number.value = number.value, number.value + 1
    if a["device"] == "cuda": torch.cuda.set_device(mine % torch.cuda.device_count())
    WORKER = Worker(a)

def work(task, until):
    "A run in a worker, or None when time is up. What goes wrong with a graph is done again without."
    if time.time() > until: return None
    try: return learn(WORKER, task)
    except Exception:
        traceback.print_exc()
        if not WORKER.graphs: raise
        WORKER.graphs, WORKER.kept, WORKER.vectors = False, {}, {}
        gc.collect(), free_memory()
        return learn(WORKER, task)


class TimeUp(Exception): pass


class Queue:
    "Hands workers the most urgent task: that of the first group that was asked for."
    def __init__(self, pool, workers): self.pool, self.free, self.waiting, self.n, self.lock = pool, workers, [], 0, threading.Lock()
    def submit(self, task, until):
        out = Future()
        group = next((i for i, o in enumerate(GROUPS.values()) if task.get("arm") in o), 2 if "arm" not in task else 5)
        with self.lock:
            self.n += 1
            heapq.heappush(self.waiting, (group, self.n, task, until, out))
        self.hand_out()
        return out
    def hand_out(self):
        with self.lock:
            while self.free and self.waiting:
                *_, task, until, out = heapq.heappop(self.waiting)
                self.free -= 1
                self.pool.submit(work, task, until).add_done_callback(lambda f, out=out: self.done(f, out))
    def done(self, f, out):
        with self.lock: self.free += 1
        if f.exception(): out.set_exception(f.exception())
        else: out.set_result(f.result())
        self.hand_out()


class Rows:
    "Rows in a file, by task: what is there is not measured again."
    def __init__(self, path, submit, until, **settings):
        self.path, self.submit, self.until, self.start, self.lock = path, submit, until, time.time(), threading.Lock()
        self.doc = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(rows=[])
        if self.doc.setdefault("settings", settings) != settings: raise SystemExit(f"{path} holds runs of other settings")
        self.under_way = {}
    def get(self, stage, **task):
        "The row of a task, measured if it is not there."
        key = json.dumps(task, sort_keys=True)
        with self.lock:
            for o in self.doc["rows"]:
                if all(o.get(k) == v for k, v in task.items()): return o
            mine = key not in self.under_way
            if mine: self.under_way[key] = self.submit(task, self.until)
        row = self.under_way[key].result()
        if row is None: raise TimeUp
        if mine: self.add(dict(stage=stage) | row)
        return row
    def add(self, row):
        with self.lock:
            self.doc["rows"].append(row)
            self.doc["versions"] = versions()
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.doc, indent=1) + "\n", encoding="utf-8")
            new.replace(self.path)
            print(round(time.time() - self.start), "s", len(self.doc["rows"]), json.dumps(row)[:250], flush=True)


def at_once(calls):
    "Results of functions that wait for workers. `TimeUp` where one of them has none."
    with ThreadPoolExecutor(max(1, len(calls))) as threads: found = [threads.submit(f) for f in calls]
    return [o.result() for o in found]


def grid(name, k): return float(f"{STARTS.get(name, START)*FACTOR**k:.3g}")

def bracket(rows, name, most=9):
    "The best rate of an arm, with a worse one on both sides; None where there is none within `most` rates."
    def loss(k):
        found = rows.get("bracket", arm=name, seed=0, lr=grid(name, k), **ARMS[name])["answer_loss"]
        return found if math.isfinite(found) else math.inf
    known = dict(zip((-1, 0, 1), at_once([lambda k=k: loss(k) for k in (-1, 0, 1)])))
    while len(known) < most:
        best = min(known, key=known.get)
        if best not in (min(known), max(known)): break
        k = best - 1 if best == min(known) else best + 1
        known[k] = loss(k)
    best = min(known, key=known.get)
    return grid(name, best) if best not in (min(known), max(known)) else None


def arm(rows, name, stages):
    "The best rate of an arm, and its five seeds there."
    lr = bracket(rows, name)
    print("best rate", name, lr, flush=True)
    if lr and "seeds" in stages:
        at_once([lambda s=s: rows.get("seeds", arm=name, seed=s, lr=lr, **ARMS[name]) for s in range(SEEDS)])
    if lr and "same" in stages and (same := bracket(rows, "lora-16")) != lr:
        at_once([lambda s=s: rows.get("same", arm=name, seed=s, lr=same, **ARMS[name]) for s in range(SEEDS)])
    if lr and "again" in stages:
        at_once([lambda s=s: rows.get("again", arm=f"again {name}", seed=s, lr=lr, **ARMS[name]) for s in range(SEEDS, 2*SEEDS)])
    return lr


def steps_at_pace(row, steps):
    "{variant: as many steps as fit into the milliseconds of LoRA's}, of those that are more than 2 % slower or quicker."
    ms = {k: statistics.median(v) for k, v in row["ms"].items()}
    near = {k: ms["lora-16"]/v for k, v in ms.items()}
    return {k: round(steps*v) for k, v in near.items() if abs(v - 1) > .02}


def equal(rows, steps):
    "Each variant for the milliseconds of LoRA."
    many = steps_at_pace(rows.get("pace", pace=["lora-16", *GROUPS["variants"]]), steps)
    print("steps", many, flush=True)
    at_once([lambda k=k, s=s, n=n: rows.get("equal", arm=f"equal {k}", seed=s, lr=bracket(rows, k), steps=n, **ARMS[k])
             for k, n in many.items() for s in range(SEEDS)])


def before(rows):
    for name in {"lora-16", "lora-16bit", *GROUPS["types"]}:
        rows.get("before", lr=0, arm=f"before {name}", seed=0, **{k: v for k, v in ARMS[name].items() if k in ("base", "double")})


def layers(rows, lr, stages):
    "Where to put a budget: kinds of layers, and ranks by layer."
    model = load_model(device="cpu")
    cost = sizes(model)
    budget = 8*sum(cost.values())
    of_kind = {k: sum(c for n, c in cost.items() if n.endswith(k)) for k in KINDS}
    del model
    calls = []
    def add(stage, **task): calls.append(lambda: rows.get(stage, lr=lr, **task))
    for seed in range(SEEDS*("allocate" in stages)):
        for kind in ("uniform", "gradient", "eva"): add("allocate", allocation=kind, seed=seed, r=8, budget=budget)
        for draw in range(3): add("allocate", allocation="random", draw=draw, seed=seed, r=8, budget=budget)
    if "where" in stages: calls.append(lambda: rows.get("spectra", spectra=True, budget=budget))
    for seed in (0, 1)*("where" in stages):
        for k in KINDS:
            alone, rest = round(budget/of_kind[k]), round(budget/(sum(of_kind.values()) - of_kind[k]))
            add("where", only=k, seed=seed, r=alone, targets=[k])
            add("where", without=k, seed=seed, r=rest, targets=[o for o in KINDS if o != k])
    at_once(calls)


def after_adalora(rows, lr):
    "The ranks that AdaLoRA has ended with, brought to the budget, as those of plain LoRA at the rate of the other allocations."
    if not (own := arm(rows, "adalora", ["seeds"])): return
    model = load_model(device="cpu")
    budget = 8*sum(sizes(model).values())
    def follow(seed):
        left = rows.get("seeds", arm="adalora", seed=seed, lr=own, **ARMS["adalora"])["left"]
        return rows.get("allocate", lr=lr, allocation="adalora", seed=seed, r=8, budget=budget, left=left)
    at_once([lambda s=s: follow(s) for s in range(SEEDS)])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--device", default="cuda")
    for name, default in dict(steps=150, train=800, test=256, prose=8192, workers=8).items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--limit", type=float, default=1e9, help="seconds after which no run is begun")
    p.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    p.add_argument("--arms", nargs="+", choices=list(ARMS), help="instead of groups")
    p.add_argument("--stages", nargs="+", default=["bracket", "seeds", "where", "allocate"])
    p.add_argument("--no-graphs", action="store_true")
    p.add_argument("--model", default="smollm2"), p.add_argument("--text", help="a file to read instead of the reference")
    a = p.parse_args()
    names = a.arms or [n for g in a.groups for n in GROUPS[g]]
    how = dict(steps=a.steps, train=a.train, test=a.test, prose=a.prose)
    until, setup = time.time() + a.limit, how | dict(device=a.device, workers=a.workers, graphs=not a.no_graphs, model=a.model, text=a.text)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(a.workers, spawn, begin_worker, (setup, spawn.Value("i", 0)))
    rows = Rows(a.out, Queue(pool, a.workers).submit, until, **how)
    if {"pace", "equal"} & {*a.stages}: return equal(rows, a.steps), pool.shutdown()
    def base():
        lr = arm(rows, "lora-16", a.stages)
        if lr and {"where", "allocate"} & {*a.stages}: layers(rows, lr, a.stages)
        if lr and "allocate" in a.stages: after_adalora(rows, lr)
    calls = [base]*("lora-16" in names) + [lambda n=n: arm(rows, n, a.stages) for n in names if n not in ("lora-16", "adalora")] + [lambda: before(rows)]
    with ThreadPoolExecutor(len(calls)) as threads: found = [threads.submit(f) for f in calls]
    for o in found:
        if (e := o.exception()) and not isinstance(e, TimeUp): print("FAILED", type(e).__name__, e, flush=True)
    print("time is up" if any(isinstance(o.exception(), TimeUp) for o in found) else "done", len(rows.doc["rows"]), "rows", flush=True)
    pool.shutdown()


if __name__ == "__main__": main()
