"What users have met, by kind, where no other test holds it: what is said, and where."
import json, re, shutil

import pytest

from qlora_nb.base.errors import QLoRAError
from qlora_nb.foundations.adapters import BACKENDS
from qlora_nb.training.data import Source, load_rows
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.training.finetune import finetune
from qlora_nb.training.saved_adapters import load_adapter

from common import small_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "A folder with a small random Llama and a small tokenizer."
    folder, tok = tmp_path_factory.mktemp("base"), small_tokenizer()
    with quiet(): tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(folder), tok.save_pretrained(folder)
    return folder


@pytest.fixture
def no_model(monkeypatch):
    "Whatever is refused, is refused before a model is loaded."
    def refuse(*a, **k): raise AssertionError("a model was loaded")
    for o in list(BACKENDS): monkeypatch.setitem(BACKENDS, o, refuse)


ROWS = [dict(prompt=f"{i}?", response="yes") for i in range(12)]


# ---- settings ----

SETTINGS = {
    "a part of a layer": (dict(r=2.5), "r is 2.5, and has to be a whole number. Set r=... (--r)."),
    "a part of a step": (dict(max_steps=2.5), "max_steps is 2.5, and has to be a whole number"),
    "a text": (dict(per_device_train_batch_size="4"), "per_device_train_batch_size is '4', and has to be a whole number"),
    "a text for a rate": (dict(learning_rate="1e-4"), "learning_rate is '1e-4', and has to be a number"),
    "a truth": (dict(max_length=True), "max_length is True, and has to be a whole number"),
    "alpha below zero, which unlearns": (dict(lora_alpha=-1), "lora_alpha is -1, and has to be above zero"),
    "alpha of zero, which learns nothing": (dict(lora_alpha=0), "lora_alpha is 0, and has to be above zero"),
    "alpha so large that the update is infinite": (dict(lora_alpha=1e38), "lora_alpha is 1e+38, and has to be from 0 to below 65536"),
    "a seed below zero": (dict(seed=-1), "seed is -1, and has to be from 0 to below 4294967296"),
    "no seed": (dict(seed=None), "seed is None, and has to be a whole number"),
    "no end": (dict(learning_rate=float("inf")), "learning_rate is inf"),
    "more passes than can be counted": (dict(num_train_epochs=1e30), "num_train_epochs is 1e+30, and has to be below 2,147,483,648"),
    "mistyped": (dict(max_stesp=3), "finetune has no argument 'max_stesp'. Did you mean max_steps=...?"),
    "a usual short name": (dict(**{"lr": 1e-4}), "finetune has no argument 'lr'. Did you mean learning_rate=...?"),
    "another short name": (dict(**{"rank": 8}), "finetune has no argument 'rank'. Did you mean r=...?"),
    "an older name": (dict(**{"max_seq_length": 256}), "Did you mean max_length=...?"),
    "a mistyped option of the data": (dict(colums=dict(prompt="q")), "finetune has no argument 'colums'. Did you mean columns=...?"),
    "nothing near": (dict(zzz=1), "finetune has no argument 'zzz'. It has model, data, output_dir"),
}

@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_make_no_sense(case, base, tmp_path, no_model):
    more, said = SETTINGS[case]
    with pytest.raises(QLoRAError, match=re.escape(said)): finetune(**dict(model=base, data=ROWS, output_dir=tmp_path/"run", device="cpu", progress=False) | more)
    assert not (tmp_path/"run").exists()


# ---- options that mean nothing to the data ----

@pytest.mark.parametrize("option", [dict(config="main"), dict(revision="a1b2"), dict(split="validation")])
def test_a_file_has_no_parts(option, tmp_path, base, monkeypatch, no_model):
    (path := tmp_path/"a.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    (k, v), = option.items()
    said = re.escape(f"{k}={v!r} chooses a part of a Hub data set, and this is read whole. Leave {k} out.")
    for data in (path, str(path), Source(path, **option), [path], ROWS):
        with pytest.raises(QLoRAError, match=said) as e: load_rows(data, **option)
        assert e.value.where == ("the rows given" if data is ROWS else str(path))
    with pytest.raises(QLoRAError, match=said): finetune(base, path, tmp_path/"run", **option)
    if k != "split":
        with pytest.raises(QLoRAError, match=f"tickets: {said}"): load_rows("tickets", **option)
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **how: asked.append((*a, how)) or [dict(prompt="c", response="d")])
    several = [Source(o, **option) for o in (path, "someone/x")]   # as the command line gives them
    for rows in (load_rows([path, "someone/x"], **option), load_rows(several)): assert [o["prompt"] for o in rows] == ["a", "c"]
    wanted = {"config": ("someone/x", "main", dict(split="train")), "revision": ("someone/x", dict(split="train", revision="a1b2")), "split": ("someone/x", dict(split="validation"))}
    assert asked == [wanted[k]]*2


# ---- where files go ----

QUIET = dict(per_device_train_batch_size=4, learning_rate=1e-2, device="cpu", progress=False)


def test_the_home_folder_is_found_everywhere(base, tmp_path, monkeypatch):
    "By every function that takes a path; and nothing is called ~ in the folder where we are."
    from qlora_nb.foundations import adapters
    from qlora_nb.using import model_card as card
    from qlora_nb.apps import cli
    from qlora_nb.using import merge as export
    from qlora_nb.using import gguf as gguf_file
    from qlora_nb.training import saved_adapters as inference
    from qlora_nb.base import runs
    from qlora_nb.using import several_adapters as switching
    (home := tmp_path/"home").mkdir(), (here := tmp_path/"here").mkdir(), monkeypatch.chdir(here)
    for o in ("HOME", "USERPROFILE"): monkeypatch.setenv(o, str(home))
    shutil.copytree(base, home/"base")
    (home/"a.jsonl").write_text("".join(json.dumps(o) + "\n" for o in ROWS), encoding="utf-8")
    run = finetune("~/base", "~/a.jsonl", "~/runs/a", max_steps=2, **QUIET)
    config = json.loads((home/"runs"/"a"/"adapter"/"adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(home/"base"), "PEFT knows no ~"
    loaded = inference.load_adapter("~/runs/a", base="~/base", device="cpu")
    switching.check_fits(loaded.model, "~/runs/a/adapter")
    made = [export.merge_and_save("~/runs/a", "~/merged"), card.export_adapter("~/runs/a", "~/alone"), gguf_file.export_gguf("~/merged", "~/gguf"),
            adapters.save_adapter(run.model, "~/new/saved", str(base)), switching.save_one(loaded.model, "default", "~/one", str(base)), runs.latest_run("~/runs")]
    assert [o.relative_to(home).parts[0] for o in made] == ["merged", "alone", "gguf", "new", "one", "runs"] and all(o.exists() for o in made)
    assert runs.content_id("~/base") == runs.content_id(base) is not None and runs.last_checkpoint("~/runs/a/checkpoints").name == "checkpoint-2"
    assert cli.finetune_options(["--data", "~/a.jsonl:0.5"])["data"] == [("~/a.jsonl", .5)] and len(load_rows([("~/a.jsonl", .5)])) == 6
    assert not any(here.iterdir())


def test_exports_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    from qlora_nb.base.new_folder import check_room
    from qlora_nb.using import merge as export
    from qlora_nb.using import gguf as gguf_file
    def refuse(*a, **k): raise AssertionError("work was done")
    for module, name in ((export, "merged"), (gguf_file, "gguf_source")): monkeypatch.setattr(module, name, refuse)
    (tmp_path/"file").write_text("mine", encoding="utf-8")
    for write in (export.merge_and_save, gguf_file.export_gguf, lambda _, out: check_room(out)):
        for out, said in ((tmp_path/"file"/"below"/"it", "cannot be written (Not a directory)"), (tmp_path/("x"*300), "cannot be written (File name too long)"),
                          (tmp_path/"a\0b", "cannot be written (embedded null byte)"), (tmp_path/"file", "something here already")):
            with pytest.raises(QLoRAError, match=re.escape(said)): write(tmp_path/"run", out)


@pytest.mark.parametrize("name", ["x"*300, "a\0b"])
def test_names_that_no_folder_can_have(name, base, tmp_path, no_model):
    with pytest.raises(QLoRAError, match="the folder cannot be written .*Choose another --output-dir"): finetune(base, ROWS, tmp_path/name, max_steps=1, **QUIET)
    with pytest.raises(QLoRAError, match="no variable is replaced here"): finetune(base, ROWS, "$HOME/run", max_steps=1, **QUIET)


# ---- adapters of others ----

@pytest.fixture(scope="session")
def run(base, tmp_path_factory): return finetune(base, ROWS, tmp_path_factory.mktemp("run")/"run", max_steps=2, **QUIET)


def torn(name, n): return lambda folder: (folder/name).write_bytes((folder/name).read_bytes()[:n])
def unnamed(folder):
    config = json.loads((folder/"adapter_config.json").read_text(encoding="utf-8"))
    (folder/"adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "base_model_name_or_path"}), encoding="utf-8")
def resized(folder):
    import torch
    from safetensors.torch import load_file, save_file
    tensors = load_file(file := folder/"adapter_model.safetensors")
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(1002, 64)}, file, metadata={"format": "pt"})

HARMED = {
    "no name of a base": (unnamed, "the adapter does not name its base. Say where it is: base=..."),
    "half a config": (torn("adapter_config.json", 50), "adapter_config.json: this file is damaged (Unterminated string"),
    "half of our notes": (torn("qlora_nb.json", 9), "qlora_nb.json: this file is damaged"),
    "half of the weights": (torn("adapter_model.safetensors", 100), "adapter_model.safetensors: this file is damaged"),
    "an end of the weights": (torn("adapter_model.safetensors", -5), "adapter_model.safetensors: this file is damaged"),
    "tokens that were added": (resized, "the adapter holds a matrix of another size than the base (base_model.model.model.embed_tokens.weight: copying a param with shape torch.Size([1002, 64])"),
}

@pytest.mark.parametrize("case", HARMED)
def test_adapters_that_came_from_elsewhere(case, run, tmp_path):
    from qlora_nb.training.saved_adapters import load_adapter
    harm, said = HARMED[case]
    shutil.copytree(run.folder/"adapter", tmp_path/"adapter"), harm(tmp_path/"adapter")
    with pytest.raises(QLoRAError, match=re.escape(said)): load_adapter(tmp_path/"adapter", device="cpu")


def misshapen(folder):
    import torch
    from safetensors.torch import load_file, save_file
    tensors = load_file(file := folder/"model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 64)}, file, metadata={"format": "pt"})
def as_codes(folder):   # as LLM.int8() stores them, in a folder whose config has lost that
    import torch
    from safetensors.torch import load_file, save_file
    tensors = load_file(file := folder/"model.safetensors")
    codes = {k: (v*100).round().to(torch.int8) for k, v in tensors.items() if "_proj" in k}
    save_file(tensors | codes, file, metadata={"format": "pt"})

@pytest.mark.parametrize("harm, said", [(as_codes, "model.layers.0.mlp.down_proj.weight is stored as I8, as codes, and config.json does not say of what."),
    (torn("model.safetensors", 5000), "A file is missing or not whole: fetch it again, or run git lfs pull in a clone."), (torn("model.safetensors", 0), "this is no safetensors file, or not a whole one."),
    (misshapen, "model.layers.0.mlp.up_proj: the file has 3 x 64 weights for a layer of 256 x 64.")], ids=["codes", "cut off", "empty", "of another size"])
def test_bases_that_are_not_whole(harm, said, base, tmp_path):
    shutil.copytree(base, tmp_path/"base"), harm(tmp_path/"base")
    with pytest.raises(QLoRAError, match=re.escape(said)): finetune(tmp_path/"base", ROWS, tmp_path/"run", max_steps=1, **QUIET)


def configured(**changes):
    def change(folder):
        config = json.loads((folder/"adapter_config.json").read_text(encoding="utf-8"))
        (folder/"adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return change
def broken_numbers(folder):
    from safetensors.torch import load_file, save_file
    tensors = load_file(file := folder/"adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
def an_older_file(folder): (folder/"adapter_model.safetensors").rename(folder/"adapter_model.bin")

OTHERS = {
    "another kind of adapter": (configured(peft_type="PROMPT_TUNING"), "this is an adapter of the kind PROMPT_TUNING, and only LoRA is known here."),
    "a list for a config": (lambda folder: (folder/"adapter_config.json").write_text("[]", encoding="utf-8"), "adapter_config.json: this file is damaged (it holds no object)."),
    "numbers that are none": (broken_numbers, "the adapter holds numbers that are none, such as in base_model.model.model.layers.0.mlp.down_proj.lora_A.weight."),
    "a head that is not in the file": (configured(modules_to_save=["lm_head"]), "PEFT cannot put this adapter on the model (KeyError: "),
    "no scale": (configured(lora_alpha=None), "PEFT cannot put this adapter on the model (TypeError: "),
    "a file of PyTorch's": (an_older_file, "adapter_model.bin is not read: load it by PEFT, and save it again."),
    "the base of another machine": (configured(base_model_name_or_path="/content/base"), "the base of this adapter is not on this machine: /content/base. Say where it is: base=..."),
}

def test_a_base_whose_config_asks_for_tuples(base, tmp_path):
    "return_dict=false, as older scripts have it: transformers' own code fails with it."
    from qlora_nb.foundations.loading import load_model
    shutil.copytree(base, tmp_path/"base")
    config = json.loads((tmp_path/"base"/"config.json").read_text(encoding="utf-8"))
    (tmp_path/"base"/"config.json").write_text(json.dumps(config | dict(return_dict=False)), encoding="utf-8")
    assert load_model(tmp_path/"base", device="cpu").config.return_dict


def test_an_adapter_that_began_orthogonal_is_as_good_as_any(run, tmp_path):
    "PEFT would begin it in the type of a packed weight; what it begins with is overwritten by the file."
    from qlora_nb.training.saved_adapters import load_adapter
    shutil.copytree(run.folder/"adapter", tmp_path/"adapter"), configured(init_lora_weights="orthogonal")(tmp_path/"adapter")
    model = load_adapter(tmp_path/"adapter", device="cpu").model
    mine = dict(run.model.named_parameters())
    for n, p in model.named_parameters():
        if "lora_" in n: assert (p.data == mine[n].data).all(), n


@pytest.mark.parametrize("case", OTHERS)
def test_adapters_of_other_tools_and_machines(case, run, tmp_path):
    from qlora_nb.training.saved_adapters import load_adapter
    from qlora_nb.using.merge import merge_and_save
    harm, said = OTHERS[case]
    shutil.copytree(run.folder/"adapter", tmp_path/"adapter"), harm(tmp_path/"adapter")
    with pytest.raises(QLoRAError, match=re.escape(said)): load_adapter(tmp_path/"adapter", device="cpu")
    if any(o in case for o in ("kind", "scale", "head")): return   # merging refuses these in words of its own
    with pytest.raises(QLoRAError, match=re.escape(said)): merge_and_save(tmp_path/"adapter", tmp_path/"merged")


def test_a_run_stands_for_its_folder(run, tmp_path):
    from qlora_nb.training.saved_adapters import find_folder
    from qlora_nb.using.merge import merge_and_save
    assert find_folder(run) == find_folder(run.folder/"adapter"/"adapter_model.safetensors") == run.folder/"adapter"
    assert (merge_and_save(run, tmp_path/"merged")/"config.json").exists()
    with pytest.raises(QLoRAError, match="hf download someone/adapter"): find_folder("someone/adapter")
    with pytest.raises(QLoRAError, match="this folder holds an adapter, and no model. Give its base here"): finetune(run.folder, ROWS, tmp_path/"x", **QUIET)


def test_a_run_of_one_step_learns(base, tmp_path):
    "The warmup starts at 0, and would be all of it."
    one = finetune(base, ROWS, tmp_path/"one", max_steps=1, **QUIET)
    assert all(p.any() for n, p in one.model.named_parameters() if "lora_B" in n)


def test_a_tokenizer_beside_a_name_is_said_to_be_idle(base):
    from qlora_nb.training.loaded_models import find_model
    with pytest.warns(UserWarning, match="tokenizer=... is not used"): model, tok, *_ = find_model(base, small_tokenizer(), "bnb", dict(adapter=None, model_revision=None))
    assert tok is None


def test_a_base_that_an_adapter_was_merged_into(base, tmp_path):
    "It is another model than its name says, and what is trained on it would be noise on that one."
    from transformers import AutoConfig
    first = finetune(base, ROWS, tmp_path/"first", max_steps=2, **QUIET)
    merged = first.model.merge_and_unload()
    with pytest.raises(QLoRAError, match="the weights of this model were changed after it was loaded.*merge_and_save"):
        finetune(merged, ROWS, tmp_path/"second", tokenizer=first.tokenizer, max_steps=2, **QUIET)
    with pytest.raises(QLoRAError, match="a LlamaConfig is no model"): finetune(AutoConfig.from_pretrained(base), ROWS, tmp_path/"third", **QUIET)


# ---- tokenizers ----

def test_marks_of_another_template_are_said(tmp_path):
    from qlora_nb.training.data import encode_rows
    tok, texts = small_tokenizer(), ["[INST] Hi [/INST]", "<|start_header_id|>user", "Human: Hi\n\nAssistant:", "### Instruction:\nHi\n\n### Response:\n"]
    for text in texts:
        with pytest.warns(UserWarning, match="marks of another template, which are plain text here .1 row, the first is row 2"): encode_rows([ROWS[0], dict(prompt=text, response="yes")], tok)
    with pytest.warns(UserWarning, match="characters that were lost before .U.FFFD. .1 row, the first is row 1, 'caf"): encode_rows([dict(prompt="caf\ufffd?", response="yes")], tok)


def test_a_tokenizer_without_an_end(base):
    "The way out is not the template that is in use."
    from qlora_nb.training.data import encode, encode_prompt
    tok = small_tokenizer()
    tok.eos_token = tok.chat_template = None
    for template in ("auto", "article"):
        with pytest.raises(QLoRAError, match="the tokenizer has no EOS token.*tokenizer.eos_token = ..., such as one of '<.im_start.>'") as e: encode(ROWS[0], tok, template)
        assert "article" not in e.value.cure
    tok.eos_token = "<|im_end|>"
    assert tok.decode(encode(ROWS[0], tok)["labels"][-2:]).endswith("<|im_end|>") and encode_prompt(ROWS[0], tok).endswith("### Response:\n")


def test_an_alphabet_that_the_tokenizer_cannot_write(tmp_path):
    "A BPE without bytes and without <unk> leaves nothing of it, and the end token alone would be taught."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE({o: i for i, o in enumerate(["y", "e", "s", "</s>", "?"])}, []))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>", chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    with quiet(): model = tiny_model("llama", vocab_size=64, hidden_size=64, pad_token_id=3)
    model.qlora_nb_name = str(tmp_path)
    with pytest.raises(QLoRAError, match="the tokenizer cannot write 2 of 2 answers, the first in row 1"):
        finetune(model, [dict(prompt="yes", response="你好")]*2, tmp_path/"run", tokenizer=tok, max_steps=1, **QUIET)


def test_rows_longer_than_the_model_knows(tmp_path):
    tok = small_tokenizer()
    with quiet(): tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2, max_position_embeddings=64).save_pretrained(tmp_path/"base"), tok.save_pretrained(tmp_path/"base")
    with pytest.warns(UserWarning, match="row 2: the example has .* tokens, and the model has 64 positions. .*set max_length=64"):
        finetune(tmp_path/"base", [ROWS[0], dict(prompt="word "*40, response="yes")], tmp_path/"run", max_steps=1, **QUIET)


@pytest.mark.parametrize("seq, fits", [(128, True), (32, True), (128, False)])
def test_a_plan_knows_the_positions_too(seq, fits, monkeypatch):
    from transformers import LlamaConfig
    from qlora_nb.memory import gpus as cards
    monkeypatch.setattr(cards, "longest", lambda *a, **k: 131_072)
    monkeypatch.setattr(cards, "largest_batch", lambda *a, **k: 8)
    if not fits: monkeypatch.setattr(cards, "memory_options", lambda p: {})
    cfg = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    said = cards.advise(cfg, 16 if fits else "0.000001", max_length=seq)
    assert ("131072 tokens, and the model knows 64 positions." in said) == fits and (f"These rows have {seq} tokens, and the model knows 64 positions" in said) == (seq > 64)


def test_cards_as_people_write_them():
    from qlora_nb.memory.gpus import card_bytes
    assert card_bytes("16GB") == card_bytes("16 gb") == card_bytes(16) == 16e9 and card_bytes("24GiB") == 24*2**30 and card_bytes("NVIDIA A100-80GB") == 81920*2**20
    with pytest.raises(QLoRAError, match="no card 'a100' in the list. Near: A100_40, A100_80"): card_bytes("a100")


# ---- a terminal whose locale is not UTF-8 ----

def raw(text): return text.encode().decode("ascii", "surrogateescape")   # as Python hands on what it cannot decode


def test_what_was_typed_in_another_locale(tmp_path):
    "Names of columns and prompts are text again; names of files stay bytes, and are written as such."
    from qlora_nb.base.adapter_files import describe_adapter
    from qlora_nb.apps.cli import chat_parser, finetune_options
    from qlora_nb.base.runs import write_json
    o = finetune_options(["--data", "a.jsonl", "--columns", raw("prompt=问,response=答"), "--system", raw("Grüße"), "--example", raw("Wofür?")])
    assert o["data"].options == dict(columns=dict(prompt="问", response="答"), system="Grüße") and o["example"] == "Wofür?"
    assert chat_parser().parse_args(["--system", raw("Grüße")]).system == "Grüße"
    write_json(tmp_path/"run.json", dict(data=raw("数据.jsonl"), said="答"))
    assert json.loads((tmp_path/"run.json").read_bytes().decode()) == dict(data="数据.jsonl", said="答")
    (tmp_path/"adapter_config.json").write_text("{}", encoding="utf-8")
    describe_adapter(tmp_path, raw("模型"), template="auto")
    assert json.loads((tmp_path/"qlora_nb.json").read_text(encoding="utf-8"))["base"] == "模型"


def test_an_adapter_is_asked_for_by_its_folder(no_model, tmp_path):
    with pytest.raises(QLoRAError, match="the folder of an adapter is wanted, not a dict"): load_adapter({}, tmp_path)
    with pytest.raises(QLoRAError, match="there is no backend 'x'. Choose bnb, scratch"): load_adapter(tmp_path, backend="x")
