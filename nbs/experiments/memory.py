"""Memory of training steps, measured on a CUDA device and predicted without one.

    python nbs/experiments/memory.py measure measured.json                            # on the GPU
    python nbs/experiments/memory.py predict measured.json nbs/results/memory.json    # anywhere

Random weights of the shapes below, stored by bitsandbytes in NF4 with double quantization, adapters of PEFT in
float32, autocast to bfloat16. The first command writes down what `torch.cuda` says, and the smallest limit on the
process's memory, as a multiple of that peak, under which the step still runs. The second adds what `qlora_nb.memory.planner`
says about the same settings. `nbs/3_memory/37_planner.ipynb` compares.
"""
import gc, importlib.metadata, json, sys

import torch
from torch import nn
import bitsandbytes as bnb
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config

SHAPES = {
    "SmolLM2-135M": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "Llama-3.2-1B": LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "Llama-3-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=8),
    "falcon-rw-1b": FalconConfig(vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
                                 alibi=True, bias=True, multi_query=False, parallel_attn=False,
                                 new_decoder_architecture=False, hidden_dropout=0., attention_dropout=0.),
    "Qwen2.5-0.5B": Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-7B": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                              num_attention_heads=28, num_key_value_heads=4),
    "pythia-1.4b": GPTNeoXConfig(vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                                 num_attention_heads=16, hidden_dropout=0., attention_dropout=0.),
}
# shape, batch, seq, checkpointing, rank, targets, optimizer, loss, method
ROWS = [
    ("SmolLM2-135M", 4, 512, False, 16, "all-linear", "adamw", "full", "qlora"),
    ("SmolLM2-135M", 8, 1024, True, 64, "all-linear", "adamw", "full", "qlora"),
    ("SmolLM2-135M", 8, 1024, False, 16, "all-linear", "adamw", "chunked", "qlora"),
    ("Llama-3.2-1B", 1, 2048, False, 16, "all-linear", "adamw", "full", "qlora"),
    ("Llama-3.2-1B", 4, 2048, True, 16, "all-linear", "adamw_8bit", "full", "qlora"),
    ("Llama-3.2-1B", 4, 1024, False, 64, "all-linear", "adamw", "chunked", "qlora"),
    ("Llama-3-8B", 1, 1024, True, 16, "all-linear", "paged_adamw_8bit", "full", "qlora"),
    ("Llama-3-8B", 2, 2048, True, 16, "all-linear", "adamw", "full", "qlora"),
    ("Llama-3-8B", 2, 2048, True, 16, "all-linear", "adamw", "chunked", "qlora"),
    ("Llama-3-8B", 1, 2048, False, 64, "all-linear", "adamw", "full", "qlora"),
    ("falcon-rw-1b", 2, 512, False, 8, ["query_key_value"], "adamw", "full", "qlora"),
    ("falcon-rw-1b", 2, 1024, False, 16, "all-linear", "adamw", "full", "qlora"),
    ("falcon-rw-1b", 4, 1024, True, 16, "all-linear", "adamw_8bit", "chunked", "qlora"),
    ("Qwen2.5-0.5B", 4, 1024, False, 16, "all-linear", "adamw", "full", "qlora"),
    ("Qwen2.5-7B", 2, 2048, True, 32, "all-linear", "adamw_8bit", "full", "qlora"),
    ("Qwen2.5-7B", 1, 1024, False, 16, "all-linear", "adamw", "chunked", "qlora"),
    ("pythia-1.4b", 2, 1024, False, 16, "all-linear", "adamw", "full", "qlora"),
    ("pythia-1.4b", 4, 2048, True, 16, "all-linear", "adamw", "chunked", "qlora"),
    ("SmolLM2-135M", 4, 512, False, 16, "all-linear", "adamw", "full", "lora"),
    ("SmolLM2-135M", 4, 512, False, 16, "all-linear", "adamw", "full", "full"),
    ("Llama-3.2-1B", 2, 1024, True, 16, "all-linear", "adamw", "full", "lora"),
    ("Llama-3.2-1B", 2, 1024, True, 16, "all-linear", "adamw", "full", "full"),
]
LIMITED = [ROWS[i] for i in (0, 3, 8, 11)]   # rows that are run again under limits
NAMES = "shape batch seq checkpointing rank targets optimizer loss method".split()
OPTIMIZERS = dict(adamw=lambda ps: torch.optim.AdamW(ps, lr=1e-4, foreach=True),
                  adamw_8bit=lambda ps: bnb.optim.AdamW8bit(ps, lr=1e-4),
                  paged_adamw_8bit=lambda ps: bnb.optim.PagedAdamW8bit(ps, lr=1e-4))


def build(cfg, method):
    "The base as `load_model` stores it, with random weights; layer by layer, so that 8B fits easily."
    dtype = torch.float32 if method == "full" else torch.bfloat16
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(cfg, dtype=dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    if method != "qlora": return model
    for name, m in list(model.named_modules()):
        if not isinstance(m, nn.Linear) or m is head: continue
        new = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=m.bias is not None, compute_dtype=torch.bfloat16,
                                quant_type="nf4", compress_statistics=True, device="meta")
        new.weight = bnb.nn.Params4bit(m.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                                          compress_statistics=True)
        if m.bias is not None: new.bias = nn.Parameter(m.bias.data, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cuda"))
        m.weight = None
    model.is_loaded_in_4bit = True   # PEFT asks for this
    return model


def measure(shape, batch, seq, checkpointing, rank, targets, optimizer, loss, method, limit=1.):
    "Three steps within a share of the card; the peak is that of the last two, when the optimizer has its states."
    gc.collect(), torch.cuda.empty_cache(), torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    model = build(SHAPES[shape], method)
    if loss == "chunked":
        from trl.trainer.utils import add_fused_lm_head
        add_fused_lm_head(model)
    gc.collect(), torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit)
    out = dict(weights=torch.cuda.memory_allocated() - start)
    if method != "full":
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
        for p in model.parameters():
            if p.requires_grad: p.data = p.data.float()
    out["adapters"] = torch.cuda.memory_allocated() - start - out["weights"]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        if method != "full": model.enable_input_require_grads()
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = OPTIMIZERS[optimizer](params)
    ids = torch.randint(0, 1000, (batch, seq), device="cuda")
    for step in range(3):
        if step == 1: out["states"] = torch.cuda.memory_allocated() - start - out["weights"] - out["adapters"]
        if step: torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if loss == "full": l = model(input_ids=ids, labels=ids, use_cache=False).loss
            else: l = -model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).log_probs.sum()/ids.numel()
        out["after_forward"] = torch.cuda.memory_allocated() - start
        out["peak_forward"] = torch.cuda.max_memory_allocated() - start
        l.backward()
        out["peak_backward"] = torch.cuda.max_memory_allocated() - start
        del l
        torch.nn.utils.clip_grad_norm_(params, 1.)
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return out | dict(peak=torch.cuda.max_memory_allocated() - start, reserved=torch.cuda.max_memory_reserved(),
                      context=total - free - torch.cuda.memory_reserved())


def tightest(row, peak):
    "The smallest of a few limits, as multiples of `peak`, under which the same step runs."
    total = torch.cuda.get_device_properties(0).total_memory
    for share in (1.01, 1.03, 1.06, 1.1, 1.15, 1.25):
        gc.collect(), torch.cuda.empty_cache()
        try: return measure(*row, limit=(torch.cuda.memory_reserved() + share*peak)/total) and share
        except torch.cuda.OutOfMemoryError: pass
        finally: torch.cuda.set_per_process_memory_fraction(1.)


def version(o):
    try: return importlib.metadata.version(o)
    except importlib.metadata.PackageNotFoundError: return None


def measure_all(out):
    "Each row in turn; what is done is written at once."
    libs = "torch transformers peft bitsandbytes trl".split()
    res = dict(hardware=torch.cuda.get_device_name(), versions={o: version(o) for o in libs}, rows=[])
    torch.nn.functional.linear(torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda"))  # cuBLAS's workspace
    res["workspace"] = torch.cuda.memory_allocated()
    for row in ROWS:
        torch.cuda.reset_peak_memory_stats()
        got = measure(*row)
        if row in LIMITED: got["runs_within"] = tightest(row, got["peak"])
        res["rows"].append(dict(zip(NAMES, row)) | got)
        print(json.dumps(res["rows"][-1]), flush=True)
        json.dump(res, open(out, "w", encoding="utf-8"), indent=1)


def predict_all(measured, out):
    "Put a plan beside each row."
    from qlora_nb.memory.planner import plan
    res = json.load(open(measured, encoding="utf-8"))
    for r in res["rows"]:
        p = plan(SHAPES[r["shape"]], r["batch"], r["seq"], r["method"], r["rank"], r["targets"], r["checkpointing"],
                 r["optimizer"], r["loss"])
        weights = sum(v for k, v in p.parts.items() if "weights" in k or k == "scales")
        r |= dict(weights_predicted_gb=weights/1e9, weights_measured_gb=r["weights"]/1e9,
                  peak_predicted_gb=p.peak/1e9, peak_measured_gb=r["peak"]/1e9, when=p.when)
    json.dump(res, open(out, "w", encoding="utf-8"), indent=1)


if __name__ == "__main__": dict(measure=measure_all, predict=predict_all)[sys.argv[1]](*sys.argv[2:])
