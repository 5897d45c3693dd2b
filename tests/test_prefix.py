"Rows that share their beginning, and weights that stay dequantized: the same loss, the same gradients, in every model that takes part."
import copy, random

import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import (AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_nb.speed import shared_prefix as prefix
from qlora_nb.foundations.adapters import tiny_qlora
from qlora_nb.base.core import set_seed
from qlora_nb.speed.dequantized import dequantized, drop_dequantized, four_bit_layers, keep_dequantized
from qlora_nb.speed.fast_training import make_fast, make_plain
from qlora_nb.base.model_files import tiny_model
from qlora_nb.speed.shared_prefix import fold, fold_prefixes, hidden_states, shared_prefix, unfold_prefixes, worth_folding
from qlora_nb.training.training_loop import row_losses

SIZE = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS = dict(llama=LlamaConfig(**SIZE), mistral=MistralConfig(**SIZE, sliding_window=None), qwen2=Qwen2Config(**SIZE),
               qwen3=Qwen3Config(**SIZE, head_dim=32))
REFUSED = {"a window": MistralConfig(**SIZE, sliding_window=6), "other layers": Gemma2Config(**SIZE, head_dim=32),
           "learned positions": GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=512),
           "dropout": LlamaConfig(**SIZE, attention_dropout=.1)}


def build(config, dtype=torch.float32, **how):
    set_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **how).train()


def padded(lengths, shared, answer, seed=0, width=None):
    "Rows of these lengths that begin with the same tokens, each with labels on its last ones."
    rng, head = random.Random(seed), random.Random(seed + 1).choices(range(3, 500), k=shared)
    T = width or max(lengths)
    ids, mask, labels = [], [], []
    for n in lengths:
        row = (head + rng.choices(range(3, 500), k=n))[:n]
        ids.append(row + [0]*(T - n)), mask.append([1]*n + [0]*(T - n))
        labels.append([-100]*(n - answer) + row[n - answer:] + [-100]*(T - n))
    return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels))


def loss_and_gradients(model, batch):
    model.zero_grad()
    states, labels, _ = hidden_states(model, batch)
    logits, labels = model.get_output_embeddings()(states[:, :-1]).float(), labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_loss_and_gradients(kind, checkpointing):
    model, batch = build(CONFIGS[kind]), padded([20, 31, 14, 26], 9, 4)
    if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    loss, want = loss_and_gradients(model, batch)
    assert fold_prefixes(model) is None and worth_folding(batch)
    assert hidden_states(model, batch)[0].shape[:2] == (1, 20 + 31 + 14 + 26 - 3*9)
    new_loss, got = loss_and_gradients(model, batch)
    assert abs(loss - new_loss) < 1e-5 and (got - want).norm() < 1e-5*want.norm()
    unfold_prefixes(model)
    assert loss_and_gradients(model, batch)[0] == loss and model.config._attn_implementation == "sdpa"


MODEL = build(CONFIGS["llama"])


@given(lengths=st.lists(st.integers(3, 24), min_size=1, max_size=5), shared=st.integers(0, 24), answer=st.integers(1, 3),
       more=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_rows_of_every_shape(lengths, shared, answer, more, seed):
    "Rows without anything in common, all of them equal, one row, padding beyond the longest."
    batch = padded(lengths, shared, answer, seed, max(lengths) + more)
    n, first = shared_prefix(batch), int((batch["labels"] != -100).any(0).int().argmax())
    assert 0 <= n <= max(0, first - 1) and (batch["input_ids"][:, :n] == batch["input_ids"][:1, :n]).all()
    unfold_prefixes(MODEL)
    loss, want = loss_and_gradients(MODEL, batch)
    sums, counts = row_losses(MODEL, batch)
    assert fold_prefixes(MODEL) is None
    new_loss, got = loss_and_gradients(MODEL, batch)
    assert abs(loss - new_loss) < 1e-5 and (got - want).norm() < 1e-4*want.norm()
    new_sums, new_counts = row_losses(MODEL, batch)
    assert torch.equal(counts, new_counts)
    torch.testing.assert_close(new_sums, sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why", REFUSED)
def test_models_that_do_not_take_part(why):
    model = build(REFUSED[why])
    usual = model.config._attn_implementation
    assert fold_prefixes(model) and model.config._attn_implementation == usual
    batch = padded([20, 31], 9, 4)
    assert hidden_states(model.eval(), batch)[0].shape[:2] == (2, 31)


def test_rows_that_would_meet_are_noticed(monkeypatch):
    "An attention in which a row sees the one before it must not pass the check."
    def leaky(module, q, k, v, mask, scaling=None, prefix=None, **kw):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, scaling=scaling, is_causal=True)
    monkeypatch.setattr(prefix, "attention_folded", leaky)
    assert fold_prefixes(build(CONFIGS["llama"])) == "its states are others"


def test_batches_that_are_left_alone():
    batch = padded([20, 31], 9, 4)
    left = batch | dict(attention_mask=batch["attention_mask"].flip(1))
    packed = dict(input_ids=batch["input_ids"], labels=batch["labels"], position_ids=torch.arange(31).expand(2, -1))
    one, full = padded([20], 9, 4), padded([20, 20], 0, 4)
    assert [worth_folding(o) for o in (batch, left, packed, one, full)] == [True, False, False, False, False]


def test_labels_in_the_common_part():
    "A prompt that is trained on as well: its labels count once for each row."
    batch = padded([20, 31, 14], 9, 4)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert shared_prefix(batch) == 0
    assert int((fold(batch).labels != -100).sum()) == 19 + 30 + 13   # nothing predicts a first token


@pytest.mark.parametrize("backend", ["scratch", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_step_and_back(backend, dtype):
    "All that `make_fast` does on a CPU, against the ordinary model."
    model = tiny_qlora("llama", 4) if backend == "scratch" else None
    if backend == "peft":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
        for n, p in model.named_parameters():
            if "lora_B" in n: torch.nn.init.normal_(p.data, std=.02)
    batch = padded([20, 31, 14, 26], 9, 4)
    model = model.to(dtype).train() if backend == "peft" else model.train()
    def gradient(loss):
        model.zero_grad()
        (value := loss()).backward()
        return value.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])
    loss, want = gradient(lambda: model(**batch).loss)
    made = {part: now for part, _, now, _ in make_fast(model, compile=False).rows}
    assert made["shared prefixes"] == "computed once", made
    new_loss, got = gradient(lambda: model.step_loss(batch))
    near = 1e-4 if model.get_input_embeddings().weight.dtype == torch.float32 else .05
    assert abs(loss - new_loss) < near and (got - want).norm() < 10*near*want.norm()
    make_plain(model)
    assert gradient(lambda: model(**batch).loss)[0] == loss and not hasattr(model, "folds")
    assert not [m for m in four_bit_layers(model) if "forward" in vars(m)]


def test_dequantized_weights_come_and_go():
    model = tiny_qlora("llama", 4).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        usual = model(input_ids=ids).logits
        with dequantized(model): assert torch.equal(model(input_ids=ids).logits, usual)
        assert keep_dequantized(model) > 0 == keep_dequantized(model)     # a second time there is nothing left to do
        layer = four_bit_layers(model)[0]
        layer.packed.bitwise_xor_(0x11)                                   # written to: the kept weight is not its weight
        changed = model(input_ids=ids).logits
        layer.packed.bitwise_xor_(0x11)
        drop_dequantized(model)
        assert not torch.equal(changed, usual) and torch.equal(model(input_ids=ids).logits, usual)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths, shared", [([20, 31, 14, 26], 9), ([12, 12, 12], 12), ([7, 6], 0), ([4, 1, 9], 3)])
def test_answers_to_prompts_that_begin_alike(kind, lengths, shared):
    "Prefill of the shared part once, in a cache: the same tokens and logits, whatever the padding."
    model, rows = build(CONFIGS[kind]).eval(), padded(lengths, shared, 0)
    order = [torch.cat([r[m == 0], r[m > 0]]) for r, m in zip(rows["input_ids"], rows["attention_mask"])]   # padded on the left
    ids = torch.stack(order)
    batch, T = dict(input_ids=ids, attention_mask=rows["attention_mask"].flip(1)), ids.shape[1]
    assert prefix.prefill_shared(model, batch) is batch   # not without the proof of `fold_prefixes`
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    want = model.generate(**batch, **how)
    assert fold_prefixes(model) is None
    new = prefix.prefill_shared(model, batch)
    assert ("past_key_values" in new) == (min(shared, min(lengths) - 1) > 0)
    got = model.generate(**new, **how)
    assert torch.equal(got.sequences[:, T:], want.sequences[:, T:])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(got.logits, want.logits))
    unfold_prefixes(model)
