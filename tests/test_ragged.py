"Matrices whose rows end within a block of 64 weights: read rightly on every processor, by both backends, in experts too."
import copy

import bitsandbytes.functional as F
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from qlora_nb.base.core import set_seed
from qlora_nb.foundations.adapters import BACKENDS
from qlora_nb.base.nf4_config import ragged_error
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.expert_weights import stacks_of

SIZES = dict(vocab_size=160, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3)
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request, tmp_path_factory):
    cfg = LlamaConfig(**SIZES) if request.param == "dense" else MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    out = tmp_path_factory.mktemp(request.param)
    set_seed(0)
    with quiet(): AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).save_pretrained(out)
    return out


def block_by_block(codes, state):
    "By the definition: weight number i belongs to scale number i // 64."
    n = state.shape.numel()
    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = codes.flatten()
    places = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[:n].long()
    return state.code[places]*absmax.repeat_interleave(64)[:n]


def in_numbers(model, wide):
    "`wide`, with each weight that is in 4 bits in `model` replaced by what its codes and scales mean."
    wide, put = copy.deepcopy(wide), 0
    for n, m in model.named_modules():
        if getattr(getattr(m, "weight", None), "quant_state", None) is not None:
            wide.get_submodule(n).weight.data = block_by_block(m.weight.data, m.weight.quant_state).view(wide.get_submodule(n).weight.shape)
            put += 1
        for (stack, codes), k in zip(stacks_of(m), getattr(m, "parametrizations", ())):
            p = getattr(wide.get_submodule(n), k)
            p.data, put = block_by_block(codes.data, stack.state).view(p.shape), put + 1
    assert put >= 12, put
    return wide


def outcome(model):
    emb = model.get_input_embeddings()(IDS).detach().requires_grad_()
    y = model(inputs_embeds=emb).logits
    y.square().mean().backward()
    return y.detach(), emb.grad


def near(a, b): return ((a - b).norm()/b.norm()).item() < 1e-5


def test_both_backends_compute_what_their_codes_mean(folder):
    "In training and in evaluation, logits and gradients; and no weight is far from what it was."
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = (BACKENDS[b](folder, device="cpu", dtype=torch.float32) for b in ("scratch", "bnb"))
    want = outcome(in_numbers(theirs, wide))
    assert all(near(a, b) for a, b in zip(outcome(theirs), want))
    with torch.no_grad(): assert near(theirs(input_ids=IDS).logits, want[0])
    assert all(near(a, b) for a, b in zip(outcome(ours), want))
    assert ragged_error() == 0


def test_a_model_that_transformers_loaded(folder):
    from qlora_nb.base.nf4_config import nf4_config
    from qlora_nb.foundations.loading import disable_cpu_repacking
    if "MixtralForCausalLM" in (folder/"config.json").read_text(encoding="utf-8"): return   # its experts would stay wide
    with quiet(): theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4_config(torch.float32), dtype=torch.float32, device_map="cpu")
    wide = in_numbers(theirs, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert near(outcome(disable_cpu_repacking(theirs))[0], outcome(wide)[0])
