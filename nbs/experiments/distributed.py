"""Tokens a second and peak memory of QLoRA on several GPUs of one host: one GPU, data parallel, a sharded base, and peers.

    python nbs/experiments/distributed.py --gpus 2                  # an 8B shape, all ways, into nbs/results/distributed.json
    python nbs/experiments/distributed.py --gpus 4 --shape 70b --ways sharded
    python nbs/experiments/distributed.py --cpu --gpus 2 --shape tiny --steps 2   # does the script run? measures nothing

The weights are random bytes, packed as ours are: no checkpoint is read. Each way is a set of fresh processes; each step is timed on
every rank, and the slowest rank's median counts. Not run on GPUs yet.
"""
import argparse, json, statistics, time
from pathlib import Path

import torch
from torch import distributed as dist, nn

SHAPES = dict(tiny=dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
              **{"8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
                 "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064),
                 "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)})
WAYS = "one", "ddp", "sharded", "sharded, no prefetch", "peft", "peft ddp"


def random_packed(m, dtype):
    "An `NF4Linear` of the size of a linear layer on the meta device: random codes, scales as of small weights."
    from qlora_nb.foundations.double_quantization import QuantizedTensor, quantize
    from qlora_nb.foundations.qlora import NF4Linear
    shape, n = m.weight.shape, m.weight.numel()
    like = quantize(torch.randn(64, 256)*.02)   # for the parts that do not depend on the size
    scales = type(like.scales)(torch.randint(0, 256, (n//64,), dtype=torch.uint8), like.scales.absmax[:1].repeat(-(-n//(64*256))),
                               like.scales.offset, like.scales.code)
    packed = torch.randint(0, 256, (n//2,), dtype=torch.uint8)
    return NF4Linear(QuantizedTensor(packed, scales, shape, dtype, 64, "nf4"), dtype=dtype)


def build(shape, device, dtype, shards=None, bnb=False):
    "A Llama of this shape with adapters; block by block, so that with `shards` no device holds more than it keeps."
    from transformers import AutoModelForCausalLM, LlamaConfig
    from qlora_nb.foundations.adapters import add_adapters
    torch.manual_seed(0)   # the same bytes on each rank
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, m in list(model.model.named_modules()):
        if not isinstance(m, nn.Linear): continue
        layer = random_packed(m, dtype)
        model.model.set_submodule(name, as_bnb(layer) if bnb else layer)
    for m in list(model.modules()):
        for k, p in list(m._parameters.items()):
            if p is None or not p.is_meta: continue
            new = torch.ones(p.shape, dtype=dtype) if p.dim() == 1 else torch.randn(p.shape, dtype=dtype)*.02
            m._parameters[k] = nn.Parameter(new, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model = add_adapters(model, r=16).train()
    for name, p in model.named_parameters():
        if "lora_" in name: p.data = p.data.float()
    if shards is None: return model.to(device), None
    from qlora_nb.speed.sharded_base import shard_base
    return model, shard_base(model, device, **shards)


def as_bnb(layer):
    "The same packed weight in a layer of bitsandbytes."
    import bitsandbytes as bnb
    data, state = layer.q.to_bnb()
    m = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=layer.dtype, quant_type="nf4")
    m.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=m)
    return m


def measure(way, shape, rows, length, steps, cpu):
    from functools import partial
    from torch.nn.parallel import DistributedDataParallel
    from qlora_nb.speed.data_parallel import called_through
    from qlora_nb.speed.fast_training import fast_loss
    rank, n = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cpu") if cpu else torch.device("cuda", rank)
    dtype = torch.float32 if cpu else torch.bfloat16
    shards = dict(prefetch="no prefetch" not in way) if "sharded" in way else None
    model, base = build(shape, device, dtype, shards, "peft" in way)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.enable_input_require_grads()
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if n > 1 else model
    mine = [p for p in model.parameters() if p.requires_grad]
    opt, times = torch.optim.AdamW(mine, 1e-4), []
    draw = torch.Generator().manual_seed(rank)
    def now():
        if not cpu: torch.cuda.synchronize()
        return time.perf_counter()
    for _ in range(steps + 3):
        ids = torch.randint(0, SHAPES[shape]["vocab_size"], (rows, length), generator=draw).to(device)
        if n > 1: dist.barrier()
        start = now()
        batch = dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
        own = partial(model, **batch) if "peft" in way else partial(fast_loss, model, batch)
        loss = called_through(ddp, model, own)
        loss = getattr(loss, "loss", loss)   # peers compute all logits
        opt.zero_grad(), loss.backward()
        opt.step()
        times.append(now() - start)
    got = dict(step_s=statistics.median(times[3:]), steps_s=times[3:], loss=loss.item(),
               peak_gb=None if cpu else torch.cuda.max_memory_allocated()/1e9)
    if base: got |= dict(piece_gb=sum(o.nbytes for o in base.pieces)/1e9, gathers=base.gathers, waits=base.waits)
    return got


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--shape", default="8b", choices=SHAPES)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--cpu", action="store_true", help="gloo on the CPU: to see that it runs")
    p.add_argument("--out", type=Path, default=Path(__file__).parent.parent/"results"/"distributed.json")
    o = p.parse_args()
    from qlora_nb.base.core import versions
    from qlora_nb.base.ranks import on_ranks
    length, found = min(o.length, 64) if o.cpu else o.length, []
    for way in o.ways:
        n = 1 if way in ("one", "peft") else o.gpus
        try: ranks = on_ranks(n, measure, way, o.shape, o.rows, length, o.steps, o.cpu, timeout=580., backend="gloo" if o.cpu else "nccl")
        except Exception as e:   # out of memory is a result as well
            found.append(dict(way=way, gpus=n, failed=str(e)[:500]))
            print(json.dumps(found[-1]), flush=True)
            continue
        slowest = max(r["step_s"] for r in ranks)
        found.append(dict(way=way, gpus=n, tokens_per_s=n*o.rows*length/slowest, ranks=ranks))
        print(json.dumps({k: v for k, v in found[-1].items() if k != "ranks"} | dict(peak_gb=[r["peak_gb"] for r in ranks])), flush=True)
    if o.cpu: return
    o.out.write_text(json.dumps(dict(shape=o.shape, rows=o.rows, length=length, ways=found, versions=versions()), indent=1), encoding="utf-8")


if __name__ == "__main__": main()
