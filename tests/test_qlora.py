"Layers in 4 bits: nothing unpacked is kept, the same numbers as bitsandbytes and PEFT, and errors that name the place."
import copy, json, math
import bitsandbytes as bnb
import pytest, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import count_params, model_bytes, set_seed
from qlora_nb.foundations.lora_model import add_lora
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.foundations.qlora import NF4Function, NF4Linear, load_scratch, quantize_model, dequantize_weight
from qlora_nb.foundations.double_quantization import QuantizedTensor, quantize

import forks
from common import small_tokenizer


def gpt2():
    set_seed(0)
    cfg = GPT2Config(vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).eval()

KINDS = dict(llama=lambda: tiny_model("llama"), falcon=lambda: tiny_model("falcon"), gpt2=gpt2)
IDS = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "falcon"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    with quiet(): tiny_model(request.param).save_pretrained(path)
    return path


def saved_for_backward(model):
    "Every tensor that autograd keeps for a backward pass."
    kept = []
    def pack(t): kept.append(t); return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): loss = model(input_ids=IDS, labels=IDS).loss
    return kept, loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_kept_for_backward(kind, dtype):
    model = KINDS[kind]().to(dtype)
    dense = {tuple(m.weight.shape) for m in model.modules() if hasattr(m, "weight") and m.weight.ndim == 2}
    dense |= {s[::-1] for s in dense}
    head = tuple(model.get_output_embeddings().weight.shape)
    quantize_model(model)
    add_lora(model, r=4, lora_alpha=8)
    kept, loss = saved_for_backward(model.train())
    big = [tuple(t.shape) for t in kept if tuple(t.shape) in dense - {head, head[::-1]}]
    assert not big, f"unpacked weights of these shapes are kept: {big}"
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen: continue
        seen.add(node), nodes.extend(n for n, _ in node.next_functions)
        if type(node).__name__ == "NF4FunctionBackward":
            assert list(vars(node)) == ["q"] and isinstance(node.q, QuantizedTensor) and node.q.bits_per_param < 5
    assert any(type(n).__name__ == "NF4FunctionBackward" for n in seen)


def test_the_check_above_can_fail(monkeypatch):
    "With a layer that lets autograd keep the weight, the check finds it."
    monkeypatch.setattr(NF4Linear, "forward", lambda self, x: nn.functional.linear(x, self.dequantize(), self.bias))
    with pytest.raises(AssertionError, match="unpacked weights"): test_no_weight_is_kept_for_backward("llama", torch.float32)


def adapted(ours, lib, r=4, alpha=12):
    "The same random adapters on both; {our name: parameter} for each."
    add_lora(ours, r=r, lora_alpha=alpha)
    lib = get_peft_model(lib, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
    for p in lib.parameters():
        if p.requires_grad: p.data = p.data.float()
    a, b = ({n.replace("base_model.model.", ""): p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, lib))
    assert list(a) == list(b)
    set_seed(1)
    for n in a: nn.init.normal_(a[n], std=.1), b[n].data.copy_(a[n].data)
    return lib, a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [8, 12])   # scaled by 2, a power of two, and by 3
def test_equal_to_bitsandbytes_and_peft(folder, dtype, alpha):
    ours, lib = (f(str(folder), device="cpu", dtype=dtype) for f in (load_scratch, load_model))
    packed = [(m.packed, lib.get_submodule(n).weight.data.view(-1)) for n, m in ours.named_modules() if isinstance(m, NF4Linear)]
    assert len(packed) >= 8 and all(torch.equal(a, b) for a, b in packed)
    assert abs(model_bytes(ours)/model_bytes(lib) - 1) < 0.05 and count_params(ours) == (count_params(ours).trainable, count_params(lib).total)
    lib, a, b = adapted(ours, lib, alpha=alpha)
    out = [m.train()(input_ids=IDS, labels=IDS) for m in (ours, lib)]
    for o in out: o.loss.backward()
    assert torch.equal(out[0].logits, out[1].logits) and out[0].loss.item() == out[1].loss.item()
    for n in a:
        assert torch.allclose(a[n].grad, b[n].grad, rtol=1e-5, atol=1e-7*a[n].grad.abs().max().item()), n
        assert a[n].grad.abs().max() > 0


def test_conv1d_is_turned():
    model = gpt2()
    dense = {n: m.weight.T.clone() for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    with torch.no_grad(): before = model(input_ids=IDS).logits
    quantize_model(model)
    for n, W in dense.items(): assert torch.equal(model.get_submodule(n).dequantize(), quantize(W).dequantize())
    with torch.no_grad(): after = model(input_ids=IDS).logits
    assert 0 < ((after - before).norm()/before.norm()).item() < 0.5


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("double", [True, False])
def test_gradient_by_hand(codebook, block_size, double):
    set_seed(0)
    q = quantize(torch.randn(48, 80), codebook, block_size, double)
    layer = NF4Linear(q, torch.randn(48))
    x = torch.randn(3, 5, 80, requires_grad=True)
    layer(x).backward(g := torch.randn(3, 5, 48))
    W = q.dequantize()
    assert torch.allclose(x.grad, g @ W, atol=1e-5) and torch.allclose(layer(x), x @ W.T + layer.bias, atol=1e-5)
    for d in (torch.float32, torch.bfloat16, torch.float16): assert torch.equal(dequantize_weight(q, d), q.dequantize(d))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 50), (96, 64), (64, 96), (1, 128), (7, 640)])
def test_write_out_is_dequantize(shape):
    set_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for block in (64, 128):
            q = quantize(torch.randn(shape), "nf4", block)
            assert torch.equal(dequantize_weight(q, dtype), q.dequantize(dtype))


def test_a_layer_travels(tmp_path):
    "Through a state dict, a safetensors file and a copy; and no gradient ever reaches it."
    set_seed(0)
    a, b = (NF4Linear(quantize(torch.randn(64, 128)), torch.randn(64)) for _ in range(2))
    x = torch.randn(4, 128)
    assert not torch.equal(a(x), b(x))
    save_file(a.state_dict(), tmp_path/"a.safetensors")
    b.load_state_dict(load_file(tmp_path/"a.safetensors"))
    assert torch.equal(a(x), b(x)) and torch.equal(a(x), copy.deepcopy(a)(x))
    assert not any(p.requires_grad for p in a.parameters()) and a(x).requires_grad is False
    assert torch.equal(a.bfloat16().packed, b.packed), "a change of dtype must leave the codes alone"


def test_dtype_in_is_dtype_out():
    layer = NF4Linear(quantize(torch.randn(32, 64)), dtype=torch.bfloat16)
    for d in (torch.float32, torch.bfloat16, torch.float16): assert layer(torch.randn(2, 64, dtype=d)).dtype == d


def test_errors_name_the_place(folder):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.inf
    with pytest.raises(QLoRAError, match="layers.1.mlp.up_proj"): quantize_model(model)
    for m in (load_scratch(str(folder), device="cpu"), load_model(str(folder), device="cpu")):
        with pytest.raises(QLoRAError, match="in 4 bits already"): quantize_model(m)
    with pytest.raises(QLoRAError, match="no codebook is called 'nf5'"): quantize_model(tiny_model("llama"), "nf5")


def test_double_backward_is_refused():
    x = torch.randn(2, 64, requires_grad=True)
    g, = torch.autograd.grad(NF4Function.apply(x, None, quantize(torch.randn(8, 64))).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError): g.sum().backward()


def test_the_command_trains_with_our_layers(tmp_path):
    "`--backend scratch` writes the same kind of adapter, and a run cannot be resumed with the other backend."
    rows = [dict(prompt=f"Say {i}.", response=f"{i}!") for i in range(20)]
    (tmp_path/"rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code = "import sys; from qlora_nb.apps.cli import finetune_main; finetune_main(sys.argv[1:])"
    tok = small_tokenizer()
    model = tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2)
    with quiet(): model.save_pretrained(tmp_path/"base"), tok.save_pretrained(tmp_path/"base")
    size = sum(16*(m.in_features + m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    how = ["--model", tmp_path/"base", "--data", tmp_path/"rows.jsonl", "--output-dir", tmp_path/"run", "--max-steps", "2", "--eval-rows", "2"]
    def run(*o): return forks.run(code, *how, *o)
    p = run("--backend", "scratch")
    assert p.returncode == 0, p.stderr
    info = json.loads((tmp_path/"run"/"run.json").read_text(encoding="utf-8"))
    assert info["settings"]["backend"] == "scratch" and info["trainable_parameters"] == size
    assert (tmp_path/"run"/"adapter"/"adapter_model.safetensors").exists()
    assert "adapter_model.safetensors" in {o.name for o in (tmp_path/"run"/"checkpoints"/"checkpoint-2").iterdir()}
    p = run("--backend", "bnb", "--resume")
    assert p.returncode == 2 and "backend was scratch, now bnb" in p.stderr
