"""How fast is a QLoRA step of SmolLM2 on this CPU, and what is each lever worth? All ways in one process, in turns.

    python benchmarks/cpu_step.py benchmarks/results/cpu_step.json [--dtype bfloat16 float32] [--rounds 10] [--ways ...]

Each way is a trainer of `finetune` on its own model: the same tickets, four at a time with the same labels, LoRA of
rank 16 on every linear layer, in float32, with the same first values. A step is the trainer's: loss, backward, clipping,
AdamW. In each round every way takes one step on the same rows, in a new order; ratios are of the steps of one round, to
`peft`, so that what else runs on the machine hits both. Medians and quartiles.

`adapters_cosine` compares each adapter's gradient, on two rows, with that of the same packed weights unpacked to
float32 and multiplied by PyTorch alone: the smallest, and the median. In float32 the smallest has to be above 0.999; in
bfloat16 it tells what that format costs. `allocated_mb` is what a step needs above what the model holds before it.
It takes about 7 GB and eleven minutes on two cores for both formats.
"""
import argparse, json, os, platform, random, re, statistics, sys, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["KINETO_LOG_LEVEL"] = "99"   # or the profiler reports its own start
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from qlora_nb.base import core
from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.speed.cpu import cpu_pieces, cpu_pieces_undo
from qlora_nb.training.data import collate, encode_rows, load_rows
from qlora_nb.speed.fast_training import adapted_layers, make_fast, make_plain
from qlora_nb.speed.fused import fuse
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.foundations.qlora import load_scratch
from qlora_nb.training.finetune import make_trainer

LOAD = dict(peft=load_model, scratch=load_scratch)
ALONE = ["loss", "adapters", "norm", "attention", "optimizer"]
WAYS = {"peft": ("peft", []), "scratch": ("scratch", []), "scratch+fast": ("scratch", ALONE),
        "peft+fast": ("peft", ALONE), "peft+our loss": ("peft", ["loss"]), **{f"scratch+{o}": ("scratch", [o]) for o in ALONE}}
BATCH, RANK = 4, 16


def adapters(model):  # name → parameter, the same names for both backends
    def plain(n): return n.replace("base_model.model.", "").replace(".default", "").replace(".weight", "")
    return {plain(n): p for n, p in model.named_parameters() if p.requires_grad}


def build(backend, dtype):
    core.set_seed(0)
    return first_values(add_adapters(LOAD[backend](dtype=dtype, device="cpu"), RANK, RANK).train())


def first_values(model):
    "The adapters' values, the same for every way, in float32."
    g = torch.Generator().manual_seed(1)
    for n, p in sorted(adapters(model).items()):   # B is not zero, or the gradients of A were
        scale = p.shape[1]**-.5 if n.endswith("lora_A") else .02
        p.data = torch.randn(p.shape, generator=g)*scale
    return model


def pull(model, levers):
    "The levers that `make_fast` and `cpu_pieces` pull together, or one of them."
    if set(levers) >= {"loss", "adapters", "norm", "attention"}:
        make_fast(model, compile=False)
        return cpu_pieces(model)   # if `make_fast` has done it already, this does it again
    if "loss" in levers:
        make_fast(model, compile=False)
        loss = model.step_loss
        make_plain(model)
        cpu_pieces_undo(model)
        model.step_loss = loss
    if "adapters" in levers: [fuse(m) for m in adapted_layers(model).values()]
    if {"norm", "attention"} & set(levers):
        cpu_pieces(model)
        if "attention" not in levers: model.get_decoder().config._attn_implementation = "sdpa"
        if "norm" not in levers:
            name = model.get_decoder().config._attn_implementation
            cpu_pieces_undo(model)
            model.get_decoder().config._attn_implementation = name


def trainer_of(way, dtype, examples, tokenizer):
    backend, levers = WAYS[way]
    model = build(backend, dtype)
    pull(model, levers)
    with quiet(): trainer = make_trainer(model, tokenizer, examples, tempfile.mkdtemp(), progress=False, max_steps=10**6,
                                         per_device_train_batch_size=BATCH, learning_rate=1e-5)
    first_values(model)   # again, since TRL has rounded those of PEFT to bfloat16
    trainer.guard = None
    trainer.args.optim = "adamw_torch_fused" if "optimizer" in levers else "adamw_torch"
    with quiet(): trainer.create_optimizer()
    return trainer


def step(trainer, batch):
    "What the trainer's loop does with one batch: the loss."
    n = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=n)
    torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], .3)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return loss.item()


class Dense(nn.Module):
    "A layer of ours with its adapter, unpacked, as the formula has it."
    def __init__(self, layer):
        super().__init__()
        self.W, self.bias = layer.base_layer.dequantize().float(), layer.base_layer.bias
        self.lora_A, self.lora_B, self.name = layer.lora_A, layer.lora_B, layer.active
        self.scale = layer.scaling[layer.active]
    def forward(self, x):
        A, B = self.lora_A[self.name].weight, self.lora_B[self.name].weight
        return nn.functional.linear(x, self.W, self.bias) + x @ A.T @ B.T*self.scale


def gradients(model, loss_of, batch):
    model.zero_grad()
    loss = loss_of(batch)
    loss.backward()
    found = {n: p.grad.float().flatten().clone() for n, p in adapters(model).items()}
    model.zero_grad()
    return loss.item(), found


def reference(batch):
    "Loss and adapters' gradients of the packed weights, unpacked: float32, eager attention, PyTorch's own operations."
    model = build("scratch", torch.float32)
    for name, layer in adapted_layers(model).items(): model.set_submodule(name, Dense(layer))
    model.config._attn_implementation = "eager"
    return gradients(model, lambda b: model(**b, use_cache=False).loss, batch)


def check(trainer, batch, want):
    model = trainer.model
    loss_of = getattr(model, "step_loss", None) or (lambda b: model(**b, use_cache=False).loss)
    loss, got = gradients(model, loss_of, batch)
    assert set(got) == set(want)
    cosines = [nn.functional.cosine_similarity(got[n], want[n], 0).item() for n in want]
    return loss, min(cosines), statistics.median(cosines)


def peak_mb(trainer, batch):
    "MB in use at the highest moment of a step, above those at its beginning, as PyTorch's profiler notes them."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: step(trainer, batch)
    with tempfile.TemporaryDirectory() as folder:
        prof.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    notes = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
    return (max(n for _, n in notes) - notes[0][1])/1e6


def quartiles(found): return statistics.quantiles(found, n=4, method="inclusive")


def hardware():
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    units = sorted({o for o in re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_bf16|asimd|bf16)\b", text)})
    return dict(cpu=name[1].strip() if name else platform.processor() or platform.machine(), units=units,
                cores=os.cpu_count(), threads=torch.get_num_threads())


def run(dtype, args, doc, save):
    tokenizer = load_tokenizer()
    examples = encode_rows(load_rows("tickets"), tokenizer)
    rng = random.Random(0)
    batches = [collate(rng.sample(list(examples), BATCH), tokenizer.pad_token_id) for _ in range(args.rounds)]
    few = {k: v[:2] for k, v in batches[0].items()}
    name = str(dtype).removeprefix("torch.")
    want_loss, want = reference(few)
    trainers, rows = {}, {}
    for way in args.ways:
        trainers[way] = trainer_of(way, dtype, examples, tokenizer)
        loss, cosine, middle = check(trainers[way], few, want)
        if dtype == torch.float32: assert cosine > .999 and abs(loss - want_loss) < 1e-3, (way, cosine, loss, want_loss)
        rows[way] = dict(peer=way, dtype=name, loss=loss, reference_loss=want_loss, adapters_cosine=cosine,
                         adapters_cosine_median=middle)
    for t in trainers.values(): step(t, batches[0])   # the first one is slow, and makes the optimizer's state
    if not args.no_memory:
        for way, t in trainers.items(): rows[way]["allocated_mb"] = peak_mb(t, batches[0])
    times = {way: [] for way in args.ways}
    for i in range(args.rounds):
        for way in rng.sample(args.ways, len(args.ways)):
            start = time.perf_counter()
            step(trainers[way], batches[i])
            times[way].append(1e3*(time.perf_counter() - start))
        print(f"{name}, round {i + 1} of {args.rounds}:", {k: round(v[-1]) for k, v in times.items()}, flush=True)
    for way, ms in times.items():
        low, mid, high = quartiles(ms)
        less, ratio, more = quartiles([a/b for a, b in zip(times["peft"], ms)])
        rows[way] |= dict(ms=mid, ms_low=low, ms_high=high, ratio_to_peft=ratio, ratio_low=less, ratio_high=more)
        print(json.dumps(rows[way]), flush=True)
    doc["rows"] = [r for r in doc["rows"] if r["dtype"] != name] + list(rows.values())
    doc["settings"]["tokens"] = [int(b["attention_mask"].sum()) for b in batches]
    doc["settings"]["padded_to"] = [b["input_ids"].shape[1] for b in batches]
    doc["settings"]["labels"] = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    save()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"])
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="`peft` has to be one of them")
    p.add_argument("--no-memory", action="store_true", help="leave out the step that counts bytes")
    args = p.parse_args()
    if "peft" not in args.ways or args.rounds < 2: p.error("ratios are to `peft`, and quartiles need two rounds")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    doc = json.loads(args.out.read_text()) if args.out.exists() else dict(rows=[])
    doc |= dict(hardware=hardware(), versions=core.versions(),
                settings=dict(model="SmolLM2-135M", rows=BATCH, rank=RANK, targets="all-linear", rounds=args.rounds))
    def save(): args.out.write_text(json.dumps(doc, indent=1) + "\n")
    for name in args.dtype: run(getattr(torch, name), args, doc, save)


if __name__ == "__main__": main()
