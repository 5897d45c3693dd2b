"A second stage from the folder of an adapter, and a base at one revision of several."
import json, shutil, warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from qlora_nb.foundations.adapters import BACKENDS, add_adapters, save_adapter
from qlora_nb.apps.cli import finetune_main
from qlora_nb.base.errors import QLoRAError
from qlora_nb.training.data import load_rows
from qlora_nb.training.saved_adapters import load_adapter
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.training.finetune import finetune

from common import small_tokenizer

QUIET = dict(device="cpu", progress=False, per_device_train_batch_size=2, learning_rate=1e-2, max_steps=4, save_steps=2)


@pytest.fixture(scope="session")
def tok(): return small_tokenizer(400)


def make_base(folder, tok, seed=0):
    with quiet():
        tiny_model("llama", seed, vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(folder)
        tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tok, tmp_path_factory): return make_base(tmp_path_factory.mktemp("base"), tok)


@pytest.fixture(scope="session")
def rows(): return load_rows("tickets")[:16]


@pytest.fixture(scope="session")
def first(base, rows, tmp_path_factory):
    "A run of a first stage for each backend, and the run that went on from it in memory."
    folder, runs = tmp_path_factory.mktemp("first"), {}
    for b in BACKENDS:
        how = dict(r=4, lora_alpha=8, lora_dropout=.1, target_modules=["q_proj", "down_proj"], template="article", backend=b)
        run = finetune(base, rows[:8], folder/b, **how, **QUIET)
        runs[b] = folder/b, finetune(run, rows[8:], folder/f"{b}-on", template="article", **QUIET).info["losses"]
    return runs


class CtrlC(TrainerCallback):
    def __init__(self, step=3): self.step = step
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == self.step: raise KeyboardInterrupt


# ---- a second stage ----

def test_an_adapter_has_its_shape_already(base, rows, tmp_path):
    "A LoraConfig beside it is refused before anything is written or encoded."
    from peft import LoraConfig
    model = add_adapters(load_model(base, device="cpu"), r=4, lora_alpha=8, target_modules=["q_proj"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], rank_pattern=dict(q_proj=2))
    with pytest.raises(QLoRAError, match="carries an adapter, so peft_config has none to make"):
        finetune(model, rows, tmp_path/"run", peft_config=config, **QUIET)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_stage_from_a_folder(first, rows, tmp_path, backend):
    "The run that goes on in memory, to the same bits, interrupted and resumed or not; all is the adapter's, and noted."
    folder, losses = first[backend]
    file = (folder/"adapter"/"adapter_model.safetensors").read_bytes()
    how = dict(adapter=folder, data=rows[8:], output_dir=tmp_path/"run", backend=backend, **QUIET)
    with pytest.raises(KeyboardInterrupt): finetune(callbacks=[CtrlC()], **how)
    run = finetune(resume=True, **how)
    assert run.info["resumed_from"] == "checkpoint-2" and run.info["losses"] == losses
    s = run.info["settings"]
    assert [s[k] for k in ("r", "lora_alpha", "lora_dropout", "target_modules", "template")] == [4, 8, .1, ["down_proj", "q_proj"], "article"]
    assert Path(s["adapter"]) == folder/"adapter" and any("is trained further; its file stays" in o for o in run.info["said"])
    assert json.loads((run.folder/"adapter"/"qlora_nb.json").read_text(encoding="utf-8"))["adapter"] == s["adapter"]
    assert (folder/"adapter"/"adapter_model.safetensors").read_bytes() == file
    got = load_adapter(run.folder, device="cpu").model
    have, want = ({n.replace(".default", "").removeprefix("base_model.model."): p for n, p in m.named_parameters() if "lora_" in n}
                  for m in (got, run.model))
    assert have.keys() == want.keys() and all(torch.equal(have[n], want[n]) for n in have)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_stage_begins_with_the_bits_of_the_first(first, rows, tmp_path, backend):
    "TRL rounds adapters to bfloat16; what was learnt is not rounded."
    from safetensors.torch import load_file
    folder, _ = first["bnb"]
    run = finetune(adapter=folder, data=rows[8:], output_dir=tmp_path/"run", backend=backend, **dict(QUIET, max_steps=1, learning_rate=1e-9))
    was, now = (load_file(o/"adapter"/"adapter_model.safetensors") for o in (folder, run.folder))
    assert max((was[k] - now[k]).abs().max() for k in was) < 1e-8


def test_one_backend_goes_on_from_the_other(first, rows, tmp_path):
    folder, losses = first["bnb"]
    run = finetune(adapter=folder/"adapter", data=rows[8:], output_dir=tmp_path/"run", backend="scratch", **QUIET)
    assert run.info["losses"] == pytest.approx(losses, rel=5e-3) and run.info["losses"] != [0]*4


@pytest.mark.parametrize("more, said", [(dict(r=8), "r 8 instead of 4"), (dict(lora_alpha=16), "lora_alpha 16 instead of 8"),
    (dict(lora_dropout=0.), "lora_dropout 0.0 instead of 0.1"), (dict(target_modules=["q_proj"]), "target_modules \\['q_proj'\\] instead of"),
    (dict(target_parameters=["experts.down_proj"]), "target_parameters"), (dict(model=tiny_model()), "are both given"),
    (dict(adapter="nowhere"), "there is no adapter here"), (dict(model="./nowhere"), "no such model folder")])
def test_options_that_contradict_the_adapter(first, rows, tmp_path, more, said):
    with pytest.raises(QLoRAError, match=said): finetune(**dict(adapter=first["bnb"][0], data=rows, output_dir=tmp_path/"run") | more, **QUIET)
    assert not (tmp_path/"run").exists()


def test_what_is_no_plain_lora_is_refused(first, base, rows, tmp_path):
    folder = shutil.copytree(first["bnb"][0]/"adapter", tmp_path/"a")
    config = json.loads((folder/"adapter_config.json").read_text(encoding="utf-8"))
    for change, said in ((dict(peft_type="IA3"), "the kind IA3, and only LoRA is known"), (dict(modules_to_save=["lm_head"]), "more than LoRA \\(modules_to_save"),
                         (dict(bias="lora_only"), "more than LoRA \\(bias=lora_only"), (dict(alora_invocation_tokens=[5]), "more than LoRA \\(alora_invocation_tokens"),
                         (dict(init_lora_weights="pissa_niter_4"), "took a part of its base's weights over when it began .init_lora_weights=pissa_niter_4")):
        (folder/"adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(QLoRAError, match=said): finetune(adapter=folder, data=rows, output_dir=tmp_path/"run", **QUIET)


def test_an_adapter_on_the_head_is_not_trained_further(base, rows, tmp_path):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(tiny_model("llama", vocab_size=load_model(base, bits=None).config.vocab_size, hidden_size=64, pad_token_id=2),
                           LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path/"a", save_embedding_layers=False)
    with pytest.raises(QLoRAError, match="on the output head"): finetune(base, rows, tmp_path/"run", adapter=tmp_path/"a", **QUIET)


def test_another_adapter_is_another_run(first, base, rows, tmp_path):
    "Also where the run began without one, with the same settings; the same one at another place is the same."
    how = dict(data=rows[8:], output_dir=tmp_path/"run", r=4, lora_alpha=8, lora_dropout=.1, target_modules=["q_proj", "down_proj"], template="article")
    (mine, _), (other, _) = first.values()
    begun = dict.fromkeys(("whole", "stage"))
    for o, adapter in (("whole", None), ("stage", mine)):   # as `finetune` begins, without training
        how["output_dir"] = begun[o] = tmp_path/o
        with pytest.raises(KeyboardInterrupt): finetune(None if adapter else base, adapter=adapter, callbacks=[CtrlC(1)], **how, **QUIET | dict(save_steps=1))
    for o, kw in (("whole", dict(adapter=mine)), ("stage", dict(adapter=other)), ("stage", dict(model=base))):
        with pytest.raises(QLoRAError, match="the adapters differ"): finetune(resume=True, **how | dict(output_dir=begun[o]) | kw, **QUIET)
    moved = shutil.copytree(mine, tmp_path/"moved")
    assert finetune(adapter=moved, resume=True, **how, **QUIET).info["resumed_from"] == "checkpoint-1"


def test_a_second_stage_through_the_command(first, rows, tmp_path, capsys):
    folder, losses = first["bnb"]
    (tmp_path/"mine.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows[8:]), encoding="utf-8")
    args = f"--adapter {folder} --data {tmp_path/'mine.jsonl'} --output-dir {tmp_path/'run'} --device cpu --eval-rows 0 --max-steps 4 --per-device-train-batch-size 2 --learning-rate 0.01 --save-steps 2"
    finetune_main(args.split())
    assert json.loads((tmp_path/"run"/"run.json").read_text(encoding="utf-8"))["losses"] == losses
    with pytest.raises(SystemExit): finetune_main([*args.split(), "--r", "16", "--resume"])
    assert "asked for was r 16 instead of 4" in capsys.readouterr().err


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_a_second_stage_is_after_the_first(first, rows, tmp_path, backend):
    "Against the bare base it would be praised for what the first has learnt. Afterwards the adapter is that of the second again."
    from safetensors.torch import load_file
    from qlora_nb.evaluation.evaluation import evaluate, finetune_and_evaluate
    folder, _ = first[backend]
    report = finetune_and_evaluate(rows[8:], test_data=rows[:2], adapter=folder, output_dir=tmp_path/"run", backend=backend, **dict(QUIET, max_steps=1))
    got = load_adapter(folder, device="cpu", backend=backend)
    assert report.before.answer_loss == pytest.approx(evaluate(got.model, got.tokenizer, rows[:2], "article").answer_loss, rel=1e-4)
    own = {n.replace(".default", "").removeprefix("base_model.model."): p for n, p in report.run.model.named_parameters() if "lora_" in n}
    for k, v in load_file(tmp_path/"run"/"adapter"/"adapter_model.safetensors").items(): assert torch.equal(own[k.removeprefix("base_model.model.")], v)
    assert report.after.answer_loss != report.before.answer_loss


# ---- a base at one of several revisions ----

HUB = "someone/tiny"


@pytest.fixture
def hub(tok, tmp_path, monkeypatch):
    "A cache of the Hub that holds two revisions of a model: `main` and the tag `v1`."
    repo = tmp_path/"hub"/"models--someone--tiny"
    for i, name in enumerate(("main", "v1")):
        make_base(repo/"snapshots"/(str(i)*40), tok, seed=i)
        (repo/"refs").mkdir(exist_ok=True), (repo/"refs"/name).write_text(str(i)*40, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    return repo


def weight(model): return next(p for n, p in model.named_parameters() if "embed_tokens" in n).detach().float()


def test_a_revision_is_loaded(hub):
    main, tag, commit = (load_model(HUB, device="cpu", dtype=torch.float32, revision=o) for o in (None, "v1", "1"*40))
    assert not torch.equal(weight(main), weight(tag)) and torch.equal(weight(tag), weight(commit))
    scratch = BACKENDS["scratch"](HUB, device="cpu", dtype=torch.float32, revision="v1")
    assert torch.equal(weight(scratch), weight(tag))
    with pytest.raises(QLoRAError, match="the model cannot be loaded"): load_model(HUB, device="cpu", revision="v9")
    with pytest.raises(QLoRAError, match="has no revision 'v1'"): load_model(hub/"snapshots"/("0"*40), revision="v1")


def test_a_revision_through_a_run_and_what_follows(hub, rows, tmp_path, monkeypatch):
    "Trained, noted, loaded again, chatted with, merged, trained further and resumed: on the same weights throughout."
    from qlora_nb.apps.cli import load_chat
    from qlora_nb.using.merge import merge_and_save
    run = finetune(HUB, rows, tmp_path/"run", model_revision="v1", **QUIET)
    tag, main = load_model(HUB, device="cpu", revision="v1"), load_model(HUB, device="cpu")
    assert torch.equal(weight(run.model), weight(tag)) and run.info["settings"]["model_revision"] == "v1"
    config = json.loads((run.folder/"adapter"/"adapter_config.json").read_text(encoding="utf-8"))
    assert config["revision"] == "v1" and config["base_model_name_or_path"] == HUB
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another base")
        got = load_adapter(run.folder, device="cpu")
        assert got.notes["revision"] == "v1" and torch.equal(weight(got.model), weight(tag))
        assert torch.equal(weight(load_chat(run.folder, None, "cpu")[0]), weight(tag))
        merge_and_save(run.folder, tmp_path/"merged", dtype="float32")
        second = finetune(adapter=run.folder, data=rows, output_dir=tmp_path/"second", **QUIET)
        assert second.info["settings"]["model_revision"] == "v1" and torch.equal(weight(second.model), weight(tag))
    assert torch.equal(weight(load_model(tmp_path/"merged", bits=None, device="cpu", dtype=torch.float32)), weight(tag))
    with pytest.warns(UserWarning, match="someone/tiny at main has other weights than someone/tiny at v1 had"):
        assert torch.equal(weight(load_adapter(run.folder, device="cpu", revision="main").model), weight(main))
    with pytest.raises(QLoRAError, match="model_revision was v1, now None"): finetune(HUB, rows, tmp_path/"run", resume=True, **QUIET)
    with pytest.raises(QLoRAError, match="loaded at v1, not at main"): finetune(tag, rows, tmp_path/"x", model_revision="main", **QUIET)
    assert finetune(tag, rows, tmp_path/"y", **QUIET).info["losses"] == run.info["losses"]


def test_a_tag_that_moved_is_said(hub, rows, tmp_path):
    run = finetune(HUB, rows, tmp_path/"run", model_revision="v1", **QUIET)
    (hub/"refs"/"v1").write_text("0"*40, encoding="utf-8")
    with pytest.warns(UserWarning, match="trained on another base"): load_adapter(run.folder, device="cpu")


def test_the_revision_in_the_file_of_another(hub, tmp_path):
    "As PEFT writes it, without our notes."
    model = add_adapters(load_model(HUB, device="cpu", dtype=torch.float32), r=2)
    folder = save_adapter(model, tmp_path/"a", HUB, revision="v1")
    (folder/"qlora_nb.json").unlink()
    got = load_adapter(folder, device="cpu", dtype=torch.float32).model
    assert torch.equal(weight(got), weight(load_model(HUB, device="cpu", dtype=torch.float32, revision="v1")))
