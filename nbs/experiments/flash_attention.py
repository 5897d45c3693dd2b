"""Packed documents on a GPU: FlashAttention on a single row beside PyTorch's attention with a document mask.

    python nbs/experiments/flash_attention.py nbs/results/flash_attention.json [--rounds 5]

FlashAttention's kernel is the one that PyTorch holds itself (`torch.nn.attention.varlen`), put where transformers would import
the package. The model has the shape of Llama 3.2 1B with random weights in 4 bits and adapters; a step is a forward and a
backward pass of 4 packs. Times are medians of rounds in turns, in one process.
"""
import argparse, json, statistics, tempfile, time
from pathlib import Path

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM, LlamaConfig
import transformers.modeling_flash_attention_utils as fa

from qlora_nb.base.core import set_seed, versions
from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.foundations.loading import load_model
from qlora_nb.training.document_mask import collate_packed, separate_documents


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, causal=False, softmax_scale=None):
    "FlashAttention on documents in one row, (tokens, heads, size), with the kernel of PyTorch."
    n = q.shape[1]//k.shape[1]
    k, v = (o.repeat_interleave(n, dim=1) for o in (k, v))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, window_size=window)


def whole(q, k, v, causal=False, softmax_scale=None, **kw):
    q, k, v = (o.transpose(1, 2) for o in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def put_kernel():
    "Let transformers find FlashAttention."
    made = (whole, varlen, None, None, None), (fa._lazy_define_process_function(varlen), dict)
    fa.lazy_import_flash_attention = lambda *a, **kw: made


def make_base(folder):
    "Llama 3.2 1B's shape with random weights."
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, tie_word_embeddings=True)
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_model(folder, attention):
    "That base in 4 bits, with adapters whose B is not zero, the same each time, and documents kept apart."
    model = load_model(folder, device="cuda", dtype=torch.bfloat16)
    set_seed(0)
    model = add_adapters(model)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.02)
    for m in (model, model.get_base_model()): m.config._attn_implementation_internal = attention   # from_pretrained asks for the package
    model = separate_documents(model)
    assert model.packs_in_one_row == (attention == "flash_attention_2"), attention
    return model


def packs_of(lengths, seed=0):
    "Packs of documents of these lengths, random ids, each token trained on."
    g = torch.Generator().manual_seed(seed)
    def doc(n):
        ids = torch.randint(3, 32000, (n,), generator=g).tolist()
        return dict(input_ids=ids, labels=list(ids))
    return [[doc(n) for n in row] for row in lengths]


def step(model, batch):
    loss = model(**batch).loss
    loss.backward()
    grads = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.item(), grads


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path), p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args()
    put_kernel()
    with tempfile.TemporaryDirectory() as folder:
        make_base(folder)
        models = {flat: make_model(folder, "flash_attention_2" if flat else "sdpa") for flat in (False, True)}
    rows = []
    for length, docs in ((2048, 16), (4096, 16), (8192, 16), (8192, 1)):
        packs = packs_of([[length//docs]*docs]*4)
        batches = {flat: {k: v.to("cuda") for k, v in collate_packed(packs, flat=flat).items()} for flat in (False, True)}
        got, times, peak = {}, {False: [], True: []}, {}
        for turn in range(a.rounds + 1):
            for flat in (False, True):
                torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                got[flat] = step(models[flat], batches[flat])
                torch.cuda.synchronize()
                if turn: times[flat].append(time.perf_counter() - start)
                peak[flat] = torch.cuda.max_memory_allocated()
        cosine = torch.nn.functional.cosine_similarity(got[False][1], got[True][1], dim=0).item()
        ratios = sorted(x/y for x, y in zip(times[False], times[True]))
        rows.append(dict(length=length, documents=docs, packs=4, loss_mask=got[False][0], loss_flash=got[True][0], cosine=cosine,
                         ms_mask=1e3*statistics.median(times[False]), ms_flash=1e3*statistics.median(times[True]),
                         ratio=statistics.median(ratios), ratio_low=ratios[0], ratio_high=ratios[-1],
                         gb_mask=peak[False]/1e9, gb_flash=peak[True]/1e9))
        print(json.dumps(rows[-1]), flush=True)
    a.out.write_text(json.dumps(dict(rows=rows, gpu=torch.cuda.get_device_name(), rounds=a.rounds, versions=versions()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
