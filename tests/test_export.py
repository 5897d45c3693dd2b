"Merging, writing and reading back: adapters of every kind, folders that are whole or absent, cards whose code runs."
import json, re, shutil, signal, sys, time
from collections import namedtuple
from pathlib import Path

import pytest, torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from tokenizers import pre_tokenizers as pre
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_nb.foundations.adapters import BACKENDS, add_adapters, save_adapter
from qlora_nb.base.new_folder import new_folder
from qlora_nb.using.model_card import export_adapter, read_source
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import set_seed
from qlora_nb.using.merge import ONTO, merge_and_save, merged
from qlora_nb.using.gguf import export_gguf, export_run, pair_neighbours, pre_name, write_gguf
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import quiet

from common import small_tokenizer
from forks import Fork, run

Disk = namedtuple("Disk", "total used free")
IDS = torch.arange(3, 27).view(2, 12)
F32 = dict(dtype="float32", trained_in="float32")


def make_base(folder, kind="llama", **config):
    tok = small_tokenizer()
    with quiet(): tiny_model(kind, vocab_size=len(tok), hidden_size=64, **config).save_pretrained(folder), tok.save_pretrained(folder)
    return folder


def make_adapter(base, folder, backend="bnb", template="auto", **peft):
    "An adapter that changes the model a lot, and the model that it is on."
    model = BACKENDS[backend](str(base), device="cpu", dtype=torch.float32)
    set_seed(0)
    if peft: model = get_peft_model(model, LoraConfig(**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | peft))
    else: model = add_adapters(model, 4)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.05)
    with quiet(): save_adapter(model, folder, str(base), template=template, example="Hello there")
    return model.eval()


def logits(model):
    with torch.no_grad(): return model(input_ids=IDS).logits.float()


def greedy(model): return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)


def from_gguf(path):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                    quantization_config=GgufConfig(dequantize=True))


def code_runs(card, folder):
    code = re.search(r"```python\n(.*?)\n```", card, re.S)[1]
    r = run(code, cwd=folder)
    assert r.returncode == 0, r.stderr
    return code


@pytest.fixture(scope="session")
def llama(tmp_path_factory): return make_base(tmp_path_factory.mktemp("base")/"tiny-llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def adapter(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")/"adapter"
    make_adapter(llama, folder)
    return folder


# ---- the merge ----

CASES = [("llama", "bnb", {}), ("llama", "scratch", {}), ("falcon", "bnb", {}), ("falcon", "scratch", {}),
         ("llama", "bnb", dict(use_dora=True)), ("llama", "bnb", dict(use_rslora=True)), ("falcon", "bnb", dict(use_dora=True)),
         ("llama", "bnb", dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}))]


@pytest.mark.parametrize("kind,backend,peft", CASES, ids=[f"{k}-{b}-{'-'.join(p)}" for k, b, p in CASES])
def test_merged_is_the_model_that_was_trained(kind, backend, peft, tmp_path):
    base = make_base(tmp_path/"base", kind)
    model = make_adapter(base, tmp_path/"adapter", backend, **peft)
    want = logits(model)
    def error(m): return ((logits(m) - want).abs().max()/want.abs().max()).item()
    errors = {o: error(merged(tmp_path/"adapter", o, **F32).model) for o in ONTO}
    assert errors["dequantized"] < 1e-5, errors   # the order in which float32 adds
    assert min(errors["original"], errors["4bit"]) > 1e-2, errors
    out = merge_and_save(tmp_path/"adapter", tmp_path/"out", **F32)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(greedy(plain), greedy(model)) and error(plain) < 1e-5
    assert not hasattr(plain.config, "quantization_config") and type(plain).__name__.lower() == f"{kind}forcausallm"


def test_what_lies_in_the_folder(adapter, llama, tmp_path):
    out = merge_and_save(adapter, tmp_path/"out", dtype="bfloat16", trained_in="float32")
    names = {o.name for o in out.iterdir()}
    assert names == {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}
    with safe_open(out/"model.safetensors", "pt") as f:
        assert "lm_head.weight" not in f.keys(), "tied embeddings were written twice"
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.bfloat16}
    tok = load_tokenizer()
    assert AutoTokenizer.from_pretrained(out).chat_template == tok.chat_template
    assert {k: v for k, v in json.loads((out/"generation_config.json").read_bytes()).items() if k.endswith("_id")} == dict(
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    for o in out.iterdir():
        if o.suffix in (".json", ".md", ".jinja"):
            said = o.read_text(encoding="utf-8")
            assert not {str(tmp_path), str(llama), str(Path.home())} & {m for m in re.findall(r"/[\w./-]+", said)}, o.name
            assert str(llama.parent) not in said and str(adapter.parent) not in said, o.name
    assert [o.name for o in tmp_path.iterdir()] == ["out"]


def test_base_with_odd_sampling_defaults(adapter, llama, tmp_path):
    "A generation_config that transformers itself would refuse to save, as some models on the Hub have."
    base = tmp_path/"base"
    shutil.copytree(llama, base)
    odd = dict(temperature=.7, top_p=.9, do_sample=False, eos_token_id=[0, 2])
    (base/"generation_config.json").write_text(json.dumps(odd), encoding="utf-8")
    out = merge_and_save(adapter, tmp_path/"out", base=str(base), **F32)
    made = json.loads((out/"generation_config.json").read_text(encoding="utf-8"))
    assert made["eos_token_id"] == [2, 0] and "temperature" not in made


def test_the_template_of_training_is_saved(llama, tmp_path):
    make_adapter(llama, tmp_path/"adapter", template="article")
    tok = AutoTokenizer.from_pretrained(merge_and_save(tmp_path/"adapter", tmp_path/"out", **F32))
    text = tok.apply_chat_template([dict(role="user", content="Hi")], tokenize=False, add_generation_prompt=True)
    assert text == "### Instruction:\nHi\n\n### Response:\n"


def test_the_noted_format_is_used(llama, tmp_path):
    model = make_adapter(llama, tmp_path/"adapter")
    for dtype in ("bfloat16", "float32"):
        save_adapter(model, tmp_path/"adapter", str(llama), template="auto", dtype=dtype)
        assert merged(tmp_path/"adapter").facts["base_in"] == dtype
    assert merged(tmp_path/"adapter", trained_in=torch.bfloat16).facts["base_in"] == "bfloat16"


# ---- refusals ----

def test_not_everything_can_be_merged(llama, adapter, tmp_path):
    make_adapter(llama, tmp_path/"more", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(QLoRAError, match=r"cannot be merged here: modules_to_save=\['lm_head'\]"): merged(tmp_path/"more")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(llama)
        get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(tmp_path/"prompt")
    with pytest.raises(QLoRAError, match="of the kind PROMPT_TUNING"): merged(tmp_path/"prompt", base=str(llama))
    with quiet(): save_adapter(add_adapters(BACKENDS["bnb"](str(llama), device="cpu")), tmp_path/"fresh", str(llama))
    with pytest.raises(QLoRAError, match="the adapter changes nothing"): merged(tmp_path/"fresh")
    with pytest.raises(QLoRAError, match="there is no onto='8bit'. Choose from: dequantized, original, 4bit"): merged(adapter, "8bit")
    with pytest.raises(QLoRAError, match="'int4' is no format"): merged(adapter, dtype="int4")
    with pytest.raises(QLoRAError, match="there is no adapter here"): merged(llama)


@pytest.mark.parametrize("other", [dict(num_hidden_layers=3), dict(num_hidden_layers=1), dict(intermediate_size=128)])
def test_another_base_is_noticed(llama, tmp_path, other):
    "PEFT itself leaves out what does not fit, for more or fewer layers without an error."
    make_adapter(llama, tmp_path/"adapter", target_modules=["q_proj", "up_proj"])
    base = make_base(tmp_path/"base", **other)
    with pytest.raises(QLoRAError, match="the adapter does not fit"): merged(tmp_path/"adapter", base=str(base))


def test_too_large_for_float16(llama, tmp_path):
    model = make_adapter(llama, tmp_path/"adapter")
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.mul_(1e7)
    with quiet(): save_adapter(model, tmp_path/"adapter", str(llama))
    with pytest.raises(QLoRAError, match="a weight is too large for torch.float16. Choose dtype='bfloat16'"): merged(tmp_path/"adapter", dtype="float16")
    merged(tmp_path/"adapter", dtype="bfloat16")


@pytest.mark.parametrize("form", ["safetensors", "adapter", "gguf"])
def test_a_folder_in_use_and_a_full_disk(form, adapter, tmp_path, monkeypatch):
    (tmp_path/"used").mkdir(), (tmp_path/"used"/"mine").write_text("x", encoding="utf-8")
    with pytest.raises(QLoRAError, match="there is something here already"): export_run(adapter, tmp_path/"used", form)
    (tmp_path/"file").write_text("x", encoding="utf-8")
    with pytest.raises(QLoRAError, match="there is something here already"): export_run(adapter, tmp_path/"file", form)
    monkeypatch.setattr("shutil.disk_usage", lambda p: Disk(10**9, 10**9, 10))
    with pytest.raises(QLoRAError, match="and the disk has 10 B left. Make room"): export_run(adapter, tmp_path/"new", form)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["file", "used"]


LIMIT = """
import resource, signal, sys
from qlora_nb.base.errors import QLoRAError
from qlora_nb.using.gguf import export_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))   # no file may grow beyond this: writing fails half way
try: export_run(*sys.argv[1:])
except QLoRAError as e: print(e)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("form", ["safetensors", "adapter", "gguf"])
def test_a_write_that_fails_half_way(form, adapter, tmp_path):
    r = run(LIMIT, adapter, tmp_path/"new", form)
    assert "could not be written" in r.stdout and "Nothing was left behind." in r.stdout, r.stderr
    assert not list(tmp_path.iterdir())


KILL = """
import sys, time
from pathlib import Path
from qlora_nb.using.gguf import export_run
def slow(self, *a, **k): print("writing", flush=True); time.sleep(60)
Path.write_text = slow   # the card is written last
export_run(*sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_killed_before_the_end(form, adapter, tmp_path):
    p = Fork(KILL, adapter, tmp_path/"new", form)
    while p.said() != "writing\n" and p.poll() is None: time.sleep(.01)
    assert p.poll() is None, p.communicate()
    p.send_signal(signal.SIGKILL), p.communicate()
    assert not (tmp_path/"new").exists() and [o.name.startswith("new.partial-") for o in tmp_path.iterdir()] == [True]
    export_run(adapter, tmp_path/"new", form)   # and the next attempt is not in its way
    assert (tmp_path/"new"/"README.md").exists()


def test_an_empty_folder_may_be_given(tmp_path):
    (tmp_path/"empty").mkdir()
    with new_folder(tmp_path/"empty") as new: (new/"x").write_text("1", encoding="utf-8")
    with new_folder(tmp_path/"a"/"b") as new: (new/"x").write_text("2", encoding="utf-8")
    assert (tmp_path/"empty"/"x").read_bytes() + (tmp_path/"a"/"b"/"x").read_bytes() == b"12"
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path/"c") as new: raise KeyboardInterrupt
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a", "empty"]


# ---- cards ----

@pytest.mark.parametrize("form", ["safetensors", "adapter", "gguf"])
def test_the_code_of_a_card_runs(form, adapter, tmp_path):
    export_run(adapter, tmp_path/"new", form, trained_in="float32")
    card = (tmp_path/"new"/"README.md").read_text(encoding="utf-8")
    assert "Hello there" in code_runs(card, tmp_path/"new")
    assert str(tmp_path) not in card and str(adapter.parent) not in card


def test_an_adapter_that_only_peft_knows(llama, tmp_path):
    "Saved by PEFT, without our notes, for a base whose tokenizer has no template: nothing is made up."
    base = tmp_path/"base"
    make_base(base)
    (base/"chat_template.jinja").unlink()
    model = make_adapter(base, tmp_path/"ours")
    with quiet(): model.save_pretrained(tmp_path/"theirs")
    out = merge_and_save(tmp_path/"theirs", tmp_path/"out", **F32)
    card = (out/"README.md").read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    assert "apply_chat_template" not in card and "without the notes of its training run" in card
    code_runs(card, out)


def test_an_adapter_alone_loads_again(adapter, tmp_path):
    out = export_adapter(adapter, tmp_path/"out")
    a, b = read_source(adapter), read_source(out)
    assert (a.config, a.notes) == (b.config, b.notes)
    assert (out/"adapter_model.safetensors").read_bytes() == (adapter/"adapter_model.safetensors").read_bytes()


# ---- GGUF ----

@pytest.mark.parametrize("config", [dict(vocab_size=1200, num_key_value_heads=4), dict(tie_word_embeddings=True, num_key_value_heads=1)],
                         ids=str)   # ids that the vocabulary does not use; a tied head
def test_gguf_gives_the_same_weights(config, tmp_path):
    tok = small_tokenizer()   # 46_gguf writes the whole one
    model = tiny_model("llama", **dict(vocab_size=len(tok), hidden_size=64) | config)
    back = from_gguf(write_gguf(model, tok, tmp_path/"a.gguf", "f32"))
    have, want = dict(back.named_parameters()), dict(model.named_parameters())
    assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in want)
    assert torch.equal(logits(back), logits(model))
    with quiet(): again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert again("Order 4711 — naïve\n").input_ids == tok("Order 4711 — naïve\n").input_ids


def test_pairs_of_rows():
    "llama.cpp rotates rows 2i and 2i+1 of a head, transformers i and i + half."
    for heads, size in ((1, 2), (3, 8), (9, 64)):
        rows = pair_neighbours(torch.arange(heads*size), heads).view(heads, size//2, 2)
        assert torch.equal(rows[..., 1] - rows[..., 0], torch.full((heads, size//2), size//2))


def test_what_gguf_refuses(llama, tmp_path):
    falcon = make_base(tmp_path/"falcon", "falcon")
    make_adapter(falcon, tmp_path/"adapter")
    with pytest.raises(QLoRAError, match="FalconForCausalLM is not written as GGUF here, only LlamaForCausalLM. llama.cpp's convert"):
        export_gguf(tmp_path/"adapter", tmp_path/"out")
    tok = load_tokenizer()
    tok.backend_tokenizer.pre_tokenizer = pre.Whitespace()
    with pytest.raises(QLoRAError, match="byte-level BPE, split as gpt-2 or smollm"): pre_name(tok)
    with pytest.raises(QLoRAError, match="there is no format 'q4'"): export_gguf(llama, tmp_path/"out", "q4")
    assert not (tmp_path/"out").exists()


def test_gguf_of_a_merged_folder(adapter, tmp_path):
    "By way of the folder, or at once: the same file."
    folder = merge_and_save(adapter, tmp_path/"merged", **F32)
    a = export_gguf(folder, tmp_path/"a"/"talk", "f32")
    b = export_gguf(adapter, tmp_path/"b"/"talk", "f32", trained_in="float32")
    p, q = from_gguf(a), from_gguf(b)
    assert all(torch.equal(x, y) for x, y in zip(p.parameters(), q.parameters()))
    card = (a.parent/"README.md").read_text(encoding="utf-8")
    assert "library_name: gguf" in card and f'gguf_file="{a.name}"' in card
    assert code_runs(card, a.parent)


def test_llama_cpp_reads_it(adapter, tmp_path):
    "The program that the file is for: its own tokenizer, its own template engine, its own arithmetic."
    x = pytest.importorskip("xllamacpp")
    m = merged(adapter, **F32)
    params = x.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(write_gguf(m.model, m.tokenizer, tmp_path/"a.gguf", "f32")), 256, 1, False
    server = x.Server(params)
    for text in ("Hello there", "a  7\n\n1. 2024", "日本語 👩‍👩‍👧‍👦"):
        said = server.handle_chat_completions(dict(messages=[dict(role="user", content=text)], temperature=0, max_tokens=8))
        ids = m.tokenizer.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = m.model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
        assert said["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]
        assert said["choices"][0]["message"]["content"] == m.tokenizer.decode(out, skip_special_tokens=True)


# ---- what is written is read back ----

def test_gpt2_stores_its_weights_the_other_way_round(tmp_path):
    from transformers import GPT2Config
    tok = small_tokenizer()
    set_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tok), n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
                                         dtype=torch.float32).save_pretrained(tmp_path/"base")
        tok.save_pretrained(tmp_path/"base")
    want = logits(make_adapter(tmp_path/"base", tmp_path/"adapter"))
    for onto in ONTO:
        plain = AutoModelForCausalLM.from_pretrained(merge_and_save(tmp_path/"adapter", tmp_path/onto, onto, **F32))
        assert type(plain.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
        off = (logits(plain) - want).norm()/want.norm()
        assert off < 1e-5 if onto == "dequantized" else 1e-2 < off < .5, (onto, off)


def test_a_base_that_is_stored_in_4_bits(llama, adapter, tmp_path):
    from qlora_nb.foundations.loading import load_model
    with quiet(): load_model(llama, device="cpu", dtype=torch.float32).save_pretrained(tmp_path/"nf4"), load_tokenizer().save_pretrained(tmp_path/"nf4")
    want = logits(AutoModelForCausalLM.from_pretrained(merge_and_save(adapter, tmp_path/"from-16", **F32)))
    for onto in ("dequantized", "4bit"):
        out = merge_and_save(adapter, tmp_path/onto, onto, base=str(tmp_path/"nf4"), **F32)
        plain = AutoModelForCausalLM.from_pretrained(out)
        assert "quantization_config" not in json.loads((out/"config.json").read_text(encoding="utf-8"))
        if onto == "dequantized": assert ((logits(plain) - want).norm()/want.norm()) < 1e-5
    with pytest.raises(QLoRAError, match="stored in 4 bits, so there is no original"):
        merge_and_save(adapter, tmp_path/"original", "original", base=str(tmp_path/"nf4"), **F32)
    assert not (tmp_path/"original").exists()


@pytest.mark.parametrize("harm, said", [(lambda d: {k: v.T.contiguous() if "q_proj" in k else v for k, v in d.items()}, "another model: its logits"),
                                        (lambda d: {k: v for k, v in d.items() if "layers.1.mlp" not in k}, "another model: its logits"),
                                        (lambda d: {k: v[:7] if "gate_proj" in k else v for k, v in d.items()}, "cannot be loaded")])
def test_a_folder_that_is_another_model_is_not_left_behind(adapter, tmp_path, monkeypatch, harm, said):
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedModel
    once = PreTrainedModel.save_pretrained
    def save(self, folder, **kw):
        once(self, folder, **kw)
        save_file(harm(load_file(Path(folder)/"model.safetensors")), Path(folder)/"model.safetensors", metadata=dict(format="pt"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    with pytest.raises(QLoRAError, match=said): merge_and_save(adapter, tmp_path/"out", **F32)
    assert not list(tmp_path.iterdir())


def test_experts_in_4_bits_are_written_out():
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import MixtralConfig
    from qlora_nb.speed.dequantized import write_out_4bit
    set_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                                           num_key_value_heads=2, num_local_experts=2), dtype=torch.float32).eval()
    ids = torch.arange(3, 27)[None]
    for n in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(model.model.layers[0].mlp.experts, n, compress_statistics=True, quant_type="nf4", blocksize=64)
    with torch.no_grad():
        want = model(ids).logits
        got = write_out_4bit(model)(ids).logits
    assert (got - want).norm() < 1e-5*want.norm() and model.model.layers[0].mlp.experts.down_proj.dtype == torch.float32
    assert {k for k in model.state_dict() if "experts" in k} == {f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}


def test_a_row_that_an_older_run_has_noted_stays_here(adapter, tmp_path):
    "Neither in the card nor in the notes of an export, nor on the screen; what was asked for is."
    from qlora_nb.training.saved_adapters import adapter_folder
    old, secret = shutil.copytree(adapter, tmp_path/"old"), "The patient Jane Roe"
    notes = json.loads((old/"qlora_nb.json").read_text(encoding="utf-8"))
    assert "Hello there" in (export_adapter(old, tmp_path/"new")/"README.md").read_text(encoding="utf-8")
    notes = {k: v for k, v in notes.items() if k != "example_asked"} | dict(example=secret)
    (old/"qlora_nb.json").write_text(json.dumps(notes), encoding="utf-8")
    assert "example" not in adapter_folder(old)[1]
    for o in export_adapter(old, tmp_path/"out").iterdir(): assert secret.encode() not in o.read_bytes(), o.name


# ---- where it stops ----

def test_every_export_stops_where_it_was_taught(tmp_path):
    "Merged, and as GGUF: the tokenizer's EOS, the end of its template, and an end that only the adapter notes."
    from gguf import GGUFReader
    base, tok = make_base(tmp_path/"base"), small_tokenizer()
    tok.eos_token = "<|endoftext|>"
    tok.save_pretrained(base)
    make_adapter(base, tmp_path/"adapter")
    file = tmp_path/"adapter"/"qlora_nb.json"
    notes = json.loads(file.read_text(encoding="utf-8")) | dict(end_tokens=["<|im_end|>", "<repo_name>"])
    file.write_text(json.dumps(notes), encoding="utf-8")
    ids = tok.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<repo_name>"])
    out = merge_and_save(tmp_path/"adapter", tmp_path/"out", **F32)
    assert json.loads((out/"generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [ids[0], *sorted(ids[1:])]
    for folder, name in ((tmp_path/"adapter", "a"), (out, "b")):
        fields = GGUFReader(export_gguf(folder, tmp_path/name, "f32")).fields
        assert [fields[f"tokenizer.ggml.{o}_token_id"].contents() for o in ("eos", "eot", "eom")] == ids


def test_a_router_that_chooses_otherwise_in_bfloat16_is_no_error(tmp_path):
    "Two experts that it finds nearly equal: every format takes another. In float32 the merge is exact, and what the file's format changes is said."
    from transformers import MixtralConfig
    set_seed(0)
    tok = small_tokenizer()
    model = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1, eos_token_id=2), dtype=torch.float32)
    for o in model.model.layers:
        o.mlp.gate.weight.data = o.mlp.gate.weight.data[:1] + 1e-4*torch.randn(4, 64)
        o.mlp.experts.down_proj.data *= 20
    with quiet(): model.save_pretrained(tmp_path/"base"), tok.save_pretrained(tmp_path/"base")
    make_adapter(tmp_path/"base", tmp_path/"adapter")
    how = dict(dtype="bfloat16", trained_in="bfloat16")
    with pytest.warns(UserWarning, match="has other logits in torch.bfloat16 than in float32, by .*%"): merge_and_save(tmp_path/"adapter", tmp_path/"out", **how)
    one, two = merged(tmp_path/"adapter", **how | dict(dtype="float32")), BACKENDS["bnb"](str(tmp_path/"base"), device="cpu", dtype=torch.bfloat16)
    W = one.model.get_submodule("model.layers.1.self_attn.q_proj").weight - attached(two, tmp_path/"adapter")
    assert W.abs().max() < 1e-6


def attached(model, folder, name="model.layers.1.self_attn.q_proj"):
    "What a 4-bit layer with an adapter multiplies with, by hand."
    from bitsandbytes.functional import dequantize_4bit
    with safe_open(folder/"adapter_model.safetensors", "pt") as f: A, B = (f.get_tensor(f"base_model.model.{name}.lora_{o}.weight") for o in "AB")
    m = model.get_submodule(name)
    return dequantize_4bit(m.weight.data, m.weight.quant_state).float() + 32/4*B @ A


def test_a_bias_that_has_no_place_is_refused_in_a_sentence(llama, tmp_path):
    "An adapter with lora_bias on layers without one works as an adapter, and only so."
    make_adapter(llama, tmp_path/"adapter", lora_bias=True)
    with pytest.raises(QLoRAError, match="q_proj: the adapter has a bias .lora_bias., and the layer under it has none. It cannot be merged: use it as an adapter"):
        merged(tmp_path/"adapter", **F32)


def test_a_buffer_that_no_file_holds_is_compared_as_it_was(tmp_path):
    "Falcon-H1 multiplies by one, which is computed anew when it is loaded."
    from transformers import FalconH1Config
    from qlora_nb.speed.logits import probe, unsaved_buffers
    from qlora_nb.using.merge import read_back
    set_seed(0)
    model = AutoModelForCausalLM.from_config(FalconH1Config(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8, ssm_multipliers=[.3]*5), dtype=torch.float32)
    for p in model.parameters(): p.data = (p.data*(10 if p.ndim > 1 else 1)).bfloat16()   # so that a block counts
    with quiet(): model.save_pretrained(tmp_path)
    rest = unsaved_buffers(model)
    read_back(tmp_path, want := probe(model.float()), rest)
    for k in rest: rest[k] = rest[k] + .1   # as if the training had had others
    with pytest.raises(QLoRAError, match="another model"): read_back(tmp_path, want, rest)


def test_a_table_beside_the_adapter_is_merged_as_well(llama, tmp_path):
    "PEFT saves embeddings and head whole where a vocabulary grew or somebody asked for it."
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    make_adapter(llama, tmp_path/"adapter", target_modules=["q_proj"])
    file = tmp_path/"adapter"/"adapter_model.safetensors"
    with safe_open(Path(llama)/"model.safetensors", "pt") as f: table = f.get_tensor("model.embed_tokens.weight").float()
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": table + .1}, file, metadata=dict(format="pt"))
    with quiet(): own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), tmp_path/"adapter").eval()
    merge_and_save(tmp_path/"adapter", tmp_path/"out", onto="original", **F32)
    got = AutoModelForCausalLM.from_pretrained(tmp_path/"out", dtype=torch.float32)
    assert (logits(got) - logits(own)).norm() < 1e-5*logits(own).norm()
    assert (got.model.embed_tokens.weight - table - .1).abs().max() < 1e-6
    save_file(load_file(file) | {"base_model.model.model.elsewhere.weight": table}, file, metadata=dict(format="pt"))
    with pytest.raises(QLoRAError, match="does not fit .*elsewhere"): merged(tmp_path/"adapter", **F32)
