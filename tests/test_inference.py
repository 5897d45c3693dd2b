"Sampling bit by bit and generation token by token against transformers; adapters that come and go on one base."
import inspect, json, math, shutil, threading, warnings

import pytest, torch
from hypothesis import example, given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

from qlora_nb.foundations.adapters import add_adapters, save_adapter
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import model_tensors, set_seed
from qlora_nb.training.saved_adapters import load_adapter
from qlora_nb.using.inference import batches, generate, pads_safely, padding_error, sampling, stream
from qlora_nb.foundations.lora_model import add_lora
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.using.sampling import process_logits, check_sampling, generate_ids, keep_min_p, keep_top_k, keep_top_p, penalize, seeded, with_temperature
from qlora_nb.training.saved_adapters import check_fits
from qlora_nb.using.several_adapters import active_adapter, adapter_names, add_adapter_from, answering_as, combine_adapters, drop_adapter, save_one, unload, use_adapter

SMALL = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=.3)
GPT = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, initializer_range=.3)
KINDS = dict(llama=SMALL, falcon=dict(SMALL, alibi=True, multi_query=False), mistral=dict(SMALL, sliding_window=6), qwen2=SMALL,
             gpt2=GPT, gpt_neox=SMALL, opt=dict(SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, init_std=.3),
             bloom=dict(SMALL, n_layer=2, n_head=2))
each_kind = pytest.mark.parametrize("kind", KINDS)
ROWS = [[*range(5, 14)], [40, 41, 42, 43], [77]]
BATCH = torch.tensor([[0]*(9 - len(r)) + r for r in ROWS])
MASK = torch.tensor([[0]*(9 - len(r)) + [1]*len(r) for r in ROWS])
KNOBS = dict(temperature=1.3, top_k=40, top_p=.9, min_p=.01)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def make(kind):
    set_seed(0)
    with quiet(): return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]), dtype=torch.float32).eval()


def theirs(model, ids, mask, n=12, seed=0, stop=None, **how):
    torch.manual_seed(seed)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, pad_token_id=0, eos_token_id=stop,
                          **(dict(do_sample=True) | how if how.get("temperature") else dict(do_sample=False) | how)).tolist()


# ---- the knobs, bit by bit ----

@st.composite
def some_scores(draw):
    "Rows with ties, infinities, large and small numbers, in float32 or bfloat16-rounded."
    B, V = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    s = torch.randn(B, V)*draw(st.sampled_from([0., 1e-3, 1., 5., 1e4]))
    s = {"ties": s.round, "coarse": lambda: s.bfloat16().float(), "plain": lambda: s}[draw(st.sampled_from(["ties", "coarse", "plain"]))]()
    s[torch.rand(B, V) < draw(st.sampled_from([0., .3, .9]))] = -math.inf
    s[:, draw(st.integers(0, V - 1))] = draw(st.sampled_from([0., 1., -3.]))   # one token at least is possible
    return s, torch.randint(0, V, (B, draw(st.integers(1, 8))))


@settings(max_examples=150, deadline=None)
@given(some_scores(), st.floats(.01, 10), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(.1, 5))
def test_knobs_have_the_same_bits(rows, t, k, p, m, r):
    s, ids = rows
    for ours, lib in [(with_temperature(s, t), TemperatureLogitsWarper(t)), (keep_top_k(s, k), TopKLogitsWarper(k)),
                      (keep_top_p(s, p), TopPLogitsWarper(p)), (keep_min_p(s, m), MinPLogitsWarper(m)),
                      (penalize(s, ids, r), RepetitionPenaltyLogitsProcessor(r))]:
        assert torch.equal(ours, lib(ids, s.clone())), type(lib).__name__


@settings(max_examples=60, deadline=None)
@given(some_scores(), st.floats(.05, 5), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
@example((torch.zeros(1, 5), torch.tensor([[0]])), 1., 1, 0., 1.)
def test_a_step_keeps_the_best_and_never_everything_out(rows, t, k, p, m):
    s, ids = rows
    out = process_logits(s, ids, temperature=t, top_k=k, top_p=p, min_p=m)
    assert not out.softmax(-1).isnan().any()
    best = with_temperature(s, t).amax(-1, keepdim=True)
    assert (out.amax(-1, keepdim=True) == best).all()


@pytest.mark.parametrize("p,k", [(0., 1), (1., 6), (.5, 1), (.51, 2)])
def test_top_p_at_its_ends(p, k):
    s = torch.tensor([[.5, .25, .125, .0625, .03125, .03125]]).log()
    assert (keep_top_p(s, p) > -math.inf).sum() == k


def test_padding_is_not_penalized():
    s, ids = torch.ones(2, 6), torch.tensor([[0, 0, 3], [4, 0, 3]])
    out = penalize(s, torch.cat([ids, torch.tensor([[5], [0]])], 1), 2., torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert out.tolist() == [[1, 1, 1, .5, 1, .5], [.5, 1, 1, .5, .5, 1]]


@pytest.mark.parametrize("bad", [dict(temperature=-.1), dict(temperature=math.inf), dict(temperature="hot"), dict(top_k=-1), dict(top_k=1.5),
                                 dict(top_k=True), dict(top_p=1.01), dict(top_p=-.1), dict(top_p=None), dict(min_p=2), dict(min_p=math.nan),
                                 dict(repetition_penalty=0), dict(repetition_penalty=-1), dict(seed=-1), dict(seed=1.), dict(max_new_tokens=0), dict(max_new_tokens=-1),
                                 dict(max_new_tokens=2.5)], ids=str)
def test_nonsense_is_named(bad):
    (name, value), = bad.items()
    with pytest.raises(QLoRAError, match=f"the {name} is .*Choose"): check_sampling(**bad)
    with pytest.raises(QLoRAError): generate(None, None, "x", **bad)
    with pytest.raises(QLoRAError): list(stream(None, None, "x", **bad))


def test_seeded_gives_the_state_back():
    set_seed(4); want = torch.rand(2)
    set_seed(4)
    with seeded(7): a = torch.rand(1)
    assert torch.equal(torch.rand(2), want)
    with seeded(7): assert torch.equal(torch.rand(1), a)
    with pytest.raises(ZeroDivisionError), seeded(7): 1/0
    set_seed(4)
    with seeded(None): assert torch.equal(torch.rand(2), want)


# ---- the loop, token by token ----

@each_kind
def test_our_loop_writes_what_transformers_writes(kind):
    m = make(kind)
    if kind == "bloom": pytest.skip("takes no position_ids; its padding is tested below, through transformers' own loop")
    for ids, mask in [(BATCH, MASK), (BATCH[:1], MASK[:1])]:
        assert generate_ids(m, ids, mask, 12).tolist() == theirs(m, ids, mask)
        assert generate_ids(m, ids, mask, 12, seed=3, **KNOBS).tolist() == theirs(m, ids, mask, seed=3, **KNOBS)
    alone = theirs(m, BATCH[:1], MASK[:1], repetition_penalty=1.4, seed=2, **KNOBS)
    assert generate_ids(m, BATCH[:1], MASK[:1], 12, seed=2, repetition_penalty=1.4, **KNOBS).tolist() == alone
    stop = generate_ids(m, BATCH, MASK, 12)[0, 12].item()   # rows end at different times, or not at all
    assert generate_ids(m, BATCH, MASK, 12, stop).tolist() == theirs(m, BATCH, MASK, stop=stop)
    assert generate_ids(m, BATCH, MASK, 12, stop, seed=1, **KNOBS).tolist() == theirs(m, BATCH, MASK, seed=1, stop=stop, **KNOBS)


@each_kind
def test_padding_on_the_left_changes_nothing(kind):
    m = make(kind)
    assert padding_error(m) < 1e-5 and pads_safely(m)
    out = theirs(m, BATCH, MASK)
    assert [o[9:] for o in out] == [theirs(m, torch.tensor([r]), torch.ones(1, len(r), dtype=torch.long))[0][len(r):] for r in ROWS]


def test_a_penalty_in_a_batch_is_the_penalty_alone(monkeypatch):
    m, how = make("llama"), dict(repetition_penalty=1.7)
    first = theirs(m, BATCH, MASK)[1][9]
    m.lm_head.weight.data[0] = m.lm_head.weight.data[first]*1.2   # padding becomes the likeliest token of the second row
    def alone(): return [generate_ids(m, torch.tensor([r]), None, 12, **how)[0, len(r):].tolist() for r in ROWS]
    def together(): return [o[9:] for o in generate_ids(m, BATCH, MASK, 12, **how).tolist()]
    assert together() == alone()
    monkeypatch.setattr("qlora_nb.using.sampling.penalize", lambda s, ids, p, mask=None: penalize(s, ids, p))
    assert together() != alone()   # what a penalty that does not know of padding does


# ---- generate and stream ----

@pytest.fixture(scope="session")
def tok(): return load_tokenizer()


def talker(tok, kind="llama", **more):
    "A random model with the vocabulary of a real tokenizer."
    return tiny_model(kind, vocab_size=len(tok), hidden_size=64, initializer_range=.2, eos_token_id=2, pad_token_id=2, **more)


PROMPTS = ["one", "a longer prompt than the first", "x y z", "one two"]


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_generate_in_batches_is_generate_alone(tok, kind):
    m = talker(tok, kind)
    for how in ({}, dict(repetition_penalty=1.3)):
        alone = [generate(m, tok, p, 8, **how) for p in PROMPTS]
        assert len(set(alone)) > 1
        for b in (1, 2, 3, 16): assert generate(m.train(), tok, PROMPTS, 8, batch_size=b, **how) == alone
    assert not m.training


def test_generate_draws_what_the_loop_draws(tok):
    m = talker(tok)
    ids = tok(PROMPTS[1], return_tensors="pt", add_special_tokens=False).input_ids
    how = dict(KNOBS, repetition_penalty=1.2, seed=11)
    want = tok.decode(generate_ids(m, ids, None, 8, 2, 2, **how)[0, ids.shape[1]:], skip_special_tokens=True).strip()
    assert generate(m, tok, PROMPTS[1], 8, **how) == want == "".join(stream(m, tok, PROMPTS[1], 8, **how)).strip()
    assert generate(m, tok, PROMPTS[1], 8, **how | dict(seed=12)) != want


@pytest.mark.parametrize("k,v", dict(temperature=.3, top_k=3, top_p=.1, min_p=.5, repetition_penalty=3., no_repeat_ngram_size=1).items())
def test_every_knob_is_named(tok, k, v):
    "Whatever the model's own generation_config says, it is not asked, although transformers would."
    m, prompt = talker(tok, tie_word_embeddings=True), " ".join(["and"]*9)
    for l in m.model.layers: l.self_attn.o_proj.weight.data *= .01; l.mlp.down_proj.weight.data *= .01   # so it says what it reads
    ids, sampled = tok(prompt, return_tensors="pt").input_ids, k not in ("repetition_penalty", "no_repeat_ngram_size")
    def ours(): return generate(m, tok, prompt, 20, temperature=float(sampled), seed=0)
    def lib(): return theirs(m, ids, torch.ones_like(ids), 20, **(dict(temperature=1.01) if sampled else {}))
    one, two = ours(), lib()
    setattr(m.generation_config, k, v)
    assert ours() == one
    if k != "temperature": assert lib() != two   # so the setting was there to be heard
    assert sampling(tok, .5)["top_k"] == 0


def test_the_penalty_is_told_about_padding(tok, monkeypatch):
    masks = []
    def spy(scores, ids, penalty, mask=None): masks.append(mask); return scores
    monkeypatch.setattr("qlora_nb.using.inference.penalize", spy)
    generate(talker(tok), tok, PROMPTS, 2, repetition_penalty=1.5)
    sizes = [len(tok(p, add_special_tokens=False).input_ids) for p in PROMPTS]
    assert sorted(masks[0].sum(1).tolist()) == sorted(sizes) and masks[0][:, -1].all() and masks[0].shape[1] == max(sizes)


def test_a_recurrent_model_is_not_padded(tok):
    set_seed(0)
    with quiet():
        cfg = AutoConfig.for_model("rwkv", vocab_size=len(tok), hidden_size=32, num_hidden_layers=2)
        m = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).eval()
    assert not pads_safely(m)
    with pytest.warns(UserWarning, match="takes padding for text"): got = generate(m, tok, PROMPTS, 6)
    assert got == [generate(m, tok, p, 6) for p in PROMPTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert batches(m, tok, ["one"], 4) == [[0]]


def test_stream_can_be_abandoned(tok):
    m, before = talker(tok), threading.active_count()
    pieces = stream(m, tok, "one two", 100_000)
    next(pieces), pieces.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="boom"):
        m.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
        list(stream(m, tok, "one"))
    assert threading.active_count() == before


# ---- adapters ----

def digest(model):
    skip = {p.data_ptr() for n, p in model.named_parameters() if "lora_" in n}
    return [t.detach().clone() for t in model_tensors(model) if t.data_ptr() not in skip]


def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tok):
    d = tmp_path_factory.mktemp("base")
    with quiet(): talker(tok, tie_word_embeddings=True).save_pretrained(d), tok.save_pretrained(d)
    return d


def random_adapter(base_folder, where, seed, rank=4, base=None, **how):
    m = add_adapters(load_model(base or base_folder, device="cpu", dtype=torch.float32), r=rank, **how)
    set_seed(seed)
    for n, p in m.named_parameters():
        if "lora_" in n: nn.init.normal_(p, std=.2)
    return save_adapter(m, where, str(base_folder), template="chat", turns=1)


@pytest.fixture(scope="session")
def two(base_folder, tmp_path_factory):
    d = tmp_path_factory.mktemp("two")
    return [random_adapter(base_folder, d/n, s, r) for n, s, r in (("a", 1, 4), ("b", 2, 4), ("c", 3, 2))]


def loaded(base_folder, two):
    model = load_model(base_folder, device="cpu", dtype=torch.float32)
    before = digest(model)
    for name, f in zip("abc", two): model, _ = add_adapter_from(model, f, name)
    return model, before


@torch.no_grad()
def scores(m): return m(input_ids=BATCH[:1] + 3).logits


def test_switch_and_unload(base_folder, two):
    model, before = loaded(base_folder, two)
    assert adapter_names(model) == [*"abc"] and active_adapter(model) == "a" and same(digest(model), before)
    each = {}
    for n in "abc":
        use_adapter(model, n)
        each[n] = scores(model)
    with answering_as(model, None): each[None] = scores(model)
    assert len({str(o.sum().item()) for o in each.values()}) == 4
    use_adapter(model, "b")
    for n in (None, *"abc"):
        with answering_as(model, n): assert torch.equal(scores(model), each[n])
        assert active_adapter(model) == "b" and torch.equal(scores(model), each["b"])
    with pytest.raises(KeyError), answering_as(model, "c"): raise KeyError
    assert active_adapter(model) == "b"
    for f in (lambda: use_adapter(model, "d"), lambda: drop_adapter(model, "d"), lambda: answering_as(model, "d").__enter__()):
        with pytest.raises(QLoRAError, match="no adapter 'd' is loaded. There are: a, b, c."): f()
    assert not any(p.requires_grad for p in model.parameters())
    assert drop_adapter(model, "b") == "a" and drop_adapter(model, "c") == "a"
    with pytest.raises(QLoRAError, match="only adapter"): drop_adapter(model, "a")
    back = unload(model)
    assert same(digest(back), before) and torch.equal(scores(back), each[None]) and not any("lora_" in n for n, _ in back.named_parameters())


def test_what_trains_goes_on_training(base_folder):
    model = add_adapters(load_model(base_folder, device="cpu", dtype=torch.float32), r=2).train()
    was = [p.requires_grad for p in model.parameters()]
    with answering_as(model, None): pass
    with answering_as(model, "default"): pass
    assert [p.requires_grad for p in model.parameters()] == was and sum(was) > 0 and model.training


def test_our_own_adapters_are_switched_too():
    m = tiny_model("llama")
    assert adapter_names(m) == [] and active_adapter(m) is None
    with answering_as(m, None): plain = scores(m)
    add_lora(m, "all-linear", 4), add_lora(m, "all-linear", 2, adapter="other")
    from qlora_nb.foundations.lora_model import disable_adapter
    from functools import partial
    m.disable_adapter = partial(disable_adapter, m)   # as add_adapters does
    for n, p in m.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=.1)
    assert adapter_names(m) == ["default", "other"] and active_adapter(m) == "other"
    with answering_as(m, "default"): assert active_adapter(m) == "default"
    with answering_as(m, None): assert torch.equal(scores(m), plain)
    assert active_adapter(m) == "other" and not torch.equal(scores(m), plain)


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("kind", [dict(use_rslora=True), dict(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 32})],
                         ids=["rslora", "patterns"])
def test_other_scales_add_up_too(kind, how):
    made = dict(init_lora_weights=False, **kind)
    made["lora_alpha"] = 16
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **made), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **made))
    combine_adapters(model, dict(a=1, b=.5), "c", how, **{"rank": 12} if how == "svd" else {})
    for m in (m for m in model.modules() if isinstance(m, LoraLayer)):
        want = sum(w*m.get_delta_weight(o) for o, w in dict(a=1, b=.5).items() if o in m.lora_A)
        torch.testing.assert_close(m.get_delta_weight("c"), want, atol=1e-5, rtol=1e-4)


def test_dora_does_not_add_up():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], use_dora=True), "a")
    with pytest.raises(QLoRAError, match="DoRA"): combine_adapters(model, dict(a=.5), "half")


@settings(max_examples=6, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2))
def test_cat_is_the_sum(base_folder, two, v, w):
    model, _ = loaded(base_folder, two)
    combine_adapters(model, dict(a=v, c=w), "sum")   # of different ranks
    for l in (m for m in model.modules() if isinstance(m, LoraLayer)):
        a, c, s = (l.get_delta_weight(o) for o in ("a", "c", "sum"))
        torch.testing.assert_close(s, v*a + w*c, rtol=0, atol=1e-6*max(1, a.abs().max(), c.abs().max()))


def test_adapters_of_two_dtypes_add_up(base_folder, two):
    "On a base in bfloat16 the first adapter that PEFT loads is in float32 and the next ones are not."
    model = load_model(base_folder, device="cpu", dtype=torch.bfloat16)
    for name, f in zip("ac", two[::2]): model, _ = add_adapter_from(model, f, name)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)): layer.lora_B["c"].to(torch.bfloat16)
    combine_adapters(model, dict(a=1, c=.5), "both")
    use_adapter(model, "both")
    assert scores(model).isfinite().all()


def test_linear_has_cross_terms_and_svd_the_tail(base_folder, two):
    model, before = loaded(base_folder, two)
    for how in ("linear", "svd"): combine_adapters(model, dict(a=1, b=1), how, how)
    for l in (m for m in model.modules() if isinstance(m, LoraLayer)):
        A, B, total = l.lora_A, l.lora_B, l.get_delta_weight("a") + l.get_delta_weight("b")
        s = math.sqrt(l.scaling["a"]*l.scaling["b"])
        cross = s*(B["a"].weight @ A["b"].weight + B["b"].weight @ A["a"].weight)
        torch.testing.assert_close(l.get_delta_weight("linear") - total, cross, rtol=0, atol=1e-4)
        assert cross.norm() > .5*total.norm()
        off, tail = (l.get_delta_weight("svd") - total).norm(), torch.linalg.svdvals(total)[4:].norm()
        assert abs(off - tail) < 1e-4*total.norm() and tail > 0
    assert same(digest(model), before)
    for bad, match in [(dict(weights=dict(a=1), name="b"), "already"), (dict(weights=dict(a=1, z=1), name="n"), "There are: a, b, c"),
                       (dict(weights=dict(a=1, c=1), name="n", how="linear"), "ranks differ"),
                       (dict(weights=dict(a=1, c=1), name="n", rank=3), "rank=3"), (dict(weights=dict(a=1), name="n", how="svd", rank=5), "1 to 4"),
                       (dict(weights={}, name="n"), "nothing"),
                       (dict(weights=dict(a=1), name="n", how="add"), "Choose cat"), (dict(weights=dict(a=1), name="a.b"), "letters")]:
        with pytest.raises(QLoRAError, match=match): combine_adapters(model, **bad)


def test_a_combination_is_kept(base_folder, two, tmp_path):
    model, _ = loaded(base_folder, two)
    combine_adapters(model, dict(a=1, c=.5), "both")
    use_adapter(model, "both")
    save_one(model, "both", tmp_path/"both", str(base_folder), template="chat")
    assert sorted(o.name for o in (tmp_path/"both").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "qlora_nb.json"]
    again = load_adapter(tmp_path/"both", device="cpu", dtype=torch.float32)
    assert torch.equal(scores(again.model), scores(model)) and again.notes["template"] == "chat"
    assert not list(tmp_path.glob("tmp-*"))


def test_adapters_for_another_base(base_folder, two, tmp_path, tok):
    model, before = loaded(base_folder, two)
    shapes = dict(deep=("llama", dict(num_hidden_layers=3)), wide=("llama", dict(hidden_size=128)), other=("falcon", {}))
    for name, (kind, shape) in shapes.items():
        m = tiny_model(kind, **dict(vocab_size=len(tok), hidden_size=64) | shape)
        f = save_adapter(add_adapters(m, r=2), tmp_path/name, "elsewhere")
        match = "matrices have another size.*the adapter" if name == "wide" else "layers of the adapter are not in the model"
        with pytest.raises(QLoRAError, match=match): check_fits(model, f)
        with pytest.raises(QLoRAError, match=match): add_adapter_from(model, f, name)
        with pytest.raises(QLoRAError, match=match): load_adapter(f, base=str(base_folder), device="cpu")
    assert adapter_names(model) == [*"abc"] and same(digest(model), before)


def test_an_adapter_of_another_name_warns(base_folder, two, tmp_path):
    f = shutil.copytree(two[0], tmp_path/"a")
    cfg = json.loads((f/"adapter_config.json").read_text(encoding="utf-8"))
    cfg["base_model_name_or_path"] = "someone/else"
    (f/"adapter_config.json").write_text(json.dumps(cfg), encoding="utf-8")
    model = load_model(base_folder, device="cpu", dtype=torch.float32)
    with pytest.warns(UserWarning, match="a was trained on someone/else; this is"): add_adapter_from(model, f, "a")


def test_gpt2_and_embeddings_fit(tmp_path):
    "Conv1D layers have their sizes elsewhere; matrices of embeddings are left to PEFT."
    m = get_peft_model(make("gpt2"), LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.save_pretrained(tmp_path)
    check_fits(make("gpt2"), tmp_path)
    with pytest.raises(QLoRAError, match="not in the model"): check_fits(make("llama"), tmp_path)


def test_public_calls_keep_their_order():
    "New options come after those that were there."
    assert [*inspect.signature(generate).parameters][:8] == "model tokenizer prompts max_new_tokens temperature top_p batch_size progress".split()
    assert [*inspect.signature(stream).parameters][:6] == "model tokenizer prompt max_new_tokens temperature top_p".split()
    assert [*inspect.signature(load_adapter).parameters][:4] == "folder base device dtype".split()


# ---- where answers end, and which base an adapter belongs to ----

@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    "A run on a base whose template closes with <|im_end|> while its tokenizer's EOS is another token."
    from qlora_nb.training.finetune import finetune
    from common import small_tokenizer
    d, tok = tmp_path_factory.mktemp("taught"), small_tokenizer()
    tok.eos_token = "<|endoftext|>"
    with quiet(): tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(d/"base"), tok.save_pretrained(d/"base")
    rows = [dict(prompt=f"{i}?", response="yes") for i in range(8)]
    return finetune(d/"base", rows, d/"run", max_steps=40, learning_rate=1e-2, device="cpu", progress=False)


def test_answers_stop_at_the_token_that_was_taught(taught):
    "In all four ways, from the run and from its folder; and the base's list counts too."
    from qlora_nb.training.data import encode_prompt
    from qlora_nb.evaluation.evaluation import evaluate
    from qlora_nb.training.end_tokens import stop_ids
    loaded = load_adapter(taught.folder, device="cpu")
    assert loaded.notes["end_tokens"] == ["<|im_end|>"] and loaded.tokenizer.eos_token == "<|endoftext|>"
    for model, tok in ((taught.model, taught.tokenizer), loaded[:2]):
        ended, prompt = [], encode_prompt(dict(prompt="3?"), tok)
        assert generate(model, tok, [prompt]*2, 20, ended=ended) == ["yes"]*2 and ended == [True]*2
        assert "".join(stream(model, tok, prompt, 20)) == "yes"
        score = evaluate(model, tok, [dict(prompt="3?", response="yes")])
        assert (score.exact_match, score.stop_rate) == (1., 1.)
    listed = loaded.tokenizer.convert_tokens_to_ids("<repo_name>")
    loaded.model.generation_config.eos_token_id = [listed, 300]   # the latter is an ordinary token here
    assert listed in stop_ids(loaded.model, loaded.tokenizer) and 300 not in stop_ids(loaded.model, loaded.tokenizer)


def test_an_end_token_that_is_not_special_is_not_shown(taught):
    "Decoding leaves special tokens out and keeps all others; here an ordinary one ends the answer."
    from qlora_nb.training.data import encode_prompt
    from qlora_nb.training.end_tokens import note_ends, notes_of
    model, tok = taught.model, taught.tokenizer
    prompt, first = encode_prompt(dict(prompt="3?"), tok), tok("yes", add_special_tokens=False).input_ids[0]
    note_ends(model, tok, [first])
    try: assert generate(model, tok, prompt, 20) == "" == "".join(stream(model, tok, prompt, 20))
    finally: notes_of(model)["end_tokens"].remove(tok.convert_ids_to_tokens(first))


def test_each_adapter_ends_where_it_was_taught(taught, tmp_path):
    "One of several on a base, saved by its name, and a sum of two: the notes go along, and nothing leaks into the other."
    from qlora_nb.training.end_tokens import stop_ids
    tok, odd = taught.tokenizer, "<repo_name>"
    def stops(model): return tok.convert_ids_to_tokens(stop_ids(model, tok))
    shutil.copytree(taught.folder/"adapter", tmp_path/"other")
    file = tmp_path/"other"/"qlora_nb.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | dict(end_tokens=[odd], template="article", turns=1)), encoding="utf-8")
    model = load_adapter(taught.folder, device="cpu", name="one").model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = add_adapter_from(model, tmp_path/"other", "two")
    assert odd not in stops(model)
    with answering_as(model, "two"): assert odd in stops(model)
    with pytest.warns(UserWarning, match="different templates: article, auto"): combine_adapters(model, dict(one=1, two=1), "sum")
    for name, ends in (("two", [odd]), ("sum", ["<|im_end|>", odd])):
        saved = save_one(model, name, tmp_path/name, str(taught.info["settings"]["model"]))
        notes = json.loads((saved/"qlora_nb.json").read_text(encoding="utf-8"))
        assert {*notes["end_tokens"]} == {*ends} and notes["turns"] == 1 and notes.get("template") == {"two": "article"}.get(name)
        assert odd in stops(load_adapter(saved, device="cpu").model)


def test_another_base_of_the_same_shape_is_noticed(taught, tmp_path):
    other = tmp_path/"other"
    shutil.copytree(taught.info["settings"]["model"], other), shutil.copytree(taught.folder, tmp_path/"run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(taught.folder, base=str(other), device="cpu")   # the same weights in another place
    with quiet(): tiny_model("llama", seed=3, vocab_size=len(taught.tokenizer), hidden_size=64, pad_token_id=2).save_pretrained(other)
    with pytest.warns(UserWarning, match="trained on another base"): load_adapter(taught.folder, base=str(other), device="cpu")
    from qlora_nb.training.finetune import finetune
    rows = [dict(prompt=f"{i}?", response="yes") for i in range(8)]
    with pytest.raises(QLoRAError, match="the bases differ"): finetune(other, rows, tmp_path/"run", max_steps=40, learning_rate=3e-2, device="cpu", progress=False, resume=True)
    file = tmp_path/"run"/"adapter"/"adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for named, said in ((None, "does not name its base"), ("/content/elsewhere/base", "is not on this machine: /content/elsewhere/base")):
        file.write_text(json.dumps(config | dict(base_model_name_or_path=named)), encoding="utf-8")
        with pytest.raises(QLoRAError, match=f"{said}.*base=..."): load_adapter(tmp_path/"run", device="cpu")


def test_an_adapter_that_fits_in_part_is_refused(taught, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(taught.folder/"adapter", tmp_path/"adapter")
    tensors = load_file(tmp_path/"adapter"/"adapter_model.safetensors")
    lost = sorted(tensors)[5]
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path/"adapter"/"adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QLoRAError, match=f"1 matrices of the adapter and the model do not belong together: {lost}"):
        load_adapter(tmp_path/"adapter", device="cpu")


def test_the_dtype_of_the_training_is_kept_or_said(taught, monkeypatch):
    from qlora_nb.training import saved_adapters
    notes = dict(dtype="bfloat16")
    for native in (True, False):
        monkeypatch.setattr(saved_adapters, "has_native_bf16", lambda device: native)
        monkeypatch.setattr(saved_adapters, "pick_dtype", lambda device: torch.float32)
        if native: assert saved_adapters.trained_dtype(notes, "cpu") == torch.bfloat16
        else:
            with pytest.warns(UserWarning, match="trained in bfloat16; this device computes in float32"): assert saved_adapters.trained_dtype(notes, "cpu") == torch.float32
    assert saved_adapters.trained_dtype(dict(dtype="float32"), "cpu") == saved_adapters.trained_dtype({}, "cpu") == torch.float32
