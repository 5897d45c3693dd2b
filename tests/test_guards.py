"What is changed after `make_fast` is noticed when the model is called: the same gradients as without it, and a word about it."
import warnings

import pytest, torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig

from qlora_nb.foundations.adapters import BACKENDS, add_adapters
from qlora_nb.base.core import set_seed
from qlora_nb.speed.cuda_graphs import decoder_layers
from qlora_nb.speed.fast_training import fast_loss, make_fast, make_plain
from qlora_nb.speed.fused import adapted_layers
from qlora_nb.foundations.lora import LoRA
from qlora_nb.foundations.lora_model import set_adapter
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.foundations.qlora import quantize_model

IDS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
BATCH = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS.masked_fill(torch.arange(14) < 6, -100))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    with quiet(): tiny_model("llama", vocab_size=96, hidden_size=64).save_pretrained(out)
    return out


def adapted(folder, backend="bnb"):
    set_seed(0)
    model = load_model(folder, bits=4 if backend == "bnb" else None, device="cpu", dtype=torch.float32)
    if backend == "scratch": quantize_model(model)
    return fill(add_adapters(model, 4, 8).train())


def fill(model):
    for n, p in model.named_parameters():
        if "lora_" in n: p.data = torch.randn_like(p)*.05
    return model


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one, two):
    assert one.keys() == two.keys() and one
    for n, g in one.items(): assert (g - two[n]).norm() <= 1e-4*g.norm() + 1e-8, n


def second(model, backend):
    if backend == "bnb": model.add_adapter("b", LoraConfig(r=4, lora_alpha=40, target_modules="all-linear")), fill(model), model.set_adapter("b")
    else:
        for m in adapted_layers(model).values(): m.add(4, 40, 0., False, "b")
        fill(model), set_adapter(model, "b")


def scale(model, backend):
    for m in adapted_layers(model).values(): m.scaling["default"] *= 3


def drop(model, backend):
    for m in adapted_layers(model).values(): m.lora_dropout["default"] = nn.Dropout(.999999)   # nothing gets through


def other_weight(model, backend):
    m = next(iter(adapted_layers(model).values())).base_layer
    if backend == "bnb": m.weight.data = m.weight.data.flip(0).contiguous()
    else: m.packed = m.packed.flip(0).contiguous()


def written_to(model, backend):
    m = next(iter(adapted_layers(model).values())).base_layer
    (m.weight if backend == "bnb" else m.packed).bitwise_xor_(0x11)


def new_adapter_weights(model, backend):
    m = next(iter(adapted_layers(model).values()))
    m.lora_A["default"].weight = nn.Parameter(torch.randn_like(m.lora_A["default"].weight))


def frozen(model, backend): next(iter(adapted_layers(model).values())).lora_A.requires_grad_(False)


QUIET = {new_adapter_weights, frozen}   # looked up at each call: nothing to fall back from


CASES = [(b, False, c) for b in ("bnb", "scratch") for c in (second, scale, drop, other_weight, written_to, new_adapter_weights, frozen)]
CASES += [("bnb", True, c) for c in (scale, new_adapter_weights, frozen)] + [("scratch", True, other_weight)]


@pytest.mark.parametrize("backend, record, change", CASES, ids=lambda o: getattr(o, "__name__", str(o)))
def test_what_is_changed_afterwards_counts(folder, backend, record, change):
    model = adapted(folder, backend)
    make_fast(model, cuda_graphs=record)
    for _ in range(4 if record else 1): before = gradients(model, lambda: model.step_loss(BATCH))   # captured by then
    assert not record or model.stack.passes
    with torch.no_grad(): change(model, backend)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4 if record else 1): got = gradients(model, lambda: model.step_loss(BATCH))
    assert (change in QUIET) != any("has changed since it was made fast" in str(o.message) for o in said)
    same(gradients(make_plain(model), lambda: model(**BATCH).loss), got)
    assert change is frozen or any((g - before[n]).norm() > 1e-2*g.norm() for n, g in got.items() if n in before) or change in (second, drop)


@pytest.mark.parametrize("backend", ["bnb", "scratch"])
def test_a_fused_way_that_is_another_layer_is_not_taken(folder, backend, monkeypatch):
    "A new adapter is zero, so the first loss is right however strong it is; one of each kind of layer is tried with numbers."
    from qlora_nb.speed import fused
    theirs = fused.fused_parts
    def stronger(layer, fold=None):
        packed, (alpha, *rest), dtype = theirs(layer, fold)
        return packed, (alpha*(1.05 if layer.out_features > layer.in_features else 1), *rest), dtype
    monkeypatch.setattr(fused, "fused_parts", stronger)
    model = add_adapters(BACKENDS[backend](folder, device="cpu", dtype=torch.float32), 4).train()
    was = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = [r for r in make_fast(model).rows if r[0] == "adapter"]
    assert {r[2].split(" by ")[0] for r in rows} == {"fused", "as before: it would be off"}
    for m in adapted_layers(model).values(): assert hasattr(m, "fused") == (m.out_features <= m.in_features)
    assert all(torch.equal(p, was[n]) and p.grad is None for n, p in model.named_parameters() if p.requires_grad)


def test_hidden_states_of_captured_layers(folder):
    model = adapted(folder)
    want = [o.detach() for o in model(**BATCH, output_hidden_states=True).hidden_states]
    make_fast(model, cuda_graphs=True)
    for _ in range(4): gradients(model, lambda: model.step_loss(BATCH))
    assert model.stack.passes
    for _ in range(4): got = model(**BATCH, output_hidden_states=True).hidden_states
    assert len(got) == len(want) and all((a - b).norm() < 1e-4*b.norm() for a, b in zip(got, want))


def test_a_head_that_gets_an_adapter_afterwards(folder):
    model = adapted(folder)
    make_fast(model)
    gradients(model, lambda: model.step_loss(BATCH))
    model.add_adapter("head", LoraConfig(r=4, target_modules=["lm_head"]))
    fill(model), model.base_model.set_adapter(["default", "head"])
    with pytest.warns(UserWarning, match="the head has an adapter"): got = gradients(model, lambda: model.step_loss(BATCH))
    same(gradients(make_plain(model), lambda: model(**BATCH).loss), got)


def test_a_trained_bias_keeps_its_gradient(tmp_path):
    with quiet(): tiny_model("llama", vocab_size=96, hidden_size=64, attention_bias=True).save_pretrained(tmp_path)
    model = adapted(tmp_path)
    bias = model.get_decoder().layers[0].self_attn.q_proj.base_layer.bias.requires_grad_()
    table = make_fast(model)
    assert "its bias is trained" in str(table)
    got = gradients(model, lambda: model.step_loss(BATCH))
    assert bias.grad is not None
    same(gradients(make_plain(model), lambda: model(**BATCH).loss), got)


@pytest.mark.parametrize("memory", [1., 0.])
def test_a_model_that_adds_to_an_output_in_place(memory):
    "Falcon's new decoder."
    set_seed(0)
    model = AutoModelForCausalLM.from_config(FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, alibi=False), dtype=torch.float32)
    quantize_model(model)
    model = fill(add_adapters(model, 4, 8).train())
    want = gradients(model, lambda: model(**BATCH).loss)
    assert "fused" in str(make_fast(model, memory))
    same(want, gradients(model, lambda: model.step_loss(BATCH)))


def test_lists_of_experts_are_no_layers():
    class Layer(nn.Module):
        def __init__(self): super().__init__(); self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    layers = nn.ModuleList(Layer() for _ in range(2))
    model = type("M", (), dict(get_decoder=lambda self: nn.ModuleDict(dict(layers=layers))))()
    assert decoder_layers(model) is layers
