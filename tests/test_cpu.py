"The small pieces of a step on a CPU: the same norm, the same attention, in every model that has them, and back again."
import copy

import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import (AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.base.core import set_seed
from qlora_nb.speed.cpu import RMSNorm, attention_float32, cpu_pieces, cpu_pieces_undo, why_not_norm
from qlora_nb.base.model_files import tiny_model
from qlora_nb.foundations.qlora import quantize_model

SIZE = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS = dict(llama=LlamaConfig(**SIZE), mistral=MistralConfig(**SIZE, sliding_window=6), qwen2=Qwen2Config(**SIZE),
               qwen3=Qwen3Config(**SIZE, head_dim=32))
NORMS = dict(llama=5, mistral=5, qwen2=5, qwen3=9)   # Qwen 3 also has one for queries and one for keys
IDS = torch.randint(3, 512, (3, 14), generator=torch.Generator().manual_seed(0))
each_kind = pytest.mark.parametrize("kind", CONFIGS)


def build(kind, dtype=torch.float32, **how):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), dtype=dtype, **how)
    for n, p in model.named_parameters():
        if "norm" in n: torch.nn.init.uniform_(p.data, .5, 1.5)
    return model


def padded():
    mask = torch.ones_like(IDS)
    mask[0, :5] = mask[1, 9:] = 0   # on either side
    return dict(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100))


def gradients(model, batch):
    model.train().zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def cosine(a, b): return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()


# ---- the norm ----

@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), n=st.integers(1, 70), trained=st.booleans(),
       scale=st.sampled_from([0., 1e-4, 1., 1e3]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_norm_is_that_of_transformers(shape, n, trained, scale):
    g = torch.Generator().manual_seed(n)
    theirs = LlamaRMSNorm(n).requires_grad_(trained)
    theirs.weight.data.uniform_(-1, 1, generator=g)
    x, dy = torch.randn(*shape, n, generator=g)*scale, torch.randn(*shape, n, generator=g)
    a, b, w = x.clone().requires_grad_(), x.clone().requires_grad_(), theirs.weight.detach().clone()
    w.requires_grad_(trained)
    one, two = theirs(a), RMSNorm.apply(b, w, theirs.variance_epsilon)
    one.backward(dy), two.backward(dy)
    r = (x.square().mean(-1, keepdim=True) + theirs.variance_epsilon).rsqrt()
    terms = r*(dy*theirs.weight).norm(dim=-1, keepdim=True)   # the gradient is a difference of numbers of this size
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert ((b.grad - a.grad).abs() <= 1e-5*terms).all()
    if trained: torch.testing.assert_close(w.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 2, 4)])
def test_norm_against_finite_differences(shape):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, dtype=torch.float64, generator=g).requires_grad_() for s in (shape, shape[-1:]))
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3), (x, w))
    y = RMSNorm.apply(x, w, 1e-3).sum()
    grad, = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError): grad.sum().backward()   # no second derivative, and it says so


def test_norm_of_a_weight_in_float32():
    "As a model for training that somebody has prepared with PEFT: float32 out, as transformers does it."
    theirs, x = LlamaRMSNorm(8), torch.randn(3, 8, dtype=torch.bfloat16)
    assert theirs(x).dtype == RMSNorm.apply(x, theirs.weight, 1e-6).dtype == torch.float32
    assert why_not_norm(theirs, torch.bfloat16) is None


# ---- attention ----

def heads(dtype=torch.bfloat16, T=9):
    g = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    return module, [torch.randn(2, h, T, 16, generator=g).to(dtype).requires_grad_() for h in (4, 2, 2)]


def results(f, module, leaves, mask, **kw):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = f(module, *leaves, mask, scaling=.3, **kw)[0]
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_transformers(dtype, masked):
    module, leaves = heads(dtype)
    mask = (torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) != 4)).expand(2, 1, 9, 9) if masked else None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    exact = results(sdpa, module, [t.double() for t in leaves], mask)
    theirs, ours = (results(f, module, leaves, mask) for f in (sdpa, attention_float32))
    far = lambda found: [((a.double() - b).norm()/b.norm()).item() for a, b in zip(found, exact)]
    assert all(o.dtype == dtype and o.shape == t.shape for o, t in zip(ours, theirs))
    assert all(a <= max(1.05*b, 1e-6) for a, b in zip(far(ours), far(theirs))), (far(ours), far(theirs))


@pytest.mark.parametrize("how", ["evaluation", "no_grad", "additive mask", "cache", "not causal"])
def test_attention_is_left_to_transformers(how):
    "The same bits: the two ways would differ in bfloat16."
    module, (q, k, v) = heads()
    mask, kw, sdpa = None, {}, ALL_ATTENTION_FUNCTIONS["sdpa"]
    if how == "evaluation": module.eval()
    if how == "additive mask": mask = torch.full((9, 9), -1e4, dtype=torch.bfloat16).triu(1)
    if how == "cache": q = q[:, :, -1:]
    if how == "not causal": kw = dict(is_causal=False)
    with torch.set_grad_enabled(how != "no_grad"):
        a, b = (f(module, q, k, v, mask, scaling=.3, **kw)[0] for f in (sdpa, attention_float32))
    assert torch.equal(a, b)


# ---- models ----

@each_kind
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_float32"])
def test_gradients_in_float32(kind, attention):
    model, batch = build(kind), padded()
    loss, want = gradients(model, batch)
    assert cpu_pieces(model) == [("norm", NORMS[kind], "fused function")]   # float32 attention is what it is
    model.config._attn_implementation = attention
    new_loss, got = gradients(model, batch)
    assert abs(loss - new_loss) < 1e-5 and set(got) == set(want)   # trained norms included
    assert min(cosine(got[n], want[n]) for n in want) > .99999


@each_kind
def test_in_and_out_again(kind):
    model, batch = build(kind, torch.bfloat16), padded()
    before, usual = gradients(model, batch), [n for n, _ in model.named_parameters()]
    kept = [dict(vars(m)) for m in model.modules()]
    rows = [("norm", NORMS[kind], "fused function"), ("attention", 2, "in float32")]
    assert cpu_pieces(model) == rows == cpu_pieces(model)   # twice is once
    assert model.config._attn_implementation == "sdpa_float32" and [n for n, _ in model.named_parameters()] == usual
    exact = gradients(build(kind).float(), batch)[1]
    after = gradients(model, batch)[1]
    far = lambda g: sum((g[n] - exact[n]).square().sum() for n in exact)/sum(o.square().sum() for o in exact.values())
    assert far(after) < 1.2*far(before[1])
    cpu_pieces_undo(model)
    assert [set(vars(m)) for m in model.modules()] == [set(o) for o in kept]
    assert model.config._attn_implementation == "sdpa"
    again = gradients(model, batch)
    assert again[0] == before[0] and all(torch.equal(again[1][n], before[1][n]) for n in usual if n in before[1])


@each_kind
def test_answers_are_the_same_bits(kind):
    model = build(kind, torch.bfloat16).eval()
    batch = {k: v for k, v in padded().items() if k != "labels"}
    batch = {k: v[:1] for k, v in batch.items()}
    def ask(): return model(**batch).logits.detach(), model.generate(**batch, max_new_tokens=6, do_sample=False)
    before, _ = ask(), cpu_pieces(model)
    after = ask()
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(before, after))


@each_kind
def test_rows_packed_into_one(kind):
    "Positions that begin again: neither way may look across the border."
    model, two = build(kind), torch.cat([IDS[0], IDS[1]])[None]
    batch = dict(input_ids=two, labels=two, position_ids=torch.arange(14).repeat(2)[None])
    loss, want = gradients(model, batch)
    cpu_pieces(model)
    model.config._attn_implementation = "sdpa_float32"
    new_loss, got = gradients(model, batch)
    assert abs(loss - new_loss) < 1e-5 and min(cosine(got[n], want[n]) for n in want) > .99999


def test_checkpointing_and_copies():
    model, batch = build("llama", torch.bfloat16), padded()
    cpu_pieces(model)
    loss, want = gradients(model, batch)
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    new_loss, got = gradients(model, batch)
    assert loss == new_loss and all(torch.equal(got[n], want[n]) for n in want)
    with torch.no_grad(): twin.model.norm.weight.zero_()   # a copy uses its own weights, and can be undone by itself
    assert not twin.eval()(input_ids=IDS).logits.any() and model.eval()(input_ids=IDS).logits.any()
    cpu_pieces_undo(twin)
    assert "forward" not in vars(twin.model.norm) and "forward" in vars(model.model.norm)


# ---- what is left as it is ----

def test_another_formula_is_noticed():
    model = build("llama")
    norm = model.model.layers[1].input_layernorm
    mine = norm.forward = lambda x: LlamaRMSNorm.forward(norm, x)*1.01   # a plain function of somebody else
    rows = cpu_pieces(model)
    assert sorted(rows) == [("norm", 1, "as before: it computes something else"), ("norm", 4, "fused function")]
    cpu_pieces_undo(model)
    assert norm.forward is mine


def test_forwards_of_somebody_else_come_back():
    model = build("llama")
    norm = model.model.norm
    mine = norm.forward = lambda x: LlamaRMSNorm.forward(norm, x)
    assert cpu_pieces(model) == [("norm", 5, "fused function")] and norm.forward is not mine
    cpu_pieces_undo(model)
    assert norm.forward is mine


def test_other_architectures():
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**SIZE, head_dim=32), dtype=torch.bfloat16)
    cfg = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=512)
    gpt2 = AutoModelForCausalLM.from_config(cfg, dtype=torch.bfloat16)
    assert cpu_pieces(gemma) == cpu_pieces(gpt2) == [("attention", 2, "in float32")]   # their norms are others
    assert cpu_pieces(tiny_model("falcon").bfloat16()) == []   # LayerNorm, and an attention of its own
    eager = build("llama", torch.bfloat16, attn_implementation="eager")
    assert cpu_pieces(eager)[1:] == [("attention", 2, "as before: it is eager")]
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("backend", ["scratch", "peft"])
def test_adapters_keep_their_gradients(backend):
    model = tiny_model("llama", hidden_size=128)
    if backend == "scratch": quantize_model(model)
    model = add_adapters(model, 4, 8)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p.data, std=.02)
    batch = padded()
    loss, want = gradients(model, batch)
    assert cpu_pieces(model) == [("norm", 5, "fused function")]
    new_loss, got = gradients(model, batch)
    assert len(got) == 28 and abs(loss - new_loss) < 1e-5 and min(cosine(got[n], want[n]) for n in want) > .9999
