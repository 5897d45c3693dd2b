"Every architecture through the whole way: load, audit in bytes, adapters, a step, save, load again. See nbs/experiments/architectures.py."
import json, sys

import pytest, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from common import ROOT
sys.path.insert(0, str(ROOT/"nbs"/"experiments"))
import architectures
from architectures import IDS, build, check, right

from peft import PeftModel
from qlora_nb.foundations.adapters import adapted_layers, adapted_parameters, adapter_coverage, add_adapters, as_named, attach_adapter, save_adapter
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import count_params, stored_results
from qlora_nb.base.nf4_config import nf4_config, quiet
from qlora_nb.foundations.loading import audit_4bit, load_model
from qlora_nb.foundations.qlora import load_scratch
from qlora_nb.training.rehearsal import coverage
from qlora_nb.base.weights import acts_linear, list_weights, routers

FAST = "qwen3 gemma2 gpt2 falcon mixtral qwen3_moe gpt_oss deepseek_v3 jetmoe phimoe mamba mamba2 nemotron_h qwen3_next".split()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    def get(name):
        if name not in made: made[name] = build(name, str(tmp_path_factory.mktemp(name)))
        return made[name]
    return get


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("backend", ["bnb", "scratch"])
def test_the_whole_way(name, backend, folders):
    facts = check(name, backend, folders(name))
    assert right(facts), facts
    # a fused kernel takes the weight of nemotron_h's out_proj in training alone, as that of mamba2
    if "refused" in facts: assert backend == "scratch" and name in ("mamba", "mamba2", "nemotron_h"), facts


OTHERS = dict(   # of kinds that the matrix does not have
    gemma3n=("Gemma3nText", architectures.DENSE | dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
             num_kv_shared_layers=0, hidden_size_per_layer_input=16, vocab_size_per_layer_input=160, laurel_rank=8, activation_sparsity_pattern=[0., 0.], altup_num_inputs=2)),
    hunyuan_moe=("HunYuanMoEV1", architectures.MOE | dict(num_experts=4, moe_topk=2)))
MORE = OTHERS | dict(   # a router's loss without routers, experts renamed by PEFT, positions that are computed and rounded, a decoder that is the head
    doge=("Doge", architectures.DENSE), laguna=("Laguna", architectures.MOE | dict(num_experts=4, moe_intermediate_size=64)),
    ctrl=("CTRL", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4, dff=128)),
    modernbert=("ModernBertDecoder", architectures.DENSE))

@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_an_architecture_takes_itself(name, tmp_path):
    "Clamped while it trains, two layers after one another; or in float32, which it asks for before it routes, and `make_fast` leaves so."
    from qlora_nb.speed.fast_training import to_16_bits
    kind, fields = OTHERS[name]
    folder = build(name, str(tmp_path/"base"), getattr(transformers, f"{kind}Config")(**fields))
    facts = check(name, folder=folder)
    assert right(facts), facts
    model = load_model(folder, device="cpu", dtype=torch.bfloat16)
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {o.split(".")[-2] for o in wide} == ({"wg"} if name == "hunyuan_moe" else set())
    model.model.norm.weight.data = model.model.norm.weight.data.float()   # as PEFT's preparation does
    assert to_16_bits(add_adapters(model, r=4), torch.bfloat16) == ["base_model.model.model.norm.weight"]


# the type of a weight is computed in, an indexer without a gradient, a mask that is only made for attention of known names
SPARSE = "GlmMoeDsa", architectures.MLA | dict(num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], n_group=1, index_topk=4, index_head_dim=16, index_n_heads=2)
BIRD = "BigBird", architectures.BASE | dict(is_decoder=True, intermediate_size=128, attention_type="original_full")   # a pooler, and a layer before the head

@pytest.mark.parametrize("name, left, backend", [("sparse", "indexer.wk indexer.wq_b", "bnb"), ("sparse", "indexer.wk indexer.wq_b", "scratch"), ("bird", "bert.pooler", "bnb")])
def test_layers_that_no_gradient_reaches(name, left, backend, tmp_path):
    from common import small_tokenizer
    from qlora_nb.training.finetune import finetune
    from qlora_nb.training.saved_adapters import load_adapter
    from qlora_nb.training.tickets import make_tickets
    tok, (kind, fields) = small_tokenizer(), dict(sparse=SPARSE, bird=BIRD)[name]
    base = build(name, str(tmp_path/"base"), getattr(transformers, f"{kind}Config")(**fields | dict(vocab_size=len(tok), max_position_embeddings=512)))
    tok.save_pretrained(base)
    facts = check(name, backend, base)
    assert right(facts), facts
    with pytest.warns(UserWarning, match=f"no gradient reaches .*{left.split()[-1]} of {kind}ForCausalLM: left out"):
        run = finetune(base, make_tickets("train")[:8], output_dir=tmp_path/"run", max_steps=2, device="cpu", backend=backend, progress=False, per_device_train_batch_size=2, max_length=128)
    names = adapted_layers(run.model)
    assert names and not [n for n in names if n.endswith(tuple(left.split()))]
    if name == "sparse": assert {type(run.model.get_submodule(n)) for n, _ in run.model.named_modules() if n.endswith("weights_proj")} == {torch.nn.Linear}
    else: assert run.model.get_submodule("base_model.model.cls.predictions.transform.dense").lora_B["default"].weight.any()
    with torch.no_grad(): a, b = (m.eval()(input_ids=IDS + 100).logits for m in (run.model, load_adapter(run.folder, device="cpu").model))
    assert torch.equal(a, b)


def test_attention_is_called_by_the_names_of_transformers():
    from qlora_nb.speed.cpu import attention_float32
    q = torch.randn(1, 2, 3, 4)
    y, _ = attention_float32(torch.nn.Module(), q, q, q, attention_mask=None)   # as Doge and Afmoe call it
    assert y.shape == (1, 3, 2, 4)


def test_the_stored_matrix():
    rows = stored_results("architectures")["rows"]
    assert {r["model"] for r in rows} == set(architectures.ZOO) and len(architectures.ZOO) > 100
    runs = stored_results("architectures")["runs"]
    assert [r["model"] for r in runs] == list(architectures.ZOO) and all(map(architectures.right_run, runs)), runs
    assert all(map(right, rows)), [r for r in rows if not right(r)]


def raw(folder): return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4_config(torch.float32), dtype=torch.float32)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_wide_experts_do_not_pass(name, folders):
    "Every linear layer is in 4 bits, and most of the weights are not."
    with quiet(): model = raw(folders(name))
    with pytest.raises(QLoRAError, match=r"\d\d% of the weights are not in NF4; the largest is model\.layers\.\d\..*experts\.\w+ \([\d,]+ bytes\)"):
        audit_4bit(model)


@pytest.mark.parametrize("load", [load_model, load_scratch])
def test_every_number_is_in_the_table(load, folders):
    model = load(folders("deepseek_v3"), device="cpu", dtype=torch.float32)
    want = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders("deepseek_v3")).parameters())
    rows = audit_4bit(model).table.rows
    assert sum(int(r[2].replace(",", "")) for r in rows) == want == count_params(model).total == sum(w.numel for w in list_weights(model))
    assert abs(sum(r[4] for r in rows) - 1) < 1e-9


def test_routers_stay_wide(folders):
    for name, n in (("jetmoe", 4), ("phimoe", 2)):
        for load in (load_model, load_scratch):
            model = load(folders(name), device="cpu", dtype=torch.float32)
            assert len(routers(model)) == n and all(isinstance(model.get_submodule(o), torch.nn.Linear) for o in routers(model))
            assert not set(routers(model)) & set(adapted_layers(add_adapters(model, 2)))
    assert not acts_linear(load_model(folders("phimoe"), device="cpu").model.layers[0].mlp.router)


@pytest.mark.parametrize("load", [load_model, load_scratch])
def test_a_shared_expert_as_small_as_the_number_of_experts_is_no_router(load, tmp_path):
    "As in Qwen3-Next, whose 512 experts and shared expert of 512 would leave that wide and without adapters."
    kind, fields = architectures.ZOO["qwen3_next"]
    config = transformers.Qwen3NextConfig(**fields | dict(num_experts=64, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]))
    model = load(build("next", str(tmp_path), config), device="cpu", dtype=torch.float32)
    assert {o.rpartition(".")[2] for o in routers(model)} == {"shared_expert_gate"}
    model = add_adapters(model, 2)
    assert sum(".shared_expert." in o for o in adapted_layers(model)) == 6 and {o.rpartition(".")[2] for o in routers(model)} == {"shared_expert_gate"}


def test_a_router_with_outputs_for_experts_that_are_none_stays_wide(folders):
    "LongCat's: 4 experts, and 2 that hand a token on as it is."
    model = load_model(folders("longcat"), device="cpu", dtype=torch.float32)
    assert routers(model) == [f"model.layers.{i}.mlp.router.classifier" for i in range(2)]
    assert all(type(model.get_submodule(o)) is torch.nn.Linear for o in routers(model))


@pytest.mark.parametrize("load", [load_model, load_scratch])
@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "up_proj"], "all-linear"])
def test_shared_and_dense_layers_keep_their_adapters(targets, load, folders):
    "PEFT takes these names for experts, and would put nothing on the dense MLP and the shared expert."
    model = add_adapters(load(folders("deepseek_v3"), device="cpu", dtype=torch.float32), 2, target_modules=targets, lora_dropout=.1)
    names = adapted_layers(model)
    for o in ("model.layers.0.mlp.", "model.layers.1.mlp.shared_experts."):
        for t in ["gate_proj", "up_proj", "down_proj"] if targets == "all-linear" else targets: assert o + t in names
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


STACKS = dict(mixtral=["experts.gate_up_proj", "experts.down_proj"], deepseek_v3=["mlp.experts.down_proj"], jetmoe=["input_linear.weight", "output_linear.weight"],
              gpt_oss=["gate_up_proj", "model.layers.0.mlp.experts.down_proj"], nemotron_h=["experts.up_proj", "experts.down_proj"])


@pytest.mark.parametrize("name", STACKS)
def test_adapters_on_experts(name, folders, tmp_path):
    "Those of PEFT on the weights as parameters: same logits and gradients, in the second step too, and one file for both."
    def load(): return load_model(folders(name), device="cpu", dtype=torch.float32)
    twin, how = architectures.written_out(load(), folders(name)), dict(r=4, lora_alpha=8, target_parameters=STACKS[name])
    model = add_adapters(load(), **how)
    twin = add_adapters(twin, target_modules=adapted_layers(model), **how)
    for _ in range(2): (y, g), (y_twin, g_twin) = architectures.gradients(model), architectures.gradients(twin)
    assert (y - y_twin).norm() < 1e-5*y_twin.norm() and g.keys() == g_twin.keys()
    for n in g: assert torch.cosine_similarity(g[n].flatten(), g_twin[n].flatten(), 0) > .99999 and g[n].any(), n
    with torch.no_grad():
        y = model.eval()(input_ids=IDS).logits
        file = save_adapter(model, tmp_path/"a", str(folders(name)))
        with as_named(): plain = PeftModel.from_pretrained(architectures.written_out(load(), folders(name)), file).eval()
        for m in (attach_adapter(load(), file).eval(), plain): assert (m(input_ids=IDS).logits - y).norm() < 1e-5*y.norm()
        with model.disable_adapter(): assert torch.equal(model(input_ids=IDS).logits, load()(input_ids=IDS).logits)
    share = {w.name: w.numel for w in list_weights(model) if w.name in adapted_parameters(model)}
    assert share and adapter_coverage(model).rows[-1][3] >= coverage(model)[1]*.99 > .3
    assert len(routers(model)) == len(routers(load()))
    with pytest.raises(NotImplementedError, match="cannot be merged into a stack in 4 bits"): model.merge_and_unload()


@pytest.mark.parametrize("load, how, says", [
    (load_scratch, {}, "backend='bnb' only"), (load_model, dict(lora_dropout=.1), "no lora_dropout"),
    (load_model, dict(target_parameters=["experts.gate_proj"]), "Its stacks are: mlp.experts.gate_up_proj"),
    (load_model, dict(target_parameters=["q_proj.weight"]), "matches no stack of experts"),
    (load_model, dict(target_parameters="experts.down_proj"), "has to be a list")])
def test_experts_that_cannot_have_adapters(load, how, says, folders):
    model = load(folders("mixtral"), device="cpu", dtype=torch.float32)
    with pytest.raises(QLoRAError, match=says): add_adapters(model, 2, **dict(target_parameters=["experts.down_proj"]) | how)
    assert not adapted_layers(model)


def test_what_peft_refuses_is_left_out_and_said(folders):
    model = load_model(folders("falcon_h1"), device="cpu", dtype=torch.float32)
    with pytest.raises(QLoRAError, match="out_proj cannot have an adapter"): add_adapters(model, 2, target_modules=["out_proj"])
    with pytest.warns(UserWarning, match="out_proj of FalconH1ForCausalLM cannot have an adapter and is left out"): model = add_adapters(model, 2)
    assert not [n for n in adapted_layers(model) if n.endswith("out_proj")]


def as_stored(folder, tmp_path, **q):
    "A copy of a folder's config that says how its weights are quantized."
    config = json.loads((ROOT/folder/"config.json").read_text(encoding="utf-8")) | dict(quantization_config=q)
    (tmp_path/"config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("q, says", [(dict(quant_method="mxfp4"), "MXFP4"), (dict(quant_method="fp8", weight_block_size=[128, 128]), "FP8"),
    (dict(quant_method="gptq", bits=4), "GPTQ"), (dict(quant_method="awq", bits=4), "AWQ"),
    (dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"), "FP4"),
    (dict(quant_method="bitsandbytes", load_in_8bit=True), r"INT8 \(BITSANDBYTES\)")])
@pytest.mark.parametrize("bits", [4, None])
def test_other_formats_are_refused_before_loading(q, says, bits, folders, tmp_path):
    with pytest.raises(QLoRAError, match=rf"quantized already, in {says}, .*bfloat16"):
        load_model(as_stored(folders("qwen3"), tmp_path, **q), bits, device="cpu")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("theirs, ours", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_an_nf4_folder_computes_in_the_type_asked_for(theirs, ours, double, folders, tmp_path):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=theirs)
    with quiet():
        AutoModelForCausalLM.from_pretrained(folders("qwen3"), dtype=theirs, quantization_config=how).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=ours)
    audit = audit_4bit(model)
    assert len(audit.four_bit) == 14 and {r[0] for r in audit.table.rows if r[0].startswith("NF4")} == {"NF4" + " + double quantization"*double}
    assert {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")} == {ours} == {p.dtype for p in model.parameters()} - {torch.uint8}
    plain = load_model(tmp_path, None, device="cpu", dtype=ours)
    assert not getattr(plain.config, "quantization_config", None) and {p.dtype for p in plain.parameters()} == {ours}
    with torch.no_grad(): a, b = (m.train()(input_ids=IDS).logits.float() for m in (model, plain))
    assert (a - b).norm() < (1e-5 if ours == torch.float32 else .02)*b.norm()


def test_an_nf4_folder_whose_head_is_in_4_bits_too(folders, tmp_path):
    "It is written out: losses are computed from its weight, in chunks."
    from qlora_nb.speed.logits import own_loss, why_own_loss
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["nothing"])
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(folders("qwen3"), dtype=torch.float32, quantization_config=how)
        theirs.save_pretrained(tmp_path)
    packed, model = theirs.get_output_embeddings().weight, load_model(tmp_path, device="cpu", dtype=torch.float32)
    assert packed.dtype == torch.uint8 and type(model.get_output_embeddings()) is torch.nn.Linear and why_own_loss(model) is None
    with torch.no_grad(): loss = theirs.train()(input_ids=IDS, labels=IDS).loss
    assert abs(own_loss(model, dict(input_ids=IDS, labels=IDS)) - loss) < 1e-5*loss


@pytest.mark.parametrize("ours", [torch.float16, torch.float32])
def test_an_nf4_folder_whose_bytes_are_stored_as_bfloat16_is_the_same_model(ours, folders, tmp_path):
    "As FSDP wants them (bnb_4bit_quant_storage): codes are not numbers, and no change of type may touch them."
    for storage in (torch.uint8, torch.bfloat16):
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage)
        with quiet():
            AutoModelForCausalLM.from_pretrained(folders("qwen3"), dtype=torch.bfloat16, quantization_config=how).save_pretrained(tmp_path/str(storage))
    with torch.no_grad(): a, b = (load_model(tmp_path/str(o), device="cpu", dtype=ours)(input_ids=IDS).logits for o in (torch.uint8, torch.bfloat16))
    assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("name, backend, how", [("deepseek_v3", "bnb", {}), ("qwen3_next", "scratch", {}), ("mixtral", "bnb", {}), ("glm4_moe", "bnb", dict(lora_dropout=0.)),
    ("doge", "bnb", {}), ("laguna", "bnb", {}), ("ctrl", "bnb", {}),
    ("qwen3_moe", "bnb", dict(lora_dropout=0., target_parameters=["experts.gate_up_proj", "experts.down_proj"]))])
def test_what_finetune_saves_loads_and_merges(name, backend, how, tmp_path, monkeypatch):
    from common import small_tokenizer
    from qlora_nb.using.merge import merge_and_save
    from qlora_nb.training.saved_adapters import load_adapter
    from qlora_nb.training.tickets import make_tickets
    from qlora_nb.training.finetune import finetune
    tok, (kind, fields) = small_tokenizer(), (architectures.ZOO | MORE)[name]
    monkeypatch.setitem(architectures.ZOO, name, (kind, fields | dict(vocab_size=len(tok), max_position_embeddings=512)))
    base = build(name, str(tmp_path/"base"))
    tok.save_pretrained(base)
    run = finetune(base, make_tickets("train")[:8], output_dir=tmp_path/"run", max_steps=2, device="cpu", backend=backend, progress=False,
                   **dict(per_device_train_batch_size=2, max_length=256, lora_dropout=.05) | how)
    def logits(m):
        with torch.no_grad(): return m.eval()(input_ids=IDS + 100).logits.float()
    y = logits(run.model)
    assert torch.equal(logits(load_adapter(tmp_path/"run", device="cpu").model), y)
    merge_and_save(tmp_path/"run", tmp_path/"merged", dtype="float32")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged", dtype=torch.float32))
    bfloat16 = run.model.get_input_embeddings().weight.dtype == torch.bfloat16   # what this processor trained in
    assert (merged - y).norm() < (.02 if bfloat16 else 1e-5)*y.norm()


class Expert(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up, self.down = (torch.nn.Linear(*o, bias=False) for o in ((c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)))
    def forward(self, x): return self.down(torch.nn.functional.silu(self.up(x)))

class Experts(torch.nn.ModuleList):
    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            rows, k = (index == e).nonzero(as_tuple=True)
            y = y.index_add(0, rows, (expert(x[rows])*weights[rows, k, None]).to(y.dtype))
        return y

class ListConfig(MixtralConfig): model_type = "list_of_experts"

class ListForCausalLM(MixtralForCausalLM):
    config_class = ListConfig
    def __init__(self, config):
        super().__init__(config)
        for o in self.model.layers: o.mlp.experts = Experts(Expert(config) for _ in range(config.num_local_experts))
        self.post_init()

def test_experts_in_a_list_keep_the_loss_of_their_routers(tmp_path):
    "They are in no stack, and yet there are routers, whose loss is part of what is trained."
    AutoConfig.register("list_of_experts", ListConfig, exist_ok=True)
    AutoModelForCausalLM.register(ListConfig, ListForCausalLM, exist_ok=True)
    config = ListConfig(**architectures.MOE | dict(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=.5))
    facts = check("list", folder=build("list", str(tmp_path), config))
    assert right(facts), facts   # the gradient too, of which the routers' loss is a part
    assert load_model(tmp_path, device="cpu").config.router_aux_loss_coef == .5


class LinearRouter(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate, self.experts = torch.nn.Linear(c.hidden_size, c.num_local_experts, bias=False), Experts(Expert(c) for _ in range(c.num_local_experts))
    def forward(self, x):
        weights, index = self.gate(x.flatten(0, 1)).float().softmax(-1).topk(2, -1)
        return self.experts(x.flatten(0, 1), index, weights.to(x.dtype)).view_as(x)

class PlainGateConfig(MixtralConfig): model_type = "plain_gate"

class PlainGateForCausalLM(MixtralForCausalLM):
    config_class = PlainGateConfig
    def __init__(self, config):
        super().__init__(config)
        for o in self.model.layers: o.mlp = LinearRouter(config)
        self.post_init()

@pytest.mark.parametrize("backend", ["bnb", "scratch"])
def test_a_linear_router_beside_a_list_of_experts_stays_wide(backend, tmp_path):
    "It has as many outputs as the list has modules; a list of layers beside other things is none."
    AutoConfig.register("plain_gate", PlainGateConfig, exist_ok=True)
    AutoModelForCausalLM.register(PlainGateConfig, PlainGateForCausalLM, exist_ok=True)
    folder = build("plain", str(tmp_path), PlainGateConfig(**architectures.MOE | dict(num_local_experts=4)))
    model = architectures.BACKENDS[backend](folder, device="cpu", dtype=torch.float32)
    gates = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert routers(model) == gates and {w.kind for w in list_weights(model) if w.name.removesuffix(".weight") in gates} == {"router"}
    assert not {*gates} & {*adapted_layers(add_adapters(model, 2))}
    assert right(facts := check("plain", backend, folder)) and facts["adapted"] == 2*(4 + 2*4), facts


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_config_with_a_loss_for_routers_that_are_not_there(place):
    from qlora_nb.base.weights import as_it_is
    kind, fields = MORE["doge"]
    with torch.device(place): model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**fields))
    assert model.config.router_aux_loss_coef and not as_it_is(model).config.router_aux_loss_coef

def test_a_decoder_that_is_no_head(tmp_path):
    from qlora_nb.memory.planner import plan
    kind, fields = MORE["modernbert"]
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = load_model(build("modernbert", str(tmp_path/"base"), config), device="cpu", dtype=torch.float32)
    assert model.get_decoder() is model.model and plan(config, max_length=64).peak > 0
    facts = check("modernbert", folder=str(tmp_path/"base"))
    assert right(facts), facts


@pytest.mark.parametrize("how", [{}, dict(target_parameters=["experts.down_proj"])])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v3"])
def test_a_fast_step_of_a_mixture_is_the_plain_step(name, how, folders):
    from qlora_nb.speed.fast_training import make_fast
    from qlora_nb.speed.logits import own_loss
    model = add_adapters(load_model(folders(name), device="cpu", dtype=torch.float32), 4, 8, **how).train()
    architectures.gradients(model)   # adapters that are not zero
    batch, mine = dict(input_ids=IDS, labels=IDS), [p for p in model.parameters() if p.requires_grad]
    def step(loss):
        model.zero_grad()
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().clone() for p in mine])
    loss, g = step(own_loss(model, batch))
    rows = make_fast(model).rows
    assert [r[1] for r in rows if r[0] == "adapter on experts"] == [len(adapted_parameters(model))]*bool(how)
    fast, g_fast = step(getattr(model, "step_loss", lambda b: own_loss(model, b))(batch))
    assert abs(fast - loss) < 1e-5*loss and torch.cosine_similarity(g, g_fast, 0) > .99999 and (g - g_fast).norm() < 1e-4*g.norm()
