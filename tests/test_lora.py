"Our adapters against PEFT's: outputs, gradients, files both ways; and the mistakes that must not pass."
import json, math, os, warnings

import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

from qlora_nb.foundations import lora_model
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import count_params, set_seed
from qlora_nb.foundations.lora import LoRA
from qlora_nb.foundations.lora_model import add_lora, disable_adapter, load_adapter, lora_layers, merge, save_adapter, set_adapter, unmerge
from qlora_nb.base.model_files import tiny_model
from qlora_nb.foundations.loading import audit_4bit, load_model

PREFIX = "base_model.model."
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Two threads on matrices as small as these cost far more than they save."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def gpt2():
    set_seed(0)
    cfg = GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
                     loss_type="ForCausalLM")
    return AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).eval()


MAKERS = dict(llama=lambda: tiny_model("llama", vocab_size=128, hidden_size=64, intermediate_size=96),
              falcon=lambda: tiny_model("falcon", vocab_size=128, hidden_size=64), gpt2=gpt2)
each_model = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def fill(model, part="lora_B", seed=7):
    "The same random numbers in the adapters of two models whose parameters are in the same order."
    set_seed(seed)
    for n, p in model.named_parameters():
        if part in n: nn.init.normal_(p, std=0.1)
    return model


def peft_model(model, seed=3, **cfg):
    "PEFT's adapters on `model`, in eval mode as the model was."
    set_seed(seed)
    cfg = {**dict(target_modules="all-linear", task_type="CAUSAL_LM", r=4, lora_alpha=8), **cfg}
    return get_peft_model(model, LoraConfig(fan_in_fan_out=model.config.model_type == "gpt2", **cfg)).eval()


def our_model(model, seed=3, **cfg):
    set_seed(seed)
    add_lora(model, **{**dict(r=4, lora_alpha=8), **cfg})
    return model


def logits(model):
    with torch.no_grad(): return model(input_ids=IDS).logits


def outcome(model):
    "Logits, and gradients by name."
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n.removeprefix(PREFIX): p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(theirs, ours):
    (y1, g1), (y2, g2) = outcome(theirs), outcome(ours)
    assert list(g1) == list(g2) and g1
    assert torch.equal(y1, y2)
    for n in g1: assert torch.equal(g1[n], g2[n]), n


@each_model
@pytest.mark.parametrize("rslora", [False, True])
def test_equal_to_peft(make, rslora):
    theirs, ours = peft_model(make(), use_rslora=rslora), our_model(make(), rslora=rslora)
    assert count_params(theirs) == count_params(ours)
    for (n, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True): assert torch.equal(p, q), n
    assert torch.equal(logits(ours), logits(make()))  # B = 0: nothing has changed yet
    assert_same(fill(theirs), fill(ours))


def test_dropout_is_the_same_mask():
    theirs, ours = peft_model(MAKERS["llama"](), lora_dropout=0.3), our_model(MAKERS["llama"](), lora_dropout=0.3)
    fill(theirs).train(), fill(ours).train()
    set_seed(5); y1 = theirs(input_ids=IDS).logits
    set_seed(5); y2 = ours(input_ids=IDS).logits
    assert torch.equal(y1, y2) and not torch.equal(y1, ours(input_ids=IDS).logits)
    assert torch.equal(logits(ours.eval()), logits(theirs.eval()))


def test_follows_the_mode_of_the_base():
    assert not any(m.training for m in our_model(MAKERS["llama"](), lora_dropout=0.5).modules())
    assert all(m.training for m in our_model(MAKERS["llama"]().train(), lora_dropout=0.5).modules())


def test_bf16_is_equal_to_peft():
    theirs, ours = (f(MAKERS["llama"]().bfloat16()) for f in (peft_model, our_model))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert_same(fill(theirs, "lora_"), fill(ours, "lora_"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=128, hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4bit_is_equal_to_peft(folder, dtype):
    def make(): return load_model(folder, device="cpu", dtype=dtype)
    theirs, ours = peft_model(make()), our_model(make())
    assert len(audit_4bit(ours).four_bit) == 14
    assert_same(fill(theirs, "lora_"), fill(ours, "lora_"))
    with pytest.raises(QLoRAError, match="merge_and_save"): merge(ours)
    assert not any(m.merged for m in lora_layers(ours).values())


class Packed(nn.Module):
    "A linear-like layer that is no nn.Linear and has no weight, as the 4-bit layer of a later page."
    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("codes", torch.randint(0, 16, (d_out, d_in), dtype=torch.uint8))
    def dequantize(self): return self.codes.float()/16 - 0.5
    def forward(self, x): return x @ self.dequantize().T


def test_any_layer_with_two_sizes():
    model = nn.Sequential(nn.Embedding(8, 6), Packed(6, 10), nn.ReLU(), Packed(10, 4))
    x = torch.randint(0, 8, (3,))
    y = model(x)
    assert add_lora(model, r=2).rows[0][-1] == 2*(6 + 10 + 10 + 4)
    assert torch.equal(model(x), y)
    fill(model)(x).sum().backward()
    assert not torch.equal(model(x), y)
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())
    with pytest.raises(QLoRAError, match="4-bit"): merge(model)


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 24), d_out=st.integers(1, 24), r=st.integers(1, 12), alpha=st.integers(1, 64), rslora=st.booleans(),
       transposed=st.booleans(), rows=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_gradient_by_hand(d_in, d_out, r, alpha, rslora, transposed, rows, seed):
    set_seed(seed)
    base = (Conv1D(d_out, d_in) if transposed else nn.Linear(d_in, d_out)).double()
    m = LoRA(base, r, alpha, rslora=rslora).double()
    nn.init.normal_(m.lora_B["default"].weight)
    A, B = m.lora_A["default"].weight, m.lora_B["default"].weight
    s, W = alpha/(math.sqrt(r) if rslora else r), base.weight.T if transposed else base.weight
    x, G = torch.randn(rows, d_in, dtype=torch.double, requires_grad=True), torch.randn(rows, d_out, dtype=torch.double)
    y = m(x)
    y.backward(G)
    torch.testing.assert_close(y, x @ (W + s * B @ A).T + base.bias)
    torch.testing.assert_close(B.grad, s * G.T @ (x @ A.T))
    torch.testing.assert_close(A.grad, s * (G @ B).T @ x)
    torch.testing.assert_close(x.grad, G @ W + s * (G @ B) @ A)
    D = lora_model.delta(m, "default")
    torch.testing.assert_close(D.T if transposed else D, s * B @ A)


@each_model
def test_merge_and_unmerge(make):
    model = fill(our_model(make()))
    y, old = logits(model), {n: m.weight.clone() for n, m in lora_layers(model).items()}
    merge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=0)
    for f in (lambda: add_lora(model, adapter="other"), lambda: set_adapter(model, "default"),
              lambda: disable_adapter(model).__enter__()):
        with pytest.raises(QLoRAError, match="unmerge"): f()
    once = logits(model)
    merge(model)  # a second time changes nothing
    assert torch.equal(logits(model), once)
    unmerge(model)
    for n, m in lora_layers(model).items(): torch.testing.assert_close(m.weight, old[n], atol=2**-23, rtol=0)
    unmerge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=0)


def test_tied_head_is_not_merged():
    model = our_model(gpt2(), target_modules=["lm_head"])
    w = model.transformer.wte.weight.clone()
    with pytest.raises(QLoRAError, match="shares"): merge(fill(model))
    assert torch.equal(model.transformer.wte.weight, w)


# ---- which layers ----

def test_wrong_target_changes_nothing():
    model = MAKERS["llama"]()
    for targets, match in [(["q_proj", "v_prj"], "Near names: v_proj"), ("q_proj", "goes into a list"), ([], "matches nothing"),
                           (["model"], "not linear"), (r".*self_attn", "not linear"), (["c_attn"], "linear layers are: down_proj")]:
        with pytest.raises(QLoRAError, match=match): add_lora(model, targets)
    for bad in (dict(r=0), dict(lora_dropout=1.), dict(lora_dropout=-0.1), dict(adapter="a.b"), dict(adapter="keys"), dict(adapter="")):
        with pytest.raises(QLoRAError): add_lora(model, **bad)
    with pytest.raises(QLoRAError): add_lora(model, rank_pattern={"down_proj": 0})
    assert not any(isinstance(m, LoRA) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_partial_match_is_reported():
    with pytest.warns(UserWarning, match="in 1 of 2 blocks"): report = add_lora(MAKERS["llama"](), r".*layers\.1.*[qv]_proj", r=2)
    assert [o[:2] for o in report.rows] == [[f"model.layers.*.self_attn.{o}", "1 of 2"] for o in ("q_proj", "v_proj")]
    with pytest.warns(UserWarning, match="'k_prj' matches no layer"): add_lora(MAKERS["llama"](), rank_pattern={"k_prj": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = add_lora(MAKERS["llama"](), r=2)
    assert sum(o[-1] for o in report.rows) == 2*sum(m.in_features + m.out_features for m in MAKERS["llama"]().modules()
                                                    if isinstance(m, nn.Linear) and m.out_features != 128)


# ---- several adapters ----

def test_several_adapters():
    model = MAKERS["llama"]()
    plain = logits(model)
    our_model(model, target_modules=["q_proj"], adapter="a"), our_model(model, target_modules=["q_proj", "v_proj"], adapter="b")
    fill(model)
    set_adapter(model, "a"); a = logits(model)
    set_adapter(model, "b"); b = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
        with disable_adapter(model): assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), b) and not torch.equal(a, b)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    with pytest.raises(ZeroDivisionError), disable_adapter(model): 1/0
    assert torch.equal(logits(model), b)
    with pytest.raises(QLoRAError, match="There are: a, b"): set_adapter(model, "c")
    with pytest.raises(QLoRAError, match="'b' already"): add_lora(model, ["v_proj"], adapter="b")
    with pytest.raises(QLoRAError, match="no such adapter"): merge(MAKERS["llama"]())


# ---- files ----

@each_model
@pytest.mark.parametrize("cfg", [{}, dict(rslora=True), dict(rank_pattern={"mlp.*": 2}, alpha_pattern={".*0.*": 3})],
                         ids=["plain", "rslora", "patterns"])
def test_peft_loads_ours(make, cfg, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a pattern need not match in every architecture
        ours = fill(our_model(make(), **cfg))
    save_adapter(ours, tmp_path, base_model="smollm2")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's way to speak of a missing key
        theirs = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    assert torch.equal(logits(theirs), logits(ours))
    again = make()
    load_adapter(again, tmp_path, "again")
    assert torch.equal(logits(again), logits(ours)) and count_params(again) == count_params(ours)


@each_model
@pytest.mark.parametrize("cfg", [{}, dict(use_rslora=True), dict(r=3, rank_pattern={r"layers\.1\..*": 5, "c_attn": 2}),
                                 dict(alpha_pattern={"o_proj": 1, "dense": 2, "c_fc": 3}),
                                 dict(layers_to_transform=[1], kinds=["q_proj", "query_key_value", "c_attn", "absent"])],
                         ids=["plain", "rslora", "ranks", "alphas", "some layers"])
def test_we_load_pefts(make, cfg, tmp_path):
    cfg = dict(cfg)
    if kinds := cfg.pop("kinds", None): cfg["target_modules"] = kinds
    theirs = fill(peft_model(make(), **cfg))
    theirs.save_pretrained(tmp_path/"theirs")
    ours = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `some layers` is a partial match, and says so
        load_adapter(ours, tmp_path/"theirs")
    assert torch.equal(logits(ours), logits(theirs))
    assert count_params(ours).total == count_params(theirs).total
    save_adapter(ours, tmp_path/"ours")  # and back
    mine, his = (load_file(tmp_path/o/"adapter_model.safetensors") for o in ("ours", "theirs"))
    assert mine.keys() == his.keys() and all(torch.equal(mine[k], his[k]) for k in his)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), str(tmp_path/"ours")).eval()), logits(theirs))


def test_same_training_run():
    "Ten steps of gradient descent go through the same losses as with PEFT."
    runs = []
    for model in (peft_model(MAKERS["llama"]()), our_model(MAKERS["llama"]())):
        params = [p for p in model.parameters() if p.requires_grad]
        runs.append([])
        for _ in range(10):
            loss = model(input_ids=IDS, labels=IDS).loss
            for p, g in zip(params, torch.autograd.grad(loss, params)): p.data -= g
            runs[-1].append(loss.item())
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]


def config(path): return json.loads((path/"adapter_config.json").read_text(encoding="utf-8"))


def test_config_says_what_is_there(tmp_path):
    model = our_model(MAKERS["llama"](), target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    for base in (None, "smollm2", "org/name"):
        save_adapter(model, tmp_path, base_model=base)
        assert config(tmp_path)["base_model_name_or_path"] == base
    assert str(tmp_path) not in (tmp_path/"adapter_config.json").read_text(encoding="utf-8")
    cfg = config(tmp_path)
    assert cfg["target_modules"] == ["q_proj", "v_proj"] and (cfg["r"], cfg["lora_alpha"], cfg["lora_dropout"]) == (4, 8, 0.1)
    with pytest.warns(UserWarning, match="1 of 2"): some = our_model(MAKERS["llama"](), target_modules=["layers.0.mlp.up_proj"])
    save_adapter(some, tmp_path/"some")
    assert config(tmp_path/"some")["target_modules"] == ["model.layers.0.mlp.up_proj"]


def test_save_is_atomic(tmp_path, monkeypatch):
    model = fill(our_model(MAKERS["llama"]()))
    (tmp_path/"notes.txt").write_text("kept", encoding="utf-8")
    save_adapter(model, tmp_path)
    before = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    def full(*args, **kwargs): raise OSError("no space left on device")
    monkeypatch.setattr(lora_model, "save_file", full)
    with pytest.raises(OSError): save_adapter(fill(model, seed=8), tmp_path)
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir()} == before
    with pytest.raises(QLoRAError, match="There are: default"): save_adapter(model, tmp_path, "other")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_adapter(fill(our_model(MAKERS["llama"](), target_modules=["q_proj", "v_proj"])), path, base_model="smollm2")
    return path


def copy_of(saved, tmp_path, change=lambda cfg, tensors: None):
    "A copy of an adapter, changed in place by `change(cfg, tensors)`."
    cfg, tensors = config(saved), load_file(saved/"adapter_model.safetensors")
    change(cfg, tensors)
    (tmp_path/"adapter_config.json").write_text(json.dumps(cfg), encoding="utf-8")
    save_file(tensors, tmp_path/"adapter_model.safetensors")
    return tmp_path


Q = PREFIX + "model.layers.1.self_attn.q_proj.lora_A.weight"
MISFITS = {
    "missing": (lambda c, t: t.pop(Q), f"missing: {Q} .1 in all"),
    "unknown": (lambda c, t: t.update(extra=torch.zeros(1)), "unknown: extra .1 in all"),
    "shape": (lambda c, t: t.update({Q: torch.zeros(4, 63)}), rf"{Q} is \(4, 63\), not \(4, 64\)"),
    "rank": (lambda c, t: c.update(r=8), r"is \(4, 64\), not \(8, 64\)"),
    "more targets": (lambda c, t: c.update(target_modules=["q_proj", "v_proj", "k_proj"]), "missing: .*k_proj.lora_A.weight"),
    "other names": (lambda c, t: c.update(target_modules=["query_key_value"]), "unknown: .*lora_A.weight.* .8 in all"),
    "dora": (lambda c, t: c.update(use_dora=True), "not plain LoRA: use_dora=True"),
    "pissa": (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights=pissa"),
    "ia3": (lambda c, t: c.update(peft_type="IA3"), "peft_type=IA3"),
    "from the future": (lambda c, t: c.update(new_method={"x": 1}), "new_method"),
}


@pytest.mark.parametrize("change, match", MISFITS.values(), ids=MISFITS)
def test_misfit_is_named_and_changes_nothing(saved, tmp_path, change, match):
    model = MAKERS["llama"]()
    with pytest.raises(QLoRAError, match=match): load_adapter(model, copy_of(saved, tmp_path, change))
    assert not any(isinstance(m, LoRA) for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_other_models_and_empty_folders(saved, tmp_path):
    with pytest.raises(QLoRAError, match=r"not \(4, 32\)"):
        load_adapter(tiny_model("llama", vocab_size=128, hidden_size=32, intermediate_size=96), saved)
    with pytest.raises(QLoRAError, match="unknown"): load_adapter(MAKERS["falcon"](), saved)
    with pytest.raises(QLoRAError, match="adapter_config.json"): load_adapter(MAKERS["llama"](), tmp_path)
    model = MAKERS["llama"]()
    load_adapter(model, copy_of(saved, tmp_path))
    with pytest.raises(QLoRAError, match="'default' already"): load_adapter(model, saved)
    load_adapter(model, saved, "second")
    assert sorted({o for m in lora_layers(model).values() for o in m.hyper}) == ["default", "second"]
