"The commands as a shell runs them: killed, resumed, fed with broken files, asked for help."
import json, os, random, re, signal, subprocess, sys, time

import pytest
import safetensors.torch, torch

from qlora_nb.apps.cli import finetune_main, finetune_parser, one_line_errors
from qlora_nb.foundations.adapters import BACKENDS
from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.training.data import load_rows

import forks
from common import small_tokenizer
from forks import Fork


def command(name, *args, **kw):
    "Start one of our console commands."
    return Fork(f"import sys; from qlora_nb.apps.cli import {name} as main; main(sys.argv[1:])", *args, **kw)


def call(name, *args, **kw):
    p = command(name, *args, **kw)
    out, err = p.communicate()
    return p.returncode, out, err


@pytest.fixture
def complaint(monkeypatch, capsys):
    "(exit status, what goes to stderr) of a `qlora_finetune` that has to fail before it loads a model; in this process."
    def refuse(*a, **k): raise AssertionError("a model was loaded")
    for o in list(BACKENDS): monkeypatch.setitem(BACKENDS, o, refuse)
    def run(*args):
        with pytest.raises(SystemExit) as e: finetune_main([str(o) for o in args])
        return e.value.code, capsys.readouterr().err
    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a small random Llama and a small tokenizer."
    folder = tmp_path_factory.mktemp("tiny")
    tok = small_tokenizer()
    with quiet(): tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(folder), tok.save_pretrained(folder)
    (folder/"rows.jsonl").write_text("".join(json.dumps(o) + "\n" for o in load_rows("tickets")[:24]), encoding="utf-8")
    return folder


def options(tiny, out, *more, data="rows.jsonl"):   # None: all 800 tickets, whose tokens take longer than a step
    given = [] if data is None or "--data" in more else ["--data", tiny/data]
    return ["--model", tiny, "--device", "cpu", "--output-dir", out, "--max-steps", 30, "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1, "--learning-rate", 0.01,
            "--save-steps", 4, *given, "--eval-rows", 2, *more]


def await_checkpoint(p, folder, step, patience=300):
    "Wait until the command `p` has sealed a checkpoint, and say when that was."
    end = time.monotonic() + patience
    while not list(folder.glob(f"checkpoints/checkpoint-{step}/complete.json")) and p.poll() is None:
        if time.monotonic() > end: p.kill(), pytest.fail(f"no checkpoint-{step} after {patience} s: {p.communicate()[1]}")
        time.sleep(.01)
    return time.monotonic()


def losses(folder): return json.loads((folder/"run.json").read_text(encoding="utf-8"))["losses"]


def adapter(folder): return safetensors.torch.load_file(folder/"adapter"/"adapter_model.safetensors")


def test_kill_and_resume(tiny, tmp_path):
    "kill -9 at a moment nobody chose, resume, and compare with a run that was left alone: bit-equal."
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    assert call("finetune_main", *options(tiny, whole))[0] == 0
    p = command("finetune_main", *options(tiny, killed))
    four = await_checkpoint(p, killed, 4)
    eight = await_checkpoint(p, killed, 8)
    time.sleep(random.Random(os.urandom(8)).uniform(0, 3)*(eight - four))   # of 22 steps, at most about 12 are gone then
    p.send_signal(signal.SIGKILL), p.communicate()
    assert p.returncode == -signal.SIGKILL and not (killed/"adapter").exists(), "the run ended before it was killed"
    status, out, err = call("finetune_main", "--resume", "--output-dir", killed)   # its options are in its config.yaml
    assert status == 0, err
    assert json.loads((killed/"run.json").read_text(encoding="utf-8"))["resumed_from"].startswith("checkpoint-")
    assert losses(killed) == losses(whole)
    a, b = adapter(killed), adapter(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert "exact match" in out and "loss on the answers" in out
    status, _, err = call("finetune_main", "--resume", "--output-dir", killed, "--data", "tickets")
    assert status == 2 and "the rows differ" in err and f"To train longer: --adapter {killed}." in err and "sha256" not in err, err


def test_a_run_is_repeated_from_its_config(tiny, tmp_path):
    "config.yaml of a run, a folder, and nothing else: the same losses and the same adapter in every bit."
    data = tmp_path/"mine.jsonl"
    data.write_text("".join(json.dumps(dict(ask=f"What is {i} + {i}?", say=str(2*i))) + "\n" for i in range(24)), encoding="utf-8")
    asked = ["--data", data, "--columns", "prompt=ask,response=say", "--seed", 3, "--r", 4, "--lora-dropout", 0.1, "--target-modules", "q_proj,v_proj"]
    status, _, err = call("finetune_main", *[6 if o == 30 else o for o in options(tiny, tmp_path/"first", *asked)])
    assert status == 0, err
    config = tmp_path/"first"/"config.yaml"
    status, _, err = call("finetune_main", "--config", config, "--output-dir", tmp_path/"again")
    assert status == 0, err
    assert losses(tmp_path/"again") == losses(tmp_path/"first") and len(losses(tmp_path/"again")) == 6
    a, b = adapter(tmp_path/"first"), adapter(tmp_path/"again")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path/"again"/"config.yaml").read_text(encoding="utf-8") == config.read_text(encoding="utf-8")
    assert json.loads((tmp_path/"again"/"settings.json").read_text(encoding="utf-8")) == json.loads((tmp_path/"first"/"settings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text, said", [("lerning_rate: 0.001", "options that there are not: --lerning_rate"), ("- r", "holds no options"),
                                        ("r: [4", "cannot be read"), ("learning_rate: 0", "learning_rate is 0"), ("long: shrink", "shrink"),
                                        ("seed: 3\nlr: 1", "options that there are not: --lr"), ("r: 2.5", "2.5"), ("max_steps: many", "many"), ("r: 4\nr: 8", "the option 'r' is there twice"),
                                        ("config: more.yaml", "options that there are not: --config"), ("Max-Steps: 3", "--Max-Steps. Did you mean max_steps?"), ("seed: 2024-01-01", "seed is '2024-01-01', and has to be a whole number"),
                                        ("columns: [a, b]", "columns is ['a', 'b'], and has to be text"), ("data: {a: 1}", "data is {'a': '1'}, and has to be text or a list of texts"), ("system: [3]", "system is ['3'], and has to be text"), ("3: 4", "options that there are not: --3"), ("[a]: 4", "cannot be read"),
                                        ("max_steps: 1:30", "max_steps is '1:30', and has to be a whole number"), ("r: true", "r is 'true', and has to be a whole number"), ("learning_rate: 0x10", "learning_rate is '0x10', and has to be a number"),
                                        ("packing: maybe", "packing is 'maybe', and has to be true or false"), ("learning_rate: [1]", "learning_rate is ['1'], and has to be a number")])
def test_a_config_that_cannot_be_right(text, said, tmp_path, complaint):
    "Exit status 2 and the reason, before a model is loaded or a folder made."
    (tmp_path/"config.yaml").write_text(text + "\n", encoding="utf-8")
    status, err = complaint("--config", tmp_path/"config.yaml", "--device", "cpu", "--output-dir", tmp_path/"run")
    assert status == 2 and said in err and "Traceback" not in err, err
    assert not (tmp_path/"run").exists()


def test_a_config_says_what_stands_there(tmp_path):
    "YAML would read 010 as 8, no as false, a date as a date, and 1e-4 as text."
    (tmp_path/"config.yaml").write_text("max_steps: 010\nlearning_rate: 1e-4\nmodel: no\ndata: [2024-01-01, 007]\nsystem: 3\nfast: no\npacking: true\ncolumns: {prompt: 1, response: yes}\nr: ~\n", encoding="utf-8")
    from qlora_nb.apps.cli import finetune_options
    o = finetune_options(["--config", str(tmp_path/"config.yaml"), "--output-dir", "x"])
    assert o["config_yaml"] == dict(max_steps=10, learning_rate=1e-4, model="no", data=["2024-01-01", "007"], system="3", fast=False, packing=True, columns=dict(prompt="1", response="yes"))
    assert o["r"] is None and list(map(type, (o["max_steps"], o["learning_rate"], o["fast"]))) == [int, float, bool]


@pytest.mark.parametrize("command, words", [("cli.finetune_main", "--r 4 --r 8"), ("cli.finetune_main", "--max-steps 3 --max_s=4"), ("cli.finetune_main", "--revision a --model-revision b"),
                                            ("cli.chat_main", "--seed 1 --seed=2"), ("tools.plan_main", "smollm2 --gpu T4 --gpu L4"), ("tools.export_main", "--out a --out b"),
                                            ("quantize.quantize_main", "smollm2 x --seed 1 --seed 2")])
def test_an_option_that_is_there_twice(command, words, capsys):
    "The last one would win without a word."
    import importlib
    module, name = command.split(".")
    with pytest.raises(SystemExit) as e: getattr(importlib.import_module(f"qlora_nb.apps.{module}"), name)(words.split())
    said = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and said.endswith(" is there twice, and only one can be meant") and said.split("error: --")[1].split()[0] in ("r", "max-steps", "model-revision", "seed", "gpu", "out")


def test_an_option_wins_over_the_config(tmp_path):
    (tmp_path/"config.yaml").write_text("r: 4\nmax_steps: 3\npacking: true\n", encoding="utf-8")
    from qlora_nb.apps.cli import finetune_options
    o = finetune_options(["--config", str(tmp_path/"config.yaml"), "--r", "8", "--output-dir", "x"])
    assert (o["r"], o["max_steps"], o["packing"]) == (8, 3, True) and o["config_yaml"] == dict(r=8, max_steps=3, packing=True)


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path):
    p = command("finetune_main", *options(tiny, tmp_path/"my run"))
    await_checkpoint(p, tmp_path/"my run", "*")
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert "stopped. checkpoint-" in err and "is complete" in err
    assert f"To go on: qlora_finetune --resume --output-dir '{tmp_path/'my run'}'" in err   # to be pasted: a space is in it


def test_a_command_that_is_asked_to_end(capsys):
    "As a queue of a cluster asks it: what was begun is cleared away, and one line says how to go on. A file that is closed to us is one line too."
    left, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e, one_line_errors("Give --resume."):
        try: os.kill(os.getpid(), signal.SIGTERM), time.sleep(1)
        except Exception: left.append("an error that is caught on the way")
        finally: left.append("cleared")
    assert e.value.code == 143 and left == ["cleared"] and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "\nstopped by a signal. Give --resume.\n"
    with pytest.raises(SystemExit) as e, one_line_errors(): open("nowhere/model.safetensors", encoding="utf-8")
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: nowhere/model.safetensors: this cannot be used (No such file or directory). Check its name")
    for more, said in ((("table.arrow",), r"table.arrow: there was no room to write [(].* free[)]. Make room there."), ((), "there was no room to write. Make room.")):   # a file that is open has no name in the error
        with pytest.raises(SystemExit) as e, one_line_errors(): raise OSError(28, "No space left on device", *more)
        assert e.value.code == 2 and re.fullmatch(f"error: {said}\n", capsys.readouterr().err)


def test_evaluated_while_it_trains(tiny, tmp_path):
    "The options of a run that is watched arrive, and `run.json` says which step was the best."
    args = [o for o in options(tiny, tmp_path/"run", "--eval-steps", 3, "--early-stopping-patience", 2, "--optim", "adamw_8bit") if o not in ("--max-steps", 30)]
    status, out, err = call("finetune_main", *args, "--max-steps", 6)
    assert status == 0, err
    run = json.loads((tmp_path/"run"/"run.json").read_text(encoding="utf-8"))
    assert [s for s, _ in run["eval_losses"]] == [3, 6] and run["best_step"] in (3, 6)
    assert run["best_eval_loss"] == min(o for _, o in run["eval_losses"]) and run["settings"]["optim"] == "adamw_8bit"


@pytest.mark.parametrize("more", ["--optim paged_adamw_8bit", "--optim adam", "--early-stopping-patience 0", "--eval-steps 0", "--report-to everywhere"])
def test_options_that_cannot_work(more, tmp_path, complaint):
    "Exit status 2 and one line, before a model is loaded or a folder made."
    status, err = complaint("--device", "cpu", "--output-dir", tmp_path/"run", *more.split())
    errors = [o for o in err.splitlines() if o.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err, err
    assert not (tmp_path/"run").exists()


def test_data_that_is_given_twice(tmp_path, complaint):
    "The second --data would take the place of the first."
    for twice in (["--data", "a.jsonl", "--data", "b.jsonl"], ["--data=a.jsonl", "--data", "b.jsonl"]):
        status, err = complaint(*twice, "--output-dir", tmp_path/"run")
        assert status == 2 and err.splitlines()[-1].endswith("--data is there twice: name all data after one, such as --data a.jsonl b.jsonl")
    status, err = complaint("--template", "chat", "--chat-template", "own.jinja", "--output-dir", tmp_path/"run")
    assert status == 2 and err.endswith("error: --chat-template own.jinja and --template chat: give one of them\n")


def test_the_run_json_of_own_data(tiny, tmp_path):
    data = tmp_path/"mine.csv"
    data.write_text("prompt,response\n" + "".join(f"What is {i}+{i}?,{2*i}\n" for i in range(30)), encoding="utf-8")
    status, out, err = call("finetune_main", *options(tiny, tmp_path/"run", "--data", data, "--num-train-epochs", 1)[:-4], *("--num-train-epochs", 1))
    assert status == 2 and "max_steps and num_train_epochs are both given" in err
    args = [o for o in options(tiny, tmp_path/"run", data=None) if o not in ("--max-steps", 30)]
    status, out, err = call("finetune_main", *args, "--data", data, "--num-train-epochs", 1)
    assert status == 0, err
    run = json.loads((tmp_path/"run"/"run.json").read_text(encoding="utf-8"))
    assert {"before", "after", "train_seconds", "total_seconds", "peak_memory_gb", "trainable_parameters", "total_parameters", "settings",
            "versions"} <= set(run)
    assert run["settings"]["rows"] == 28 and run["eval_rows"] == 2 and run["steps"] == 14
    assert (tmp_path/"run"/"loss.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((tmp_path/"run"/"adapter"/"adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny)
    status, out, err = call("chat_main", "--adapter", tmp_path/"run", "--max-new-tokens", 4, stdin="What is 2+2?\n/exit\n")
    assert status == 0 and "each one is answered on its own" in out, err


BROKEN = {"missing.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n', "empty.jsonl": b"", "latin1.jsonl": b'{"prompt": "caf\xe9", "response": "b"}\n',
          "shape.jsonl": b'{"ask": "a", "say": "b"}\n', "list.jsonl": b"[1, 2]\n", "torn.jsonl": b'{"prompt": "a", "resp\n',
          "ragged.csv": b"prompt,response\na,b,c\n", "header.csv": b"a,b\n1,2\n", "number.jsonl": b'{"prompt": "a", "response": 3}\n',
          "turns.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n', "role.jsonl": b'{"messages": [{"role": "bot", "content": "a"}]}\n'}


@pytest.mark.parametrize("name", [*BROKEN, "nowhere.jsonl"])
def test_broken_files(name, tmp_path, complaint):
    "Exit status 2, one line, the file's name in it, and no model loaded."
    if name in BROKEN: (tmp_path/name).write_bytes(BROKEN[name])
    status, err = complaint("--data", tmp_path/name, "--output-dir", tmp_path/"run")
    assert status == 2 and err.count("\n") == 1 and name in err and "error: " in err, err
    assert not (tmp_path/"run").exists()


def test_help_is_quick_and_complete():
    "Each option with its default, and without waiting for PyTorch."
    code = "import sys; from qlora_nb.apps.cli import finetune_main; finetune_main(['--help'])"
    p = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert not [o for o in p.stderr.splitlines() if o.split("|")[-1].strip() == "torch"]
    for o in "--model --data --output-dir --max-steps --num-train-epochs --learning-rate --r --lora-alpha --target-modules --max-length --seed --resume --eval-steps --early-stopping-patience --optim --report-to".split(): assert o in p.stdout
    options = [o for o in finetune_parser()._actions if o.dest != "help"]
    said, explained = " ".join(p.stdout.split()), [o for o in options if "(None: " in o.help]   # what None stands for is said once
    assert said.count("(default:") == len(options) - len(explained) and said.count("(None: ") == len(explained) > 20
    assert said.endswith("Example: qlora_finetune --data my.jsonl --output-dir runs/mine")


def test_chat_without_a_run(tmp_path):
    status, _, err = call("chat_main", cwd=tmp_path)
    assert status == 2 and "no finished run" in err and err.count("\n") == 1


@pytest.mark.parametrize("args, said", [(["--help"], "usage: qlora_finetune"), (["chat", "--help"], "usage: qlora_chat"),
                                        (["--max-steps", "1", "--num-train-epochs", "1"], "are both given")])
def test_the_module_does_what_the_command_does(args, said):
    p = forks.run("import runpy; runpy.run_module('qlora_nb.apps.cli', run_name='__main__', alter_sys=True)", *args)   # python -m
    assert said in p.stdout + p.stderr and (p.returncode == 0) == ("--help" in args)


def test_bytes_that_are_not_text_are_asked_all_the_same(monkeypatch, capsys):
    "A terminal in Latin-1 sends caf\xe9, which Python hands on as a lone surrogate."
    from qlora_nb.apps import cli
    typed, asked = iter(["caf\udce9", "/exit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(cli, "say_answer", lambda model, tok, said, notes, **how: asked.append(said[-1]["content"]) or "")
    cli.chat_loop(None, None, {})
    assert asked == ["caf\ufffd"] and asked[0].encode("utf-8")


@pytest.mark.parametrize("more, said", [("--max-steps 1 --learning-rate 0", "learning_rate is 0"), ("--lora-dropout 1.5", "lora_dropout is 1.5"), ("--eval-rows -1", "eval_rows is -1")])
def test_numbers_that_make_no_sense(more, said, tmp_path, complaint):
    status, err = complaint("--device", "cpu", "--output-dir", tmp_path/"run", *more.split())
    assert status == 2 and said in err and not (tmp_path/"run").exists()


@pytest.mark.parametrize("more", ["--max-new-tokens 0", "--max-new-tokens -1", "--temperature -1", "--temperature nan", "--top-p 2", "--top-k -1", "--min-p -1",
                                  "--repetition-penalty 0", "--seed -1"])
def test_numbers_that_make_no_sense_in_a_chat(more, monkeypatch, capsys):
    "They are refused before a model is loaded, which may take minutes."
    from qlora_nb.apps import cli
    def refuse(*a): raise AssertionError("a model was loaded")
    monkeypatch.setattr(cli, "load_chat", refuse)
    option, value = more.split()
    with pytest.raises(SystemExit) as e: cli.chat_main(["--model", "smollm2", option, value])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"error: the {option.strip('-').replace('-', '_')} is {value}") and err.count("\n") == 1, err


def test_eval_rows_0_through_the_command(tiny, tmp_path):
    "Nothing is held out and nothing is scored, with rows of your own and a test file beside them as well."
    rows = [dict(prompt=f"What is {i}?", response="word") for i in range(1, 21)]
    for name, part in (("mine", rows[:15]), ("test", rows[15:])):
        (tmp_path/f"{name}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in part), encoding="utf-8")
    (tmp_path/"more.jsonl").write_text(json.dumps(dict(prompt="One more?", response="Yes.")) + "\n", encoding="utf-8")
    for name, more, n in (("tickets", [], 800), ("own", ["--data", tmp_path/"mine.jsonl", tmp_path/"more.jsonl", "--test-data", tmp_path/"test.jsonl"], 16)):
        args = [o for o in options(tiny, tmp_path/name, data=None) if o not in ("--max-steps", 30, "--eval-rows")][:-1]
        status, out, err = call("finetune_main", *args, "--eval-rows", 0, "--max-steps", 1, *more)
        assert status == 0 and "Nothing was scored, as eval_rows is 0." in out and ("eval_rows=0: test_data is not used." in err) == (name == "own"), err
        run = json.loads((tmp_path/name/"run.json").read_text(encoding="utf-8"))
        assert run["settings"]["rows"] == n and run["steps"] == 1 and run["after"] is None
        assert run["data"] == ("tickets" if name == "tickets" else f"{tmp_path/'mine.jsonl'}, {tmp_path/'more.jsonl'}")


def test_row_numbers_through_the_command(tmp_path, complaint, tiny, monkeypatch):
    "Rows are held out and shuffled on the way; the message names the file and the row in it."
    from qlora_nb.foundations.loading import load_model
    monkeypatch.setitem(BACKENDS, "bnb", load_model)
    rows = [dict(prompt=f"What is {i}?", response="word "*(400 if i == 13 else 1)) for i in range(1, 21)]
    (tmp_path/"mine.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows), encoding="utf-8")
    status, err = complaint("--model", tiny, "--device", "cpu", "--data", tmp_path/"mine.jsonl", "--output-dir", tmp_path/"run", "--long", "error")
    assert status == 2 and "mine.jsonl, row 13: the example has" in err


def test_a_system_prompt_stands_before_each_conversation(monkeypatch, capsys):
    from qlora_nb.apps import cli
    typed, asked = iter(["a", "b", "/new", "c", "/exit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(cli, "say_answer", lambda model, tok, said, notes, **how: asked.append([m["content"] for m in said]) or "y")
    cli.chat_loop(None, None, {}, **{k: v for k, v in vars(cli.chat_parser().parse_args(["--system", "S"])).items() if k == "system"})
    assert asked == [["S", "a"], ["S", "a", "y", "b"], ["S", "c"]]


def test_a_chat_takes_its_folder_as_an_export_does(monkeypatch):
    "RUN alone, `--adapter RUN`, and the base under both of its names."
    from qlora_nb.apps import cli
    from qlora_nb.apps.tools import export_parser
    class Asked(Exception): pass
    def note(*which): raise Asked(*which)
    monkeypatch.setattr(cli, "load_chat", note)
    for words in (["run", "--base", "b"], ["--adapter", "run", "--model", "b"]):
        with pytest.raises(Asked) as e: cli.chat_main(words)
        assert e.value.args == ("run", "b", None, None)
    assert export_parser().parse_args(["run", "--out", "o", "--model", "b"]).base == "b"
