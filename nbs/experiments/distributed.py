"""Tokens a second and peak memory of QLoRA on several GPUs of one host: one GPU, data parallel, a sharded base, and peers.

    python nbs/experiments/distributed.py --gpus 2                  # an 8B shape, all ways, into nbs/results/distributed.json
    python nbs/experiments/distributed.py --gpus 2 --shape 70b --ways sharded
    python nbs/experiments/distributed.py --gpus 2 --shape 32b --ways one sharded --card 24   # no process may take more GB than that
    python nbs/experiments/distributed.py --gpus 2 --losses         # SmolLM2 on the tickets, 50 steps: one process, and several
    python nbs/experiments/distributed.py --gpus 2 --losses --one-card   # the same where there is one GPU: processes share it, through gloo
    python nbs/experiments/distributed.py --cpu --gpus 2 --shape tiny --steps 2   # does the script run? measures nothing

The weights are random bytes, packed as ours are: no checkpoint is read. Each way is a set of fresh processes; each step is timed on
every rank, and the slowest rank's median counts. Ours run with `make_fast`, peers under autocast; nobody checkpoints unless told to.
Rows are added to the file as they are measured; a row of the same way, shape and number of GPUs is replaced.
"""
import argparse, json, statistics, time
from pathlib import Path

import torch
from torch import distributed as dist, nn

SHAPES = dict(tiny=dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
              **{"8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
                 "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064),
                 "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)})
WAYS = "one", "ddp", "sharded", "sharded, no prefetch", "peft", "peft ddp", "peft fsdp1"
ALONE = "one", "peft"   # on one GPU


def random_packed(m, dtype, device):
    "An `NF4Linear` of the size of a linear layer on the meta device: random codes, scales as of small weights."
    from qlora_nb.foundations.double_quantization import QuantizedTensor, quantize
    from qlora_nb.foundations.qlora import NF4Linear
    shape, n = m.weight.shape, m.weight.numel()
    like = quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0))*.02)   # for the parts that do not depend on the size
    def random_bytes(n): return torch.randint(0, 256, (n,), dtype=torch.uint8, device=device)
    scales = type(like.scales)(random_bytes(n//64), like.scales.absmax[:1].repeat(-(-n//(64*256))).to(device),
                               like.scales.offset.to(device), like.scales.code.to(device))
    return NF4Linear(QuantizedTensor(random_bytes(n//2), scales, shape, dtype, 64, "nf4"), dtype=dtype)


def build(shape, device, dtype, kind):
    "A Llama of this shape with adapters, the same on each rank."
    from transformers import AutoModelForCausalLM, LlamaConfig
    from qlora_nb.foundations.adapters import add_adapters
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, m in list(model.model.named_modules()):
        if not isinstance(m, nn.Linear): continue
        layer = random_packed(m, dtype, device)
        model.model.set_submodule(name, as_bnb(layer, dtype if kind == "fsdp1" else torch.uint8) if kind else layer)
    for m in list(model.modules()):
        for k, p in list(m._parameters.items()):
            if p is None or not p.is_meta: continue
            new = torch.ones(p.shape, dtype=dtype, device=device)
            m._parameters[k] = nn.Parameter(new if p.dim() == 1 else new.normal_(std=.02), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model = add_adapters(model, r=16).train().to(device)
    for name, p in model.named_parameters():
        if "lora_" in name: p.data = p.data.to(dtype if kind == "fsdp1" else torch.float32)   # FSDP1 wants one type
    return model


def as_bnb(layer, storage):
    "The same packed weight in a layer of bitsandbytes."
    import bitsandbytes as bnb
    data, state = layer.q.to_bnb()
    m = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=layer.dtype, quant_type="nf4", quant_storage=storage)
    m.weight = bnb.nn.Params4bit(data.view(-1).view(storage).view(-1, 1), requires_grad=False, quant_state=state, quant_type="nf4", quant_storage=storage,
                                 bnb_quantized=True, module=m)
    m.quant_state = state   # FSDP1 replaces the parameter, and this is what is left
    return m


def ready(way, model, device, n, checkpointing):
    "(What computes the loss of a batch, what is to be called before the optimizer's step, the sharded base or None)"
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel
    from qlora_nb.speed.data_parallel import average_gradients
    from qlora_nb.speed.fast_training import make_fast
    from qlora_nb.speed.sharded_base import shard_base
    base = shard_base(model, prefetch="no prefetch" not in way) if "sharded" in way else None
    if checkpointing and "peft" in way:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
    if "peft" not in way:
        if dist.get_rank() == 0: print(make_fast(model, memory=0. if checkpointing else 1.), flush=True)
        else: make_fast(model, memory=0. if checkpointing else 1.)
        mine = [p for p in model.parameters() if p.requires_grad]
        return (lambda batch: model.step_loss(batch)), (lambda: average_gradients(mine)) if n > 1 else (lambda: None), base
    cast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    if "fsdp1" in way:
        model = FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=False, device_id=device)
    elif n > 1: model = DistributedDataParallel(model, broadcast_buffers=False)
    def loss(batch):
        with cast: return model(**batch, use_cache=False).loss
    loss.model = model   # FSDP has other parameters
    return loss, lambda: None, None


def measure(way, shape, rows, length, steps, cpu, card, checkpointing):
    rank, n = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if cpu else torch.device("cuda", rank)
    dtype = torch.float32 if cpu else torch.bfloat16
    begin = time.perf_counter()
    model = build(shape, device, dtype, "fsdp1" if "fsdp1" in way else "bnb"*("peft" in way))
    loss_of, average, base = ready(way, model, device, n, checkpointing)
    if not cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if card: torch.cuda.set_per_process_memory_fraction(card*1e9/torch.cuda.get_device_properties(rank).total_memory)
    built = time.perf_counter() - begin
    mine = [p for p in getattr(loss_of, "model", model).parameters() if p.requires_grad]
    opt, times, losses = torch.optim.AdamW(mine, 1e-4, fused=not cpu), [], []
    draw = torch.Generator().manual_seed(rank)
    def now():
        if not cpu: torch.cuda.synchronize()
        return time.perf_counter()
    for _ in range(steps + 4):
        ids = torch.randint(0, SHAPES[shape]["vocab_size"], (rows, length), generator=draw).to(device)
        dist.barrier()
        start = now()
        loss = loss_of(dict(input_ids=ids, labels=ids))
        opt.zero_grad(), loss.backward()
        average()
        opt.step()
        times.append(now() - start)
        losses.append(loss.item())
    got = dict(step_s=statistics.median(times[4:]), steps_s=times[4:], losses=losses, build_s=built, first_s=times[:4],
               peak_gb=None if cpu else torch.cuda.max_memory_allocated()/1e9)
    if base: got |= dict(piece_gb=sum(o.nbytes for o in base.pieces)/1e9, rooms_gb=sum(o.nbytes for o in base.rooms)/1e9,
                         gathers=base.gathers, waits=base.waits)
    return got


def real_losses(n, steps, cpu, fast, one_card=False):
    "The losses that `finetune` logs: the tickets, SmolLM2 in 4 bits, 16 rows a step on any number of processes."
    from qlora_nb.training import tickets
    from qlora_nb.training.finetune import finetune
    import os, tempfile
    if one_card: os.environ["LOCAL_RANK"] = "0"
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    begin = time.perf_counter()
    done = finetune(None, tickets.make_tickets("train", 800), f"{folder[0]}/run", max_steps=steps, per_device_train_batch_size=4,
                    gradient_accumulation_steps=4//n, learning_rate=2e-3, progress=False, fast=fast,
                    device="cpu" if cpu else None)
    return done.info["losses"], time.perf_counter() - begin


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--shape", default="8b", choices=SHAPES)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--card", type=float, help="GB that each process may take of its GPU")
    p.add_argument("--checkpointing", action="store_true", help="keep each layer's input alone, and compute the rest again")
    p.add_argument("--losses", action="store_true", help="real data on one process and on --gpus of them, with and without `fast`")
    p.add_argument("--one-card", action="store_true", help="with --losses: all processes on the first GPU, through gloo")
    p.add_argument("--cpu", action="store_true", help="gloo on the CPU: to see that it runs")
    p.add_argument("--limit", type=float, default=580., help="seconds for each way")
    p.add_argument("--out", type=Path, default=Path(__file__).parent.parent/"results"/"distributed.json")
    o = p.parse_args()
    from qlora_nb.base.core import versions
    from qlora_nb.base.ranks import on_ranks
    doc = json.loads(o.out.read_text(encoding="utf-8")) if o.out.exists() else dict(ways=[], losses=[])
    how = dict(timeout=o.limit, backend="gloo" if o.cpu or o.one_card else "nccl")
    def keep(kind, row, *keys):
        doc[kind] = [r for r in doc[kind] if any(r[k] != row[k] for k in keys)] + [row]
        doc["versions"] = versions()
        if not o.cpu: o.out.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({k: v for k, v in row.items() if k != "ranks"})[:1500], flush=True)
    def tried(f, *args):   # out of memory is a result as well
        try: return f(*args)
        except Exception as e: return str(e)[-600:]
    for n, fast in [(n, fast) for fast in (False, True) for n in (1, o.gpus)]*o.losses:
        got = tried(lambda: on_ranks(n, real_losses, n, o.steps, o.cpu, fast, o.one_card, **how))
        row = dict(failed=got) if isinstance(got, str) else dict(losses=got[0][0], seconds=got[0][1])
        keep("losses", dict(processes=n, gpus=1 if o.one_card else n, fast=fast, steps=o.steps) | row, "processes", "gpus", "fast")
    for way in [] if o.losses else o.ways:
        n, length = 1 if way in ALONE else o.gpus, min(o.length, 64) if o.cpu else o.length
        got = tried(lambda: on_ranks(n, measure, way, o.shape, o.rows, length, o.steps, o.cpu, o.card, o.checkpointing, **how))
        row = dict(way=way, shape=o.shape, gpus=n, rows=o.rows, length=length, card=o.card, checkpointing=o.checkpointing)
        if isinstance(got, str): row |= dict(failed=got)
        else: row |= dict(tokens_per_s=n*o.rows*length/max(r["step_s"] for r in got), peak_gb=[r["peak_gb"] for r in got], ranks=got)
        keep("ways", row, "way", "shape", "gpus", "card", "checkpointing")


if __name__ == "__main__": main()
