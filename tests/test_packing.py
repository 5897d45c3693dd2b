"Packs that cut nothing, and documents that cannot see each other, on every architecture that is let through."
import math, time
from collections import Counter
from itertools import pairwise

import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForCausalLM, BloomConfig, Gemma2Config, GPT2Config, GPTNeoXConfig, Mamba2Config, MistralConfig, OPTConfig,
                          Phi3Config, PhiConfig, Qwen3Config, Qwen3MoeConfig)

from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import set_seed
from qlora_nb.training.data import load_rows
from qlora_nb.base.model_files import tiny_model
from qlora_nb.foundations.loading import load_model
from qlora_nb.training.document_mask import check_packing, collate_packed, document_ids, separate_documents
from qlora_nb.training.packing import pack, pack_lengths, pack_stats
from qlora_nb.training.finetune import finetune

from common import small_tokenizer

BASE = dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
GQA = BASE | dict(intermediate_size=128, num_key_value_heads=2)
CONFIGS = dict(mistral=MistralConfig(**GQA, sliding_window=8), qwen3=Qwen3Config(**GQA, head_dim=16),
               gemma2=Gemma2Config(**GQA, head_dim=16, sliding_window=8), phi=PhiConfig(**BASE, intermediate_size=128),
               neox=GPTNeoXConfig(**BASE, intermediate_size=128),
               gpt2=GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))
LEAKY = dict(opt=OPTConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
                           word_embed_proj_dim=64),
             bloom=BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4))


def make(kind, attention=None):
    how = dict(attn_implementation=attention) if attention else {}
    if kind in ("llama", "falcon"): return tiny_model(kind, **how)
    if kind == "falcon-rope": return tiny_model("falcon", alibi=False, **how)
    set_seed(0)
    return AutoModelForCausalLM.from_config((CONFIGS | LEAKY)[kind], dtype=torch.float32, **how).eval()


def doc(n, seed, trained=None):
    ids = torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    k = n - (trained or n)
    return dict(input_ids=ids, labels=[-100]*k + ids[k:])


def ids(d): return torch.tensor([d["input_ids"]])


# ---- putting examples together ----

lengths_and_width = st.integers(1, 60).flatmap(lambda w: st.tuples(st.lists(st.integers(1, w), max_size=60), st.just(w)))


def slow_best_fit(lengths, width):
    "Best fit decreasing as one would write it first."
    gaps = []
    for n in sorted(lengths, reverse=True):
        fits = [g for g in gaps if g >= n]
        if fits: gaps.remove(min(fits))
        gaps.append((min(fits) if fits else width) - n)
    return gaps


@given(lengths_and_width)
def test_packs_are_whole_and_as_few_as_best_fit_needs(case):
    lengths, width = case
    packs = pack_lengths(lengths, width)
    assert Counter(i for p in packs for i in p) == Counter(range(len(lengths)))
    assert all(p and sum(lengths[i] for i in p) <= width for p in packs)
    assert sorted(width - sum(lengths[i] for i in p) for p in packs) == sorted(slow_best_fit(lengths, width))
    assert math.ceil(sum(lengths)/width) <= len(packs) <= 11/9*math.ceil(sum(lengths)/width) + len(lengths)
    assert packs == pack_lengths(lengths, width) == sorted(map(sorted, packs))


@settings(deadline=None, max_examples=20)
@given(lengths_and_width.filter(lambda c: c[0]))
def test_as_many_rows_as_trl(case):
    import pyarrow as pa
    from trl.data_utils import _pack_bfd
    lengths, width = case
    table = pa.table(dict(input_ids=pa.array([[1]*n for n in lengths], pa.list_(pa.int64()))))
    assert len(_pack_bfd(table, width)) == len(pack_lengths(lengths, width))


@pytest.mark.parametrize("lengths,say", [([5, 0], "example 2: the example has 0 tokens"),
                                         ([5, 9, 12], "example 2: the example has 9 tokens, and a pack holds 1 to 8")])
def test_an_example_that_fits_nowhere(lengths, say):
    with pytest.raises(QLoRAError) as e: pack_lengths(lengths, 8)
    assert say in str(e.value) and ("max_length=12" in str(e.value)) == (0 not in lengths)


def test_a_hundred_thousand():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randn(100_000, generator=g).mul(0.9).add(4.4).exp().clamp(8, 2048).int().tolist()
    start = time.process_time()   # of this process: what else the machine does is not counted
    packs = pack_lengths(lengths, 2048)
    assert (took := time.process_time() - start) < 20, took
    assert len(packs) <= 1.01*math.ceil(sum(lengths)/2048)


def test_empty_and_single():
    assert pack([], 8) == [] and pack([doc(8, 0)], 8) == [[doc(8, 0)]]


# ---- batches ----

@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 16),
       st.booleans())
def test_a_batch_can_be_taken_apart_again(sizes, multiple, flat):
    packs = [[doc(n, 10*i + k) for k, n in enumerate(p)] for i, p in enumerate(sizes)]
    b = collate_packed(packs, pad_id=0, multiple=multiple, flat=flat)
    rows = [[d for p in packs for d in p]] if flat else packs
    B, T = b["input_ids"].shape
    assert set(b) == {"input_ids", "labels", "position_ids"} and B == len(rows) and T % multiple == 0
    assert T - max(sum(len(d["input_ids"]) for d in r) for r in rows) < multiple
    for r, row in enumerate(rows):
        start = 0
        for k, d in enumerate(row):
            part = slice(start, start := start + len(d["input_ids"]))
            assert b["input_ids"][r, part].tolist() == d["input_ids"]
            assert b["labels"][r, part].tolist() == [-100, *d["labels"][1:]]
            assert b["position_ids"][r, part].tolist() == list(range(len(d["input_ids"])))
            if len(d["input_ids"]) > 1: assert set(document_ids(b["position_ids"])[r, part].tolist()) == {k}
        assert set(b["labels"][r, start:].tolist()) <= {-100} and b["position_ids"][r, start:].tolist() == [*range(T - start)]
    stats = pack_stats(packs, batch_size=1 if flat else len(packs), multiple=multiple)
    assert stats.useful == sum(map(sum, sizes)) and (flat or stats.computed == B*T)


# ---- walls ----

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "falcon", "falcon-rope", *CONFIGS])
def test_each_document_gets_what_it_gets_alone(kind, attention):
    try: model = make(kind, attention)
    except ValueError: return pytest.skip(f"{kind} has no {attention}")
    with pytest.raises(QLoRAError, match="see each other.*separate_documents"): check_packing(model)
    state = torch.get_rng_state()
    separate_documents(model)
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    a, other, b, c = doc(20, 1), doc(20, 2), doc(300, 3), doc(25, 4)
    for flat in (False, True):
        with torch.no_grad(): p, q = (model(**collate_packed([[o, b], [c]], flat=flat)).logits for o in (a, other))
        p, q = (o.flatten(0, 1) for o in (p, q))
        parts = {20: b, 320: c}
        for start, d in parts.items():
            n = len(d["input_ids"])
            assert torch.equal(p[start:start+n], q[start:start+n]), "a document sees its neighbour"
            torch.testing.assert_close(p[start:start+n], model(ids(d)).logits[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", LEAKY)
def test_a_model_without_walls_is_refused(kind):
    with pytest.raises(QLoRAError, match=f"{kind}: .*Train this architecture without packing"):
        separate_documents(make(kind, "eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_let_through(dtype):
    set_seed(0)   # tokens are sorted by expert, so another document may change the last bit
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**GQA, head_dim=16, num_experts=8, moe_intermediate_size=32,
                                                            num_experts_per_tok=2), dtype=dtype)
    assert check_packing(separate_documents(model)).leak < 1e-6
    with pytest.raises(QLoRAError, match="see each other"): check_packing(AutoModelForCausalLM.from_config(model.config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_half_precision_is_let_through(kind, dtype):
    model = tiny_model(kind, num_hidden_layers=12).to(dtype)
    assert separate_documents(model) is model
    found = check_packing(model)
    assert found.leak == 0 and found.deviation < 8*torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["llama", "falcon"])
@pytest.mark.parametrize("bits", [4, None])
def test_gradients_of_adapters(kind, bits, tmp_path):
    tiny_model(kind, vocab_size=512).save_pretrained(tmp_path)
    model = load_model(tmp_path, bits=bits, device="cpu", dtype=torch.float32)
    set_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    separate_documents(model)
    assert model.training and separate_documents(model) is model
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    assert max(hooks) == 1, "set twice"
    docs = [doc(40, 1, 12), doc(300, 2, 50), doc(33, 3, 7), doc(1, 4)]
    total = sum(x != -100 for d in docs for x in d["labels"][1:])

    def gradient(loss):
        model.zero_grad()
        loss().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def one(d):
        logits, labels = model(ids(d)).logits[0, :-1], torch.tensor(d["labels"][1:])
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")/total

    def packed(docs=docs, **how): return model(**collate_packed(pack(docs, 340), **how)).loss
    g = gradient(lambda: sum(one(d) for d in docs[:3]))
    def gap(loss): return ((gradient(loss) - g).norm()/g.norm()).item()
    assert gap(packed) < 1e-5 and gap(lambda: packed(flat=True)) < 1e-5
    assert gap(lambda: packed(multiple=64)) < 1e-5
    model.enable_input_require_grads(), model.gradient_checkpointing_enable()
    assert gap(packed) < 1e-5
    # several forward passes before the one backward pass: each layer runs again and must meet the walls of its own batch
    assert gap(lambda: 0*packed(docs[:2]) + packed() + 0*packed(docs[1:])) < 1e-5


def test_modes_are_put_back():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    separate_documents(model)
    assert before == [m.training for m in model.modules()]
    with pytest.raises(QLoRAError): check_packing(make("opt").train())


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_everything_that_is_not_packed_stays_as_it_was(kind):
    plain, hooked = tiny_model(kind), separate_documents(tiny_model(kind))
    prompts = torch.stack([torch.cat([torch.zeros(9, dtype=int), ids(doc(6, 1))[0]]), ids(doc(15, 2))[0]])
    mask = torch.stack([torch.tensor([0]*9 + [1]*6), torch.ones(15, dtype=int)])
    left = dict(input_ids=prompts, attention_mask=mask)     # padded on the left, as in generation
    how = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(plain.generate(**left, **how), hooked.generate(**left, **how))
    with torch.no_grad():
        for kw in (left, dict(input_ids=prompts), left | dict(position_ids=mask.cumsum(-1).sub(1).clamp(0))):
            assert torch.equal(plain(**kw).logits, hooked(**kw).logits)
    assert hooked(prompts).past_key_values is not None, "the cache is off where nothing is packed"


# ---- weak leaks, and those of long rows ----

class Whisper(torch.nn.Module):
    "A layer that hands on a thousandth of the token before, whatever document that belongs to; or of the one `far` tokens before."
    def __init__(self, layer, share=1e-3, far=1): super().__init__(); self.layer, self.share, self.far = layer, share, far
    def forward(self, x, *args, **kw):
        before = torch.cat([torch.zeros_like(x[:, :self.far]), x[:, :-self.far]], 1) if x.shape[1] > self.far else torch.zeros_like(x)
        return self.layer(x + self.share*before, *args, **kw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weak_leak_is_a_leak(dtype):
    model = tiny_model("llama").to(dtype)
    separate_documents(model)
    model.model.layers[1] = Whisper(model.model.layers[1])
    with pytest.raises(QLoRAError, match="documents in a pack see each other"): check_packing(model)


def test_rows_as_long_as_a_pack_are_looked_at():
    model = separate_documents(tiny_model("llama"))
    model.model.layers[1] = Whisper(model.model.layers[1], .1, 150)
    check_packing(model), check_packing(model, 100)          # nothing is as far away as that
    with pytest.raises(QLoRAError, match="see each other"): check_packing(model, 200)


def test_angles_that_a_long_document_changes_for_its_neighbours():
    "Phi-3 with LongRoPE: transformers takes the long angles for the whole batch, as soon as one position is beyond the original length."
    set_seed(0)
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.]*8, long_factor=[9.]*8, original_max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(Phi3Config(**GQA, max_position_embeddings=512, original_max_position_embeddings=128,
                                                        rope_parameters=rope)).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.Linear): m.weight.data.normal_(std=.2)   # or attention is nearly the same everywhere
    separate_documents(model, 128)
    with pytest.raises(QLoRAError, match="gets other logits than alone"): separate_documents(model, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_runs_on_is_refused_in_every_format(dtype):
    set_seed(0)   # its leak is a tenth of a per cent, which is less than the rounding of bfloat16
    model = AutoModelForCausalLM.from_config(Mamba2Config(vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1,
                                                          num_hidden_layers=2, pad_token_id=0), dtype=dtype)
    with pytest.raises(QLoRAError, match="Train this architecture without packing"): separate_documents(model)


# ---- FlashAttention ----

@pytest.fixture
def flash(monkeypatch):
    "transformers' own way to FlashAttention, with kernels written in PyTorch; how many documents each call of them saw."
    import transformers.modeling_flash_attention_utils as fa
    seen = []
    def whole(q, k, v, causal=False, softmax_scale=None, **kw):   # (B, T, heads, size)
        q, k, v = (o.transpose(1, 2) for o in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, causal=False, softmax_scale=None):
        seen.append(len(cu_seqlens_q) - 1)
        parts = list(pairwise(cu_seqlens_q.tolist()))
        return torch.cat([whole(*(o[None, a:b] for o in (q, k, v)), causal, softmax_scale)[0] for a, b in parts])
    made = (whole, varlen, None, None, None), (fa._lazy_define_process_function(varlen), dict)
    monkeypatch.setattr(fa, "lazy_import_flash_attention", lambda *a, **kw: made)
    return seen


def with_flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"   # from_pretrained would ask for the package
    return model


def test_flash_attention_gets_packs_in_one_row(flash):
    "It knows documents from a single row only: with two rows a document would see its neighbour, and nothing would say so."
    plain, model = separate_documents(tiny_model("llama")), with_flash(tiny_model("llama"))
    assert separate_documents(model).packs_in_one_row and not plain.packs_in_one_row and set(flash) == {3}
    a, b, c = doc(20, 1), doc(30, 2), doc(25, 3)
    with torch.no_grad():
        want, flat, rows = plain(**collate_packed([[a, b], [c]])), model(**collate_packed([[a, b], [c]], flat=True)), \
                           model(**collate_packed([[a, b], [c]]))
    torch.testing.assert_close(flat.loss, want.loss)
    torch.testing.assert_close(flat.logits[0, :50], want.logits[0, :50])
    torch.testing.assert_close(flat.logits[0, 50:], want.logits[1, :25])
    assert (rows.logits[0, 20:50] - want.logits[0, 20:50]).abs().max() > 1e-3, "transformers knows rows by now: flat batches may go"


def test_training_on_packs_is_the_same_with_flash_attention(flash, tmp_path):
    losses = {}
    for name, change in dict(plain=lambda m: m, flash=with_flash).items():
        set_seed(0)
        model, tok = change(tiny_model("llama", vocab_size=len(small_tokenizer()))), small_tokenizer()
        model.qlora_nb_name = "someone/tiny"
        run = finetune(model, load_rows("tickets")[:12], tmp_path/name, tok, max_steps=2, per_device_train_batch_size=2, packing=True, max_length=400,
                       device="cpu", progress=False, fast=False)
        losses[name] = run.info["losses"]
    assert losses["flash"] == pytest.approx(losses["plain"], rel=1e-5) and max(flash) > 3, (losses, flash)
