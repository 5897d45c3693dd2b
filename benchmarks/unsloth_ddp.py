"""Unsloth on one GPU, and under DDP on several of one host: tokens a second and peak memory of an 8B shape, as in
`nbs/experiments/distributed.py`. It wants its own packages (PYTHONPATH), and reads a checkpoint of random weights that it writes first.

    python benchmarks/unsloth_ddp.py make FOLDER TOKENIZER_FOLDER
    python benchmarks/unsloth_ddp.py run FOLDER OUT.json [--rows 2] [--length 2048] [--steps 16]
    torchrun --nproc-per-node 2 benchmarks/unsloth_ddp.py run FOLDER OUT.json
"""
import argparse, json, os, statistics, time

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def make(folder, tokenizer):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    with torch.device("cuda"): model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128256, max_position_embeddings=8192, dtype="bfloat16"))
    model.save_pretrained(folder, max_shard_size="2GB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def run(folder, out, rows, length, steps):
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    rank, n = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    from unsloth import FastLanguageModel   # first: it changes the others
    import bitsandbytes, peft, torch, transformers, trl, unsloth
    from torch import distributed as dist
    torch.cuda.set_device(rank)
    if n > 1: dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16, device_map={"": rank})
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing=False,
                                             target_modules=TARGETS)
    model = FastLanguageModel.for_training(model) or model
    mine = [p for p in model.parameters() if p.requires_grad]
    net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank], broadcast_buffers=False) if n > 1 else model
    opt, draw, times, losses = torch.optim.AdamW(mine, lr=1e-4, fused=True), torch.Generator().manual_seed(rank), [], []
    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 4):
        ids = torch.randint(0, 128256, (rows, length), generator=draw).cuda()
        if n > 1: dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16): loss = net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        opt.zero_grad(), loss.backward(), opt.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start), losses.append(loss.item())
    got = dict(step_s=statistics.median(times[4:]), steps_s=times[4:], peak_gb=torch.cuda.max_memory_allocated()/1e9, losses=losses)
    ranks = [None]*n
    if n > 1: dist.all_gather_object(ranks, got)
    else: ranks = [got]
    doc = dict(gpus=n, ranks=ranks, tokens_per_s=n*rows*length/max(o["step_s"] for o in ranks),
               versions={o.__name__: o.__version__ for o in (torch, unsloth, transformers, trl, peft, bitsandbytes)})
    if rank == 0:
        with open(out, "w", encoding="utf-8") as f: json.dump(doc, f, indent=1)
        print(n, doc["tokens_per_s"], [o["peak_gb"] for o in ranks], flush=True)
    if n > 1: dist.destroy_process_group()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["make", "run"]), p.add_argument("folder"), p.add_argument("other", help="tokenizer, or where results go")
    p.add_argument("--rows", type=int, default=2), p.add_argument("--length", type=int, default=2048), p.add_argument("--steps", type=int, default=16)
    a = p.parse_args()
    if a.what == "make": make(a.folder, a.other)
    else: run(a.folder, a.other, a.rows, a.length, a.steps)
