"What can be known without weights is said before they are loaded; a setting that was said counts, also where it is the default."
import pytest

import qlora_nb.training.finetune as training
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.adapters import BACKENDS, add_adapters, save_adapter
from qlora_nb.foundations.loading import load_model
from qlora_nb.training.finetune import finetune

from common import small_base, small_tokenizer

ROWS = [dict(messages=[dict(role="user", content=f"What is {i} and {i}?"), dict(role="assistant", content=f"It is {2*i}."),
                       dict(role="user", content="Are you sure about it?"), dict(role="assistant", content="Yes.")]) for i in range(12)]
DEAF = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"), 400)


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    model = add_adapters(load_model(base, device="cpu"), 4, 8, target_modules=["q_proj", "v_proj"])
    return save_adapter(model, tmp_path_factory.mktemp("a")/"adapter", str(base), template="article")


class Loaded(Exception): pass


def loads(*args, **kw): raise Loaded


def said(monkeypatch, base, tmp_path, **how):
    "What `finetune` says without having loaded a model."
    monkeypatch.setattr(training, "load_base", loads)
    how = dict(model=base, data=ROWS, output_dir=tmp_path/"run", device="cpu", progress=False, max_steps=1) | how
    with pytest.raises(QLoRAError) as e: finetune(**how)
    return str(e.value)


@pytest.mark.parametrize("how, says", [
    (dict(max_length=20), "all rows are longer than max_length=20 tokens. Set max_length="),
    (dict(eval_data=[dict(prompt="a "*2000, response="b")], eval_steps=1), "the rows to evaluate on: all rows are longer"),
    (dict(template="{{ messages"), "the chat template refuses this row"),
    (dict(template=DEAF, system="Answer in one word, and no more."), "the chat template leaves out message 1, the system's"),
    (dict(target_modules=["q_prj"]), "Near names: q_proj"), (dict(target_modules="qproj"), "Near names: q_proj"), (dict(target_modules="q.proj|"), "A single name goes into a list"),
    (dict(target_modules=r"layers\.(\d"), "is no regular expression"), (dict(target_modules=r".*layers\.7\..*"), "matches nothing"),
    (dict(target_modules=["lm_head"]), "on the output head"), (dict(target_modules=["embed_tokens"]), "which is not linear"),
    (dict(target_parameters=["experts.down_proj"]), "matches no stack of experts"),
    (dict(target_parameters=["experts.down_proj"], backend="scratch"), "backend='bnb' only")])
def test_said_before_the_model_is_loaded(how, says, monkeypatch, base, tmp_path):
    assert says in said(monkeypatch, base, tmp_path, **how)


def test_the_command_says_it_as_early(monkeypatch, base, tmp_path, capsys):
    from qlora_nb.apps.cli import finetune_main
    monkeypatch.setattr(training, "load_base", loads)
    (tmp_path/"t.jinja").write_text("{{ messages", encoding="utf-8")
    args = ["--model", str(base), "--data", "tickets", "--output-dir", str(tmp_path/"run"), "--device", "cpu"]
    for more, says in (["--max-length", "5"], "Set max_length="), (["--chat-template", str(tmp_path/"t.jinja")], "refuses this row"), (["--target-modules", "q_prj"], "q_proj"):
        with pytest.raises(SystemExit): finetune_main([*args, *more])
        assert says in capsys.readouterr().err


def test_what_is_right_is_loaded(monkeypatch, base, adapter, tmp_path):
    monkeypatch.setattr(training, "load_base", loads)
    for how in dict(model=base), dict(adapter=adapter):
        with pytest.raises(Loaded): finetune(data=ROWS, output_dir=tmp_path/"run", device="cpu", progress=False, max_steps=1, **how)


def test_an_adapter_that_does_not_fit_its_base(monkeypatch, base, adapter, tmp_path):
    with quiet():
        tiny_model("llama", vocab_size=400, hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path/"other")
        small_tokenizer(400).save_pretrained(tmp_path/"other")
    assert "layers of the adapter are not in the model" in said(monkeypatch, tmp_path/"other", tmp_path, adapter=adapter)


def test_a_second_try_writes_its_own_config(monkeypatch, base, tmp_path):
    said(monkeypatch, base, tmp_path, max_length=20)
    monkeypatch.setattr(training, "load_base", loads)
    with pytest.raises(Loaded): finetune(base, ROWS, tmp_path/"run", device="cpu", progress=False, max_steps=1, max_length=300)
    assert "max_length: 300" in (tmp_path/"run"/"config.yaml").read_text(encoding="utf-8")


# ---- said, or the default ----

@pytest.mark.parametrize("asked, says", [
    (dict(target_modules="all-linear"), "target_modules all-linear instead of ['q_proj', 'v_proj']"), (dict(r=16), "r 16 instead of 4"),
    (dict(lora_alpha=32), "lora_alpha 32 instead of 8"), (dict(target_modules=["q_proj"]), "['q_proj'] instead of"),
    (dict(target_modules=["qproj"]), "Near names: q_proj")])
def test_what_was_said_beside_an_adapter_counts(asked, says, monkeypatch, base, adapter, tmp_path):
    assert says in said(monkeypatch, None, tmp_path, adapter=adapter, **asked)


@pytest.mark.parametrize("asked, template", [({}, "article"), (dict(template="auto"), "auto"), (dict(lora_dropout=0., target_modules=".*[qv]_proj"), "article")])
def test_the_same_in_other_words_is_honoured(asked, template, base, adapter, tmp_path):
    run = finetune(adapter=adapter, data=ROWS, output_dir=tmp_path/"run", device="cpu", progress=False, max_steps=1, **asked)
    s = run.info["settings"]
    assert (s["template"], s["r"], s["target_modules"]) == (template, 4, ["q_proj", "v_proj"])
    with pytest.raises(QLoRAError, match="r 16 instead of 4"): finetune(run, ROWS, tmp_path/"b", r=16)
    with pytest.raises(QLoRAError, match="not for 'scratch'"): finetune(run, ROWS, tmp_path/"b", backend="scratch")


def test_a_loaded_model_that_is_asked_to_be_another(base, tmp_path):
    for backend, load in BACKENDS.items():
        model, other = load(base, device="cpu"), next(o for o in BACKENDS if o != backend)
        with pytest.raises(QLoRAError, match=f"loaded for the backend '{backend}', not for '{other}'"): finetune(model, ROWS, tmp_path/"a", backend=other)


def test_what_is_closed_is_said_and_not_removed(monkeypatch, base, adapter, tmp_path):
    "A file that another user has made: transformers says that it is not there, or goes on without it."
    from qlora_nb.base import file_kinds
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.base.runs import MARK, content_id, last_checkpoint, seal
    from qlora_nb.training.saved_adapters import load_adapter
    (point := tmp_path/"checkpoints"/"checkpoint-2").mkdir(parents=True)
    (point/MARK).touch(), (point/"optimizer.pt").write_bytes(b"x"), seal(point)
    shut = set()
    def opened(path, mode):
        if path.name in shut: raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)
    monkeypatch.setattr(file_kinds, "open", opened, raising=False)
    named = dict(device="cpu")
    for name, place, do in (("model.safetensors", base, lambda: load_model(base, **named)), ("generation_config.json", base, lambda: load_model(base, **named)),
                            ("tokenizer.json", base, lambda: load_tokenizer(base)), ("model.safetensors", base, lambda: content_id(base)),
                            ("model.safetensors", base, lambda: finetune(base, ROWS, tmp_path/"run", max_steps=1, progress=False, **named)),
                            ("adapter_model.safetensors", adapter, lambda: load_adapter(adapter, **named)), ("qlora_nb.json", adapter, lambda: load_adapter(adapter, **named)),
                            ("adapter_config.json", adapter, lambda: finetune(base, ROWS, tmp_path/"run", peft_config=adapter, progress=False, **named)),
                            ("complete.json", point, lambda: last_checkpoint(point.parent)), ("optimizer.pt", point, lambda: last_checkpoint(point.parent))):
        shut |= {name}
        with pytest.raises(QLoRAError) as e: do()
        assert str(e.value) == f"{place/name}: this cannot be read (Permission denied). Its owner can open it: chmod -R a+rX FOLDER."
        shut.clear()
    assert last_checkpoint(point.parent) == point


def test_a_cache_that_cannot_be_used(monkeypatch, tmp_path):
    from qlora_nb.base.model_files import load_tokenizer
    (tmp_path/"file").write_text("", encoding="utf-8")
    monkeypatch.setenv("QLORA_NB_CACHE", str(tmp_path/"file"/"cache"))
    for do in (load_model, load_tokenizer):
        with pytest.raises(QLoRAError, match="the cache cannot be used .*Let QLORA_NB_CACHE name a folder"): do("smollm2")
