"""What is each lever of `86_step_times` worth? One model, one process, lever after lever. CUDA, or a tiny model on a CPU.

    python benchmarks/step.py --make --models /dev/shm/models --shapes llama-3-8b
    python benchmarks/levers.py benchmarks/results/levers.json --models /dev/shm/models [--shape llama-3-8b] [--rounds 3]
    python benchmarks/levers.py benchmarks/results/offload.json --models /dev/shm/models --set offload

A row is a way to take the step, with all levers of the rows before it: median and quartiles of its time over the rounds,
peak memory, and how far its gradients are from those of the same packed weights in float32 (`--check`, fewer layers).
"""
import argparse, contextlib, copy, gc, json, statistics, time
from pathlib import Path

import torch
from step import SHAPES, gpu_ms, load, lora, near_gpu, peaks, reset_peaks

WAYS = [("PEFT + bitsandbytes", {}), ("chunked loss", dict(loss=True)), ("fused function", dict(loss=True, fuse=False)),
        ("adapter folded in", dict(loss=True, fuse=True)), ("layers compiled", dict(memory=1., cuda_graphs=False)),
        ("CUDA graphs", dict(memory=1.)), ("memory 0.85", dict(memory=.85)),
        ("memory 0.5", dict(memory=.5)), ("memory 0.2", dict(memory=.2)), ("memory 0", dict(memory=0.)),
        ("inputs offloaded", dict(memory=0., offload=True))]
OFFLOAD = [(f"memory {m:g}", dict(memory=m, offload=True)) for m in (0., .1, .2, .25, .3, .4, .5)]


def prepare(model, loss=False, fuse=None, **how):
    "Put `model` into a way to train, from whatever it was before: a function of the token ids that returns the loss."
    from qlora_nb.speed import fast_training as fast
    from qlora_nb.speed import fused
    fast.make_plain(model)
    cuda = model.device.type == "cuda"
    if "memory" in how: fast.make_fast(model, compile="inductor" if cuda else "aot_eager_decomp_partition", **how)
    if fuse is not None:
        for m in fast.adapted_layers(model).values(): fused.fuse(m, fold=fuse)
    def cast(): return torch.autocast(model.device.type, dtype=model.get_input_embeddings().weight.dtype)
    def usual(ids):
        with cast(): return model(input_ids=ids, labels=ids).loss
    def tiles(ids):
        if "memory" in how: return model.step_loss(dict(input_ids=ids, labels=ids))
        with cast() if fuse is None else contextlib.nullcontext():
            return fast.fast_loss(model, dict(input_ids=ids, labels=ids))
    return tiles if loss or "memory" in how else usual


def measure(model, loss_of, ids, steps):
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=2e-4, fused=True)
    cuda, times = model.device.type == "cuda", []
    reset_peaks(cuda)   # and not later: the memory of a recording counts while it is made
    start = time.perf_counter()
    for i in range(steps + 4):
        if i == 4: warm = time.perf_counter() - start
        if cuda: torch.cuda.synchronize()
        t = time.perf_counter()
        loss = loss_of(ids)
        loss.backward()
        opt.step(), opt.zero_grad(set_to_none=True)
        if cuda: torch.cuda.synchronize()
        times.append(1e3*(time.perf_counter() - t))
    return dict(ms=times[4:], loss=loss.item(), warmup_s=warm, **peaks(cuda))


def gradients(model, loss_of, ids):
    model.zero_grad()
    loss = loss_of(ids)
    scale = 2.**14 if model.get_input_embeddings().weight.dtype == torch.float16 else 1.   # as a loss scaler would
    (loss*scale).backward()
    found = {n: p.grad.float()/scale for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def in_float32(model):
    "A copy whose frozen weights are the same packed bytes, dequantized, and which computes in float32."
    import bitsandbytes as bnb
    exact = copy.deepcopy(model)
    for m in list(exact.modules()):
        if not hasattr(m, "base_layer"): continue
        w = m.base_layer.weight
        state = copy.copy(w.quant_state)
        state.dtype = torch.float32
        new = torch.nn.Linear(*reversed(state.shape), bias=False, device=w.device).requires_grad_(False)
        new.weight.data = bnb.functional.dequantize_4bit(w.data, state)
        new.bias, m.base_layer = m.base_layer.bias, new
        a, b = m.lora_A["default"], m.lora_B["default"]
        m.forward = lambda x, m=m, a=a, b=b: m.base_layer(x) + b(a(x))*m.scaling["default"]
    return exact.float()


def link(nbytes=2**28, times=5):
    "GB/s of a copy to pinned memory of the host, and back, with nothing beside it."
    near_gpu()
    here, there = torch.empty(nbytes, dtype=torch.uint8, device="cuda"), torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    def rate(a, b): return nbytes/statistics.median(gpu_ms(lambda: a.copy_(b, non_blocking=True)) for _ in range(times))/1e6
    return dict(hardware=torch.cuda.get_device_name(), gb_per_s=dict(to_host=rate(there, here), to_gpu=rate(here, there)))


def main():
    from peft import get_peft_model
    from qlora_nb.base.core import set_seed, versions
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--models", type=Path, default=Path("/dev/shm/models"))
    ap.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    ap.add_argument("--set", default="levers", choices=["levers", "offload", "link"],
                    help="how much to keep on the host, instead; or only how fast the link to it is, into the file that is there")
    ap.add_argument("--check", action="store_true", help="gradients instead of times, with the first two layers")
    ap.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="with --check")
    for name, default in dict(batch=2, seq=2048, rounds=2, steps=6).items():
        ap.add_argument(f"--{name}", type=int, default=default)
    args = ap.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.set == "link":
        doc = json.loads(args.out.read_text()) | dict(link=link())
        args.out.write_text(json.dumps(doc, indent=1) + "\n")
        return print(doc["link"])
    job = dict(shape=args.shape, folder=str((args.models/args.shape).resolve()), device=device)
    model = load(job)
    if args.check:
        blocks = max((m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        del blocks[2:]
        model.config.num_hidden_layers = 2
    set_seed(0)
    model = get_peft_model(model, lora(job)).train()
    dtype = getattr(torch, args.dtype)
    for n, p in model.named_parameters():
        if "lora_" in n: p.data = torch.randn_like(p)*.005 if "lora_B" in n else p.data.float()
        elif args.check and p.is_floating_point(): p.data = p.data.to(dtype)
    if args.check:
        for m in model.modules():
            if hasattr(m, "compute_dtype"): m.compute_dtype, m.weight.quant_state.dtype = dtype, dtype
    ids = torch.randint(0, 32000, (args.batch, args.seq), generator=torch.Generator().manual_seed(0)).to(device)
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "models")}
    doc = dict(hardware=hardware, versions=versions(), settings=settings, rows=[])
    if args.set == "offload": doc["link"] = link()
    found = {}
    if args.check:
        exact = in_float32(model)
        loss, want = gradients(exact, lambda ids: exact(input_ids=ids, labels=ids).loss, ids)
        del exact
        doc["float32_loss"] = loss
    for round in range(1 if args.check else args.rounds):
        for name, how in OFFLOAD if args.set == "offload" else WAYS:
            gc.collect(), torch.cuda.empty_cache()
            try:
                loss_of = prepare(model, **how)
                if args.check:
                    for _ in range(3): loss, got = gradients(model, loss_of, ids)   # the third time, layers are replayed
                    def alike(a, b): return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()
                    cos = sorted(alike(got[n], want[n]) for n in want)
                    row = dict(loss=loss, cosine_min=cos[0], cosine_median=cos[len(cos)//2], adapters=len(cos))
                else:
                    r = measure(model, loss_of, ids, args.steps)
                    found.setdefault(name, []).extend(r.pop("ms"))
                    low, mid, high = statistics.quantiles(found[name], n=4, method="inclusive")
                    row = r | dict(step_ms=mid, step_ms_low=low, step_ms_high=high)
                    if host := getattr(model, "host_memory", None):
                        row |= dict(memory=how["memory"], host_gb=sum(t.nbytes for o in host.buffers.values() for t in o)/1e9)
            except Exception as e: row = dict(error=f"{type(e).__name__}: {str(e)[:200]}")
            row = dict(way=name) | row
            doc["rows"] = [o for o in doc["rows"] if o["way"] != name] + [row]
            args.out.write_text(json.dumps(doc, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__": main()
