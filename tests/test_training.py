"Training runs that are killed, starved, filled up, poisoned and resumed: what is left must be whole, and what follows the same bits."
import importlib.util, json, math, os, re, shutil, signal, subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch, transformers

from qlora_nb.base.errors import QLoRAError
from qlora_nb.foundations.adapters import BACKENDS
from qlora_nb.base.core import cpu_kind
from qlora_nb.training.data import load_rows
from qlora_nb.evaluation.evaluation import finetune_and_evaluate, hold_out_numbers
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.base.runs import is_sealed, last_checkpoint, latest_run
from qlora_nb.training.learning_rate import suggest_lr
from qlora_nb.training.schedule import number_rows, overlap, repetitions, say_overlap, tell
from qlora_nb.training.finetune import finetune, make_trainer

from common import once, small_base, small_tokenizer
from forks import Fork

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
ROWS = 24
# Dropout, accumulation, evaluations that come between the checkpoints, the end of the data in the middle, early stopping at work.
HOW = dict(max_steps=9, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, save_steps=4, eval_steps=3, early_stopping_patience=9, lora_dropout=0.1, device="cpu", progress=False)
KILLS = 4  # of each run that is killed, for each backend


@pytest.fixture(scope="session")
def base(tmp_path_factory, worker_id):
    "A folder with a small random Llama and a small tokenizer."
    return once(tmp_path_factory, worker_id, "killed-base", lambda folder: small_base(folder, 1000))


@pytest.fixture(scope="session")
def rows(): return load_rows("tickets")[:ROWS]


@pytest.fixture(scope="session")
def whole(base, rows, tmp_path_factory, worker_id):
    "A run that was left alone, for each backend."
    def build(folder):
        for backend in ("bnb", "scratch"): finetune(base, rows, folder/backend, backend=backend, **HOW)
    return once(tmp_path_factory, worker_id, "killed-whole", build)


def outcome(folder):
    "All that a resumed run must share with one that was left alone."
    info = json.loads((folder/"run.json").read_text(encoding="utf-8"))
    return {k: info[k] for k in ("losses", "eval_losses", "best_step", "best_eval_loss", "steps")}, \
           (folder/"adapter"/"adapter_model.safetensors").read_bytes()


# A process that has imported everything, and forks a child for each attempt: imports would take longer than the runs.
FORKS = """
import gc, json, os, random, signal, sys, time, torch
import qlora_nb.speed.data_parallel as data_parallel, qlora_nb.training.finetune as training
from qlora_nb.training.data import load_rows
base, folder, backend, kills, seed, how, rows = json.loads(sys.argv[1])
rng, rows, sent = random.Random(seed), load_rows("tickets")[:rows], []   # was a signal sent to each attempt, or was it over before?
real_seal, real_save = data_parallel.seal, torch.save
def slow_seal(f): time.sleep(.15), real_seal(f), time.sleep(.02)       # a save takes longer, so that kills fall into it
def slow_save(*a, **k): time.sleep(.1), real_save(*a, **k)
data_parallel.seal, torch.save = slow_seal, slow_save
gc.collect(), gc.freeze()
def run(resume):
    training.finetune(base, rows, folder, backend=backend, resume=resume, **how)
def attempt(resume, seconds, sig, saving=False):
    "Exit status of a child, killed after so many seconds of it, or of its first new checkpoint; -9 where the kill came in time."
    there, begun = state(), not saving
    if (pid := os.fork()) == 0:
        try: run(resume); os._exit(0)
        except BaseException as e: sys.stderr.write(f"{type(e).__name__}: {e}\\n"); sys.stderr.flush(); os._exit(1)
    end = time.monotonic() + seconds
    sent.append(False)
    while not begun or time.monotonic() < end:
        if not begun and set(state()) - set(there): begun, end = True, time.monotonic() + seconds
        if (got := os.waitpid(pid, os.WNOHANG))[0]: return os.waitstatus_to_exitcode(got[1])
        time.sleep(.005)
    os.kill(pid, sig)
    sent[-1] = True
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def state(): return sorted(o.name for o in __import__("pathlib").Path(folder).glob("checkpoints/checkpoint-*"))
"""

KILLED = FORKS + """
from qlora_nb.base.runs import is_sealed
from pathlib import Path
report, length, k = [], 1.5, 0
while k < kills:
    saving = k % 2 == 1   # every other kill falls into a save, however busy the machine is
    status = attempt(k > 0, rng.uniform(0, .1) if saving else rng.uniform(.3, 1)*length, signal.SIGKILL, saving)
    if status == 0: break
    torn = [o.name for o in Path(folder).glob("checkpoints/checkpoint-*") if not is_sealed(o)]
    report.append((status, state(), torn)); k += 1; length *= 1.5
if not (Path(folder)/"run.json").exists(): report.append((attempt(True, 300, signal.SIGKILL), state(), []))
print(json.dumps(report))
"""


def forks(code, *args):
    p = Fork(code, json.dumps(args), env=dict(CUDA_VISIBLE_DEVICES=""))   # CUDA, once asked whether it is there, refuses all forked children
    said, err = p.communicate(timeout=500)
    assert said.strip(), err[-2000:]
    return json.loads(said.splitlines()[-1]), err


@unix
@pytest.mark.parametrize("backend", ["bnb", "scratch"])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again(backend, seed, base, whole, tmp_path):
    "kill -9 at random moments of training, evaluation and saving; each time it is resumed, and killed again."
    run = tmp_path/"run"
    report, err = forks(KILLED, str(base), str(run), backend, KILLS, seed, HOW, ROWS)
    statuses = [o[0] for o in report]
    assert set(statuses) <= {0, -signal.SIGKILL} and statuses.count(-signal.SIGKILL) >= 2, (report, err[-2000:])
    assert any(o[2] for o in report), report   # in the middle of a save
    assert outcome(run) == outcome(whole/backend), report
    print(f"{backend}: {statuses.count(-signal.SIGKILL)} kills, {sum(bool(o[2]) for o in report)} in the middle of a save")


@unix
def test_ctrl_c_at_any_moment(base, whole, tmp_path):
    "SIGINT, as a terminal sends it: one message that names what is complete, and a resume to the same bits."
    code = FORKS + "print(json.dumps([attempt(False, .3, signal.SIGINT, True), attempt(True, 300, signal.SIGINT), sent[0]]))"
    for i in range(3):   # a machine that stands still for a second can let the run end before the signal is sent
        run = tmp_path/f"run{i}"
        statuses, err = forks(code, str(base), str(run), "bnb", 1, 0, HOW, ROWS)
        if statuses[2]: break
    assert statuses[1:] == [0, True], err[-2000:]
    assert statuses[0] and "KeyboardInterrupt: " in err and ("is complete: go on from it" in err or "No checkpoint was complete" in err), err
    assert outcome(run) == outcome(whole/"bnb")


def test_a_damaged_checkpoint_is_never_used(whole, tmp_path):
    "Each file of the last checkpoint is cut short, emptied, removed in turn."
    import shutil
    names = [o.relative_to(last_checkpoint(whole/"bnb"/"checkpoints")) for o in last_checkpoint(whole/"bnb"/"checkpoints").rglob("*") if o.is_file()]
    assert {"trainer_state.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.safetensors"} <= {str(o) for o in names}
    for name in names:
        for k, harm in enumerate((lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(b""), lambda f: f.unlink())):
            copy = tmp_path/f"{name.name}-{k}"
            shutil.copytree(whole/"bnb"/"checkpoints", copy)
            last = last_checkpoint(copy)
            harm(last/name)
            found = last_checkpoint(copy)
            assert found is not None and found != last and is_sealed(found) and not last.exists(), name
            shutil.rmtree(copy)


def test_resume_after_the_last_checkpoint_was_damaged(base, rows, whole, tmp_path):
    import shutil
    run = tmp_path/"run"
    shutil.copytree(whole/"bnb", run), shutil.rmtree(run/"adapter"), (run/"run.json").unlink()
    (last_checkpoint(run/"checkpoints")/"optimizer.pt").write_bytes(b"half a file")
    assert finetune(base, rows, run, resume=True, **HOW).info["resumed_from"] != "checkpoint-9"
    assert outcome(run) == outcome(whole/"bnb")


# ---- failures ----

def disturbed(base, rows, out, step, do, **more):
    "The exception of a run in which `do(trainer, inputs)` is called in the given step."
    from qlora_nb.training.training_loop import AdapterTrainer
    real = AdapterTrainer.training_step
    def training_step(self, model, inputs, n=None):
        if self.state.global_step + 1 == step: do(self, inputs)
        return real(self, model, inputs, n)
    AdapterTrainer.training_step = training_step
    try: finetune(base, rows, out, **HOW | more)
    except BaseException as e: return e
    finally: AdapterTrainer.training_step = real


def cuda_oom(*_): raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.75 GiB")
def cpu_oom(*_): torch.empty(2**62, dtype=torch.uint8)
def python_oom(*_): raise MemoryError


@pytest.mark.parametrize("do", [cuda_oom, cpu_oom, python_oom], ids=lambda o: o.__name__)
def test_out_of_memory(do, base, rows, tmp_path):
    e = disturbed(base, rows, tmp_path/"run", 6, do)
    assert isinstance(e, QLoRAError) and str(e).count("\n") == 0
    for o in ("memory ran out", "--per-device-train-batch-size 1 --gradient-accumulation-steps 4", "--gradient-checkpointing", "--max-length", "checkpoint-4 is complete", "--resume"):
        assert o in str(e), (o, str(e))
    assert last_checkpoint(tmp_path/"run"/"checkpoints").name == "checkpoint-4"
    info = finetune(base, rows, tmp_path/"run", resume=True, **HOW | dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, gradient_checkpointing=True)).info
    assert len(info["losses"]) == 9 and all(map(math.isfinite, info["losses"]))


def test_no_space_left(base, rows, whole, tmp_path, monkeypatch):
    "The optimizer's state cannot be written at step 8: ENOSPC, as Python says it."
    import errno
    real = torch.save
    def full(obj, f, *a, **k):
        if "checkpoint-8" in str(f) and "optimizer" in str(f):
            Path(f).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(obj, f, *a, **k)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(QLoRAError, match="no room to write .* checkpoint-6 is complete"): finetune(base, rows, tmp_path/"run", **HOW)
    assert not (tmp_path/"run"/"checkpoints"/"checkpoint-8").exists()
    monkeypatch.setattr(torch, "save", real)
    finetune(base, rows, tmp_path/"run", resume=True, **HOW)
    assert outcome(tmp_path/"run") == outcome(whole/"bnb")


def test_a_folder_that_goes_while_the_run_goes(base, rows, tmp_path, monkeypatch):
    "Removed, it is begun anew, said, and the run can be gone on with; a file in its place ends the run in a sentence. No other folder is needed."
    import shutil, tempfile
    from transformers import TrainerCallback
    class Away(TrainerCallback):
        def __init__(self, then): self.then = then
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 1: shutil.rmtree(Path(args.output_dir).parent), self.then(Path(args.output_dir).parent)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"nowhere"))
    how = dict(max_steps=2, save_steps=2, per_device_train_batch_size=1, device="cpu", progress=False)
    with pytest.warns(UserWarning, match="this folder was removed or renamed during the run"):
        finetune(base, rows, tmp_path/"run", callbacks=[Away(lambda _: None)], **how)
    assert finetune(base, rows, tmp_path/"run", resume=True, **how).info["resumed_from"] == "checkpoint-2"
    with pytest.raises(QLoRAError, match="checkpoint-2 cannot be used any more .Not a directory.*No checkpoint was complete"):
        finetune(base, rows, tmp_path/"other", callbacks=[Away(lambda o: o.write_text("", encoding="utf-8"))], **how)


def test_a_disk_that_is_really_full(base, rows, whole, tmp_path):
    "A file system in memory with room for two checkpoints; with room for more, the run goes on to the same bits."
    disk = tmp_path/"disk"
    disk.mkdir()
    one = sum(f.stat().st_size for f in last_checkpoint(whole/"bnb"/"checkpoints").rglob("*") if f.is_file())
    def mount(how, n): return subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={n}", "tmpfs", str(disk)], capture_output=True).returncode
    if not hasattr(os, "geteuid") or os.geteuid() or mount("", int(2.6*one)): pytest.skip("may not mount a file system")
    try:
        with pytest.raises(QLoRAError, match="no room to write"): finetune(base, rows, disk/"run", **HOW)
        left = list((disk/"run"/"checkpoints").iterdir())
        assert left and all(map(is_sealed, left))
        assert not mount("remount,", 10*one)
        assert finetune(base, rows, disk/"run", resume=True, **HOW).info["resumed_from"] in {o.name for o in left}
        assert outcome(disk/"run") == outcome(whole/"bnb")
    finally: subprocess.run(["umount", str(disk)])


@pytest.mark.parametrize("module, name", [("training.finetune", "write_config"), ("evaluation.evaluation", "write_json")])
def test_a_full_disk_is_one_message_in_every_phase(module, name, base, rows, tmp_path, monkeypatch):
    "Before the training and behind it too, with the place where room is missing; then the run goes on."
    import errno, importlib
    from qlora_nb.evaluation.evaluation import finetune_and_evaluate
    from qlora_nb.speed import data_parallel
    place = data_parallel if name == "write_json" else importlib.import_module(f"qlora_nb.{module}")
    def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path/"cache"/"table"))
    how = dict(model=base, eval_rows=2, max_steps=2, device="cpu", progress=False, output_dir=tmp_path/"run")
    with monkeypatch.context() as m:
        m.setattr(place, name, full)
        with pytest.raises(QLoRAError, match="cache.table: there was no room to write .* free.. Make room there."): finetune_and_evaluate(rows, **how)
    assert finetune_and_evaluate(rows, resume=True, **how).after


# ---- NaN ----

def first_adapter(trainer): return next(p for n, p in trainer.model.named_parameters() if p.requires_grad)
def nan_gradient(trainer, inputs): first_adapter(trainer).register_hook(lambda g: g*float("inf"))
def nan_adapter(trainer, inputs): first_adapter(trainer).data[0, 0] = float("inf")
def nan_base(trainer, inputs): trainer.model.get_input_embeddings().weight.data[inputs["input_ids"][0, 3]] = float("nan")


@pytest.mark.parametrize("backend", ["bnb", "scratch"])
@pytest.mark.parametrize("do, said", [(nan_gradient, "the learning rate is too high"), (nan_adapter, "the adapters hold NaN already"),
                                      (nan_base, "weights of the base are damaged")], ids=["gradient", "adapter", "base"])
def test_nan_stops_before_the_optimizer(do, said, backend, base, rows, tmp_path):
    "The step and its rows are named, the last checkpoint stays, and no adapter has been written to."
    seen = []
    def watched(trainer, inputs):
        seen.append((trainer, list(inputs["rows"]), {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}))
        if len(seen) == 1: do(trainer, inputs)
    e = disturbed(base, rows, tmp_path/"run", 6, watched, backend=backend)
    assert isinstance(e, QLoRAError) and all(o in str(e) for o in ("at step 6", said, "checkpoint-4 is complete")), str(e)
    trainer, _, before = seen[0]
    now = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    changed = [n for n in before if not torch.equal(before[n], now[n])]
    assert changed == [] or do is nan_adapter and len(changed) == 1
    from qlora_nb.training.schedule import set_aside
    numbers = set_aside(rows, wanted=True)[0]
    named = [str(numbers[i]) for _, drawn, _ in seen for i in drawn]
    assert all(f" {n} (" in str(e) for n in named[:2]), (named, str(e))


def test_rows_keep_their_numbers(rows):
    "Also where rows that are too long were left out in between."
    tok = load_tokenizer()
    with pytest.warns(UserWarning, match="left out"): examples = number_rows(rows, range(1, len(rows) + 1), tok, "auto", 95)
    from qlora_nb.training.data import encode
    assert 0 < len(examples) < len(rows) and all(e["input_ids"] == encode(rows[e["row"] - 1], tok)["input_ids"] for e in examples)


# ---- the same gradient, however a step is divided ----

@pytest.mark.parametrize("kind, backend", [("falcon", "bnb"), ("falcon", "scratch"), ("llama", "bnb")])
def test_accumulation_over_unequal_lengths(kind, backend, rows, tmp_path):
    from qlora_nb.foundations.adapters import BACKENDS, add_adapters
    from qlora_nb.base.core import set_seed
    from qlora_nb.training.data import encode_rows
    tok = small_tokenizer()
    with quiet(): tiny_model(kind, vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(tmp_path/"base")
    examples = encode_rows(rows, tok)
    def run(size, accumulation):
        set_seed(0)
        model = add_adapters(BACKENDS[backend](tmp_path/"base", device="cpu", dtype=torch.float32))
        t = make_trainer(model, tok, examples, tmp_path/"out", False, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-2)
        with quiet(): t.train()
        return [(h["loss"], h["grad_norm"]) for h in t.state.log_history if "loss" in h]
    one, four = run(8, 1), run(2, 4)
    assert max(abs(a/b - 1) for x, y in zip(four, one) for a, b in zip(x, y)) < 1e-5


# ---- settings ----

def refuse(*a, **k): raise AssertionError("a model was loaded")


@pytest.mark.parametrize("more, said", [
    (dict(optim="paged_adamw_8bit"), "does not work on cpu. Choose from: auto, adamw_torch, adamw_8bit"),
    (dict(optim="adam"), "there is no optimizer 'adam'"), (dict(report_to="wandb"), "pip install wandb"), (dict(report_to="all"), "no report to 'all'"),
    (dict(early_stopping_patience=0), "early_stopping_patience is 0"), (dict(eval_steps=-1), "eval_steps is -1"), (dict(data=[dict(prompt="a", response="b")]*5), "too few"),
    (dict(eval_data="nowhere.jsonl"), "no such file")], ids=lambda o: next(iter(o)) if isinstance(o, dict) else "")
def test_wrong_settings_fail_before_a_model_is_loaded(more, said, base, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "bnb", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(QLoRAError, match=re.escape(said)): finetune(**dict(HOW, model=base, data=rows, output_dir=tmp_path/"run") | more)
    assert not (tmp_path/"run").exists()


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard(base, rows, tmp_path):
    finetune(base, rows, tmp_path/"run", report_to="tensorboard", **HOW | dict(max_steps=2))
    assert list((tmp_path/"run").rglob("events.out.tfevents*"))


def test_eight_bit_optimizer_resumes_to_the_same_bits(base, rows, tmp_path):
    how = HOW | dict(optim="adamw_8bit")
    run = finetune(base, rows, tmp_path/"a", **how)
    e = disturbed(base, rows, tmp_path/"b", 6, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), optim="adamw_8bit")
    assert isinstance(e, KeyboardInterrupt) and "checkpoint-4 is complete" in str(e)
    assert finetune(base, rows, tmp_path/"b", resume=True, **how).info["losses"] == run.info["losses"]
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


def test_evaluation_does_not_touch_training_in_the_types_of_this_machine(base, rows, tmp_path):
    "The trap of bitsandbytes on a CPU with bfloat16: an evaluation that repacks the weights would ruin all later gradients."
    import bitsandbytes as bnb
    plain = {k: v for k, v in HOW.items() if k not in ("eval_steps", "early_stopping_patience")}
    plain |= dict(fast=False, max_steps=4)   # the fast step is not caught; an evaluation ruins the very next step
    watched = dict(eval_data=rows[:4], eval_steps=1)
    alone = finetune(base, rows, tmp_path/"a", **plain).info["losses"]
    assert finetune(base, rows, tmp_path/"b", **watched, **plain).info["losses"] == alone
    armed = load_model(base, device="cpu")
    if armed.dtype != torch.bfloat16 or cpu_kind() != "AVX512-BF16": return
    for m in armed.modules():
        if isinstance(m, bnb.nn.Linear4bit): m.support_avx512bf16_for_cpu = True
    # What the loader prevents: with this the test would notice, or the trap is gone and the loader may forget about it.
    assert finetune(armed, rows, tmp_path/"c", load_tokenizer(base), **watched, **plain).info["losses"] != alone


# ---- the folder of a run ----

def test_checkpoints_of_others_are_never_removed(whole, tmp_path):
    "transformers writes folders of the same name, without a seal; a half-written one of ours lies beside them."
    import shutil
    theirs = last_checkpoint(whole/"bnb"/"checkpoints")
    shutil.copytree(theirs, tmp_path/"checkpoint-500"), (tmp_path/"checkpoint-500"/"complete.json").unlink(), (tmp_path/"checkpoint-500"/".qlora_nb").unlink()
    assert last_checkpoint(tmp_path) is None and (tmp_path/"checkpoint-500"/"optimizer.pt").exists()
    shutil.copytree(theirs, tmp_path/"checkpoint-8"), (tmp_path/"checkpoint-8"/"complete.json").unlink()
    assert last_checkpoint(tmp_path) is None and not (tmp_path/"checkpoint-8").exists() and (tmp_path/"checkpoint-500").exists()


def test_a_run_that_is_over_is_resumed_with_the_bar_on(base, rows, whole, tmp_path, capsys):
    "The way that Ctrl-C in the evaluation advises; in a terminal the bar is on."
    import shutil
    run = tmp_path/"run"
    shutil.copytree(whole/"bnb", run), shutil.rmtree(run/"adapter"), (run/"run.json").unlink()
    assert finetune(base, rows, run, resume=True, **HOW | dict(progress=True)).info["resumed_from"] == "checkpoint-9"
    assert outcome(run) == outcome(whole/"bnb")


def test_a_bar_that_never_began_can_be_closed():
    from qlora_nb.base.progress import LivePlot, ProgressBar
    for o in (ProgressBar(), LivePlot()): o.close(), o.close()


def test_no_callback_hides_an_error(base, rows, tmp_path):
    "A callback of the reader's own, whose `close` fails, and an error before the first step."
    from transformers import TrainerCallback
    class Bad(TrainerCallback):
        def on_train_begin(self, *a, **k): raise ZeroDivisionError("the first error")
        def close(self): raise AttributeError("the second error")
    with pytest.raises(ZeroDivisionError, match="the first error"): finetune(base, rows, tmp_path/"run", callbacks=[Bad()], **HOW | dict(progress=True))


def test_resume_of_nothing_says_so(base, rows, tmp_path):
    with pytest.warns(UserWarning, match="no complete checkpoint to go on from"): finetune(base, rows, tmp_path/"typo", resume=True, **HOW | dict(max_steps=1))


@pytest.mark.parametrize("where", ["file", "below"])
def test_an_output_that_cannot_be_a_folder(where, base, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "bnb", refuse)
    (tmp_path/"file").write_text("mine", encoding="utf-8")
    out = tmp_path/"file" if where == "file" else tmp_path/"file"/"below"
    with pytest.raises(QLoRAError, match="cannot be written"): finetune(base, rows, out, **HOW)
    assert (tmp_path/"file").read_text(encoding="utf-8") == "mine"


def test_hidden_folders_are_not_in_the_way(tmp_path):
    from qlora_nb.base.runs import open_run
    (tmp_path/"run"/".ipynb_checkpoints").mkdir(parents=True)
    open_run(tmp_path/"run", dict(learning_rate=1), False)
    assert (tmp_path/"run"/"settings.json").exists()


# ---- what is trained, and for how long ----

QUIET = dict(per_device_train_batch_size=4, learning_rate=1e-2, device="cpu", progress=False)


@pytest.mark.parametrize("n, batch, accumulation, epochs", [(10, 4, 1, 1), (5, 4, 1, 10), (9, 2, 2, 3)])
def test_epochs_are_passes_to_the_row(n, batch, accumulation, epochs, base, rows, tmp_path, monkeypatch):
    "Counted where the trainer draws its batches."
    from collections import Counter
    from qlora_nb.training.training_loop import AdapterTrainer
    real, drawn = AdapterTrainer.training_step, Counter()
    def step(self, model, inputs, k=None):
        drawn.update(inputs["rows"])
        return real(self, model, inputs, k)
    monkeypatch.setattr(AdapterTrainer, "training_step", step)
    finetune(base, rows[:n], tmp_path/"run", num_train_epochs=epochs, **QUIET | dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation))
    assert drawn == {i: epochs for i in range(n)}


def test_a_length_is_given_once_and_the_rate_follows_the_model(base, rows, tmp_path):
    with pytest.raises(QLoRAError, match="max_steps and num_train_epochs are both given"): finetune(base, rows, tmp_path/"a", max_steps=1, num_train_epochs=1, **QUIET)
    info = finetune(base, rows[:4] + rows[:2], tmp_path/"b", device="cpu", progress=False).info
    assert info["settings"]["learning_rate"] == suggest_lr(576) and info["settings"]["num_train_epochs"] == 3 and info["steps"] == 6
    assert "3 passes over 6 rows; 2 of them repeat an earlier one" in info["said"][0] and "learning rate 0.0013, from hidden size" in info["said"][1]


def test_numbers_are_those_of_the_file(base, rows, tmp_path):
    "Whatever rows are set aside, and through the name of the file."
    from qlora_nb.training.data import encode
    tok = load_tokenizer(base)
    long = dict(rows[0], prompt=rows[0]["prompt"]*20)
    file = tmp_path/"mine.jsonl"
    file.write_text("".join(json.dumps(o) + "\n" for o in [*rows[:12], long, *rows[13:]]), encoding="utf-8")
    size = len(encode(long, tok)["input_ids"])
    with pytest.raises(QLoRAError, match=f"mine.jsonl, row 13: the example has {size} tokens"):
        finetune(base, file, tmp_path/"run", max_steps=1, long="error", eval_steps=1, leave_out=(2, 3), **QUIET)


def test_no_row_of_the_data_is_in_the_adapter(base, tmp_path):
    secret = [dict(prompt=f"Patient {i} has a secret", response="yes") for i in range(4)]
    for asked in (None, "Patient X has what?"):
        run = finetune(base, secret, tmp_path/str(asked), max_steps=1, example=asked, **QUIET)
        text = (run.folder/"adapter"/"qlora_nb.json").read_text(encoding="utf-8")
        assert "secret" not in text and json.loads(text).get("example") == asked


# ---- a model that is given ----

def test_a_second_run_on_one_model(base, rows, tmp_path):
    "The first run's model is not changed behind its back; going on from it is said."
    m = load_model(base, device="cpu")
    first = finetune(m, rows[:4], tmp_path/"a", max_steps=1, **QUIET)
    was = {n: p.detach().clone() for n, p in first.model.named_parameters() if "lora_" in n}
    with pytest.raises(QLoRAError, match="carries the adapter of an earlier run. .*run.model.unload"): finetune(m, rows[4:8], tmp_path/"b", max_steps=1, **QUIET)
    assert all(torch.equal(p, was[n]) for n, p in first.model.named_parameters() if n in was) and not (tmp_path/"b").exists()
    with pytest.raises(QLoRAError, match="asked for was r 4 instead of 16"): finetune(first, rows[4:8], tmp_path/"c", max_steps=1, r=4, **QUIET)
    second = finetune(first, rows[4:8], tmp_path/"c", max_steps=1, **QUIET)
    assert second.info["settings"]["r"] == 16 and any("which is trained further" in o for o in second.info["said"])
    assert json.loads((tmp_path/"c"/"adapter"/"adapter_config.json").read_text(encoding="utf-8"))["r"] == 16
    m = second.model.unload()
    assert not any("lora_" in n for n, _ in m.named_parameters()) and finetune(m, rows[:4], tmp_path/"d", max_steps=1, r=4, **QUIET).info["settings"]["r"] == 4


def test_a_second_stage_from_a_file_trains_what_it_loads(base, rows, tmp_path):
    from qlora_nb.training.saved_adapters import load_adapter
    finetune(base, rows[:4], tmp_path/"a", max_steps=1, **QUIET)
    got = load_adapter(tmp_path/"a", device="cpu")
    was = {n: p.detach().clone() for n, p in got.model.named_parameters() if "lora_" in n}
    run = finetune(got, rows[4:8], tmp_path/"b", max_steps=2, **QUIET)
    now = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert now.keys() == was.keys() and any(not torch.equal(now[n], was[n]) for n in now)


def test_models_from_elsewhere(base, rows, tmp_path):
    "Loaded by transformers, without our tokenizer; and one that was made from a config."
    from transformers import AutoModelForCausalLM
    with quiet(): theirs = AutoModelForCausalLM.from_pretrained(base)
    run = finetune(theirs, rows[:4], tmp_path/"a", max_steps=1, **QUIET)
    assert run.info["settings"]["model"] == str(base) and run.info["said"][-1].startswith("0.0% of the weights")
    with pytest.raises(QLoRAError, match="set model.qlora_nb_name"): finetune(tiny_model(), rows[:4], tmp_path/"b", max_steps=1, **QUIET)


# ---- the rehearsal ----

def test_the_rehearsal_changes_no_bit(base, rows, tmp_path, monkeypatch):
    "With dropout, on either backend: the run with it is the run without it."
    import qlora_nb.training.finetune as training
    how = dict(HOW, max_steps=3, eval_steps=None, early_stopping_patience=None)
    for backend in ("bnb", "scratch"):
        with_it = finetune(base, rows, tmp_path/f"{backend}-a", backend=backend, **how).info["losses"]
        with monkeypatch.context() as m:
            m.setattr(training, "rehearse", lambda *a, **k: [])
            assert finetune(base, rows, tmp_path/f"{backend}-b", backend=backend, **how).info["losses"] == with_it


@pytest.mark.parametrize("words", [2, 200])
def test_few_tokens_are_rounded_more_coarsely(base, words):
    "In bfloat16 a mean over two tokens is four times as inexact as one over 32: 4 % are rounding there, and an error here."
    from contextlib import nullcontext
    from qlora_nb.training.rehearsal import cross_entropy, same_losses
    model = tiny_model("llama").to(torch.bfloat16)
    ids = torch.arange(words + 1)[None] % 60
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    trainer = SimpleNamespace(model=model, compute_loss_context_manager=nullcontext, aux_loss_enabled=False,
                              compute_loss=lambda m, b, num_items_in_batch: m(**b).loss*1.04)
    judge = lambda: same_losses(trainer, batch, batch, lambda m, b: cross_entropy(trainer, b[0])[0])
    if words == 2:
        true = cross_entropy(trainer, batch)[0]
        assert judge() == (true, pytest.approx(.04*true, rel=.05))
    else:
        with pytest.raises(QLoRAError, match="the trainer's loss is"): judge()


def test_the_rehearsal_stops_before_the_first_step(base, rows, tmp_path, monkeypatch):
    from qlora_nb.training.training_loop import AdapterTrainer
    steps, real = [], AdapterTrainer.compute_loss
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *a: steps.append(1))
    monkeypatch.setattr(AdapterTrainer, "compute_loss", lambda self, *a, **k: real(self, *a, **k) + 1)
    with pytest.raises(QLoRAError, match="the trainer's loss is .* the cross-entropy on the model's own logits"): finetune(base, rows, tmp_path/"run", max_steps=1, **QUIET)
    assert not steps


def test_tokens_that_the_model_does_not_have(base, rows, tmp_path):
    tok = load_tokenizer(base)
    tok.add_tokens(["ticketword"])
    new = [dict(prompt="a", response="a ticketword")]*2
    with pytest.raises(QLoRAError, match="row 1: the token 'ticketword' has the number"): finetune(load_model(base, device="cpu"), new, tmp_path/"run", tokenizer=tok, max_steps=1, **QUIET)


# ---- the scores in the end ----

def test_the_evaluation_never_undoes_a_run(base, rows, tmp_path, monkeypatch):
    "Rows that are cut, rows of which none fits, a long answer that training would leave out, and an error."
    from qlora_nb.evaluation import evaluation
    how = dict(model=base, max_steps=1, max_length=256, **QUIET)
    long = [dict(r, prompt=r["prompt"]*12) for r in rows[:12]]
    assert evaluation.finetune_and_evaluate(long, long="cut", output_dir=tmp_path/"cut", **how).after.n == 1
    lengths, real = [], evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda m, t, p, n, **k: lengths.append(n) or real(m, t, p, 2, **k))
    endless = [*rows[20:], dict(prompt="Go on", response="word "*1500)]
    report = evaluation.finetune_and_evaluate(rows[:20], test_data=endless, output_dir=tmp_path/"one", **how)
    assert report.after.n == report.info["eval_rows"] == 4 and max(lengths) <= 256 and len(report.rows) == 4
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: 1/0)
    with pytest.warns(UserWarning, match="The evaluation failed .*ZeroDivisionError") as said:
        report = evaluation.finetune_and_evaluate(rows[:20], test_data=rows[20:], output_dir=tmp_path/"error", **how)
    assert {o.filename for o in said if "evaluation failed" in str(o.message)} == {__file__}   # the line that called, not ours
    assert "The evaluation failed" in str(report) and json.loads((tmp_path/"error"/"run.json").read_text(encoding="utf-8"))["steps"] == 1


@pytest.mark.parametrize("score, said", [
    ([dict(prompt="Go on", response="word "*600)]*3, "the rows to score: all rows are longer than max_length=256"),
    ([dict(prompt="a", response="b", tools=[dict(type="function", function=dict(name="f"))])], "the rows to score, the rows given, row 1: the chat template leaves out the tools"),
    ([dict(prompt="a", response="a ticketword")], "the rows to score, row 1: the token 'ticketword' has the number")])
def test_rows_to_score_are_read_before_the_training(score, said, base, rows, tmp_path, monkeypatch):
    "What no scores could be taken on is refused before a model is loaded, not after it was trained."
    monkeypatch.setattr("qlora_nb.training.finetune.load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    if "ticketword" in said:
        shutil.copytree(base, base := tmp_path/"more")
        (tok := load_tokenizer(base)).add_tokens(["ticketword"]), tok.save_pretrained(base)
    with pytest.raises(QLoRAError, match=re.escape(said)):
        finetune_and_evaluate(rows, test_data=score, model=base, output_dir=tmp_path/"run", max_steps=1, max_length=256, **QUIET)


@pytest.mark.parametrize("data", ["tickets", "rows", "file"])
def test_eval_rows_0_trains_and_scores_nothing(data, base, rows, tmp_path):
    "Nothing is held out either: all rows are trained on."
    (path := tmp_path/"mine.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows), encoding="utf-8")
    given = dict(tickets="tickets", rows=rows, file=path)[data]
    report = finetune_and_evaluate(given, eval_rows=0, model=base, max_steps=1, output_dir=tmp_path/"run", **QUIET)
    assert report.after is None and report.rows == [] and report.info["eval_rows"] == 0 and len(report.info["losses"]) == 1
    assert report.info["settings"]["rows"] == (800 if data == "tickets" else ROWS)
    assert report.info["not_evaluated"] == "Nothing was scored, as eval_rows is 0." and report.info["not_evaluated"] in str(report)


def test_eval_rows_0_beside_other_rows(base, rows, tmp_path):
    "A validation file still chooses the best step; a test file is not used, which is said."
    how = dict(eval_rows=0, model=base, max_steps=1, eval_steps=1, **QUIET)
    report = finetune_and_evaluate(rows[:20], eval_data=rows[20:], output_dir=tmp_path/"a", **how)
    assert len(report.info["eval_losses"]) == 1 and report.info["before"] is report.info["after"] is None
    with pytest.warns(UserWarning, match="eval_rows=0: test_data is not used."):
        report = finetune_and_evaluate(rows[:20], rows[20:22], test_data=rows[22:], output_dir=tmp_path/"b", **how)
    assert report.after is None and report.info["settings"]["rows"] == 20


@pytest.mark.parametrize("out, said", [([0], "no row 0 to leave out"), ([3, ROWS + 1], f"no row {ROWS + 1} to leave out"), ([-1], "no row -1"),
                                       ([1.5], "no row 1.5"), (range(1, ROWS + 1), "no row is left to train on")])
def test_rows_that_cannot_be_left_out(out, said, rows, tmp_path):
    with pytest.raises(QLoRAError, match=said): finetune("smollm2", rows, tmp_path/"run", leave_out=out, **QUIET)
    assert not (tmp_path/"run").exists()


def test_what_was_warned_of_is_said_once(rows, capsys):
    "The overlap stood twice on a terminal: as a note, and above the bar."
    trainer = SimpleNamespace()
    with pytest.warns(UserWarning, match="3 of 3 evaluation rows"): lines = ["3 steps.", say_overlap(rows, rows[:3]), None]
    tell(trainer, lines)
    assert capsys.readouterr().err == "3 steps.\n" and trainer.said == lines[:2]


def test_a_run_that_is_refused_leaves_nothing(base, rows, tmp_path, monkeypatch):
    "Its folder held config.yaml and settings.json, and `--resume` took it for the latest run."
    monkeypatch.chdir(tmp_path)
    how = dict(model=base, max_steps=1, **QUIET)
    finetune(data=rows[:4], output_dir="runs/good", **how)
    for wrong in (dict(max_length=8), dict(max_length=8, long="error"), dict(target_modules=["nowhere"])):
        with pytest.raises(QLoRAError): finetune(data=rows[:4], output_dir="runs/bad", **how | wrong)
        assert not Path("runs/bad").exists() and latest_run() == Path("runs/good")
    Path("runs/mine").mkdir()
    with pytest.raises(QLoRAError): finetune(data=rows[:4], output_dir="runs/mine", max_length=8, **how)
    assert finetune(data=rows[:4], output_dir="runs/mine", **how).info["steps"] == 1


def test_rows_whose_answers_are_long_are_rehearsed(base, tmp_path):
    "The last 64 tokens of a longer answer are predicted but for the first; the trainer's loss was divided by all 64, and each run refused."
    rows = [dict(prompt="Say it.", response=f"{n} quick brown foxes jump over the lazy dog, and it rains. "*12) for n in ("Two", "Six", "Ten")]
    run = finetune(base, rows, tmp_path/"run", max_steps=1, max_length=512, **QUIET)
    assert run.info["steps"] == 1


def test_validation_and_test_are_two_things(base, rows, tmp_path):
    "eval_data means the same in both calls; what is trained on and judged by is reported; repeated rows stay."
    from qlora_nb.evaluation.evaluation import finetune_and_evaluate
    how = dict(model=base, max_steps=1, **QUIET)
    with pytest.warns(UserWarning, match="2 of 4 evaluation rows are training rows too") as said:
        report = finetune_and_evaluate(rows[:12] + rows[:3], rows[10:14], output_dir=tmp_path/"a", eval_steps=1, test_data=rows[14:17], **how)
    assert next(o.filename for o in said if "evaluation rows" in str(o.message)) == __file__
    assert report.rows == rows[14:17] and report.info["settings"]["rows"] == 15 and len(report.info["eval_losses"]) == 1
    with pytest.raises(QLoRAError, match="eval_rows is -1"): finetune_and_evaluate(rows, eval_rows=-1, output_dir=tmp_path/"b", **how)
    report = finetune_and_evaluate(rows[:12] + rows[:12], output_dir=tmp_path/"c", **how)
    assert report.info["settings"]["rows"] == 22 and len(report.rows) == 1   # its twin is not trained on
    assert "exact match" in report._repr_markdown_() and repr(report) == str(report)


def test_a_damaged_file_is_not_called_a_full_disk(tmp_path):
    "torch's words for both begin alike."
    from qlora_nb.base.failures import is_disk_error
    torch.save(dict(a=torch.ones(100)), tmp_path/"a.pt")
    (tmp_path/"a.pt").write_bytes((tmp_path/"a.pt").read_bytes()[:-200])
    with pytest.raises(RuntimeError) as e: torch.load(tmp_path/"a.pt")
    assert not is_disk_error(e.value), str(e.value)
    assert is_disk_error(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))


def test_ctrl_c_while_the_model_is_loaded(base, rows, tmp_path, monkeypatch):
    import qlora_nb.training.finetune as training
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(training, "load_base", stop)
    with pytest.raises(KeyboardInterrupt, match="No checkpoint was complete"): finetune(base, rows, tmp_path/"run", max_steps=1, **QUIET)


# ---- rows that stay on the disk ----

class Stop(transformers.TrainerCallback):
    "Ctrl-C behind a step."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step: raise KeyboardInterrupt


@pytest.fixture
def on_disk(tmp_path, rows, monkeypatch):
    "The same rows as lines, with a cache of their own."
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path/"cache"))
    (path := tmp_path/"rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_mapped_rows_give_the_same_run(base, whole, on_disk, tmp_path):
    run = finetune(base, on_disk, tmp_path/"run", large=True, **HOW)
    assert outcome(tmp_path/"run") == outcome(whole/"bnb")
    assert run.info["said"][0].startswith(f"{ROWS} rows, mapped from disk ({tmp_path/'cache'}"), run.info["said"]


def test_mapped_rows_are_packed_as_listed_ones(base, rows, on_disk, tmp_path):
    how = HOW | dict(max_steps=2, packing=True, max_length=300, leave_out=[2, 24], fast=False)
    for name, data, large in (("a", rows, None), ("b", on_disk, True)): finetune(base, data, tmp_path/name, large=large, **how)
    assert outcome(tmp_path/"a") == outcome(tmp_path/"b")


def test_a_run_goes_on_with_its_rows_on_disk(base, whole, rows, on_disk, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="checkpoint-4 is complete"): finetune(base, rows, tmp_path/"run", callbacks=[Stop(5)], **HOW)
    text = on_disk.read_text(encoding="utf-8")
    on_disk.write_text(text.replace("A", "B", 1), encoding="utf-8")
    with pytest.raises(QLoRAError, match="only with its own settings: the rows differ"): finetune(base, on_disk, tmp_path/"run", large=True, resume=True, **HOW)
    on_disk.write_text(text, encoding="utf-8")
    assert finetune(base, on_disk, tmp_path/"run", large=True, resume=True, **HOW).info["resumed_from"] == "checkpoint-4"
    assert outcome(tmp_path/"run") == outcome(whole/"bnb")


def test_a_broken_row_at_the_far_end_is_named_before_training(base, rows, on_disk, tmp_path):
    on_disk.write_text("\n\n".join(map(json.dumps, [*rows]*100)) + '\n\n{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(QLoRAError) as e: finetune(base, on_disk, tmp_path/"run", large=True, **HOW)
    assert e.value.where == f"{on_disk}, row {100*ROWS + 1}" and not (tmp_path/"run").exists()
    with pytest.warns(UserWarning, match=f"1 row, the first is row {100*ROWS + 1}"): kept = load_rows(on_disk, large=True, skip_bad_rows=True)
    mapped, listed = ([list(o) for o in hold_out_numbers(data, 9, 1)] for data in (kept, [*rows]*100))
    assert mapped == listed and repetitions(kept) == 99*ROWS
    assert overlap(kept, rows[:3]) == (3, 0) and overlap(rows[:3], kept) == (300, 0)


def test_packs_are_checked_at_the_length_that_they_have(base, rows, tmp_path):
    "A row as long as this max_length would not fit into any memory."
    run = finetune(base, rows[:6], tmp_path/"run", packing=True, max_length=10**9, max_steps=1, fast=False, **QUIET)
    assert run.info["steps"] == 1 and "over 1 packs" in run.info["said"][0], run.info["said"]


def test_fewer_steps_than_eval_steps_are_evaluated_at_the_end(base, rows, tmp_path):
    run = finetune(base, rows[:12], tmp_path/"run", eval_data=rows[12:14], eval_steps=20, max_steps=1, fast=False, **QUIET)
    assert [step for step, _ in run.info["eval_losses"]] == [1] == [run.info["best_step"]]


MANY = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import datasets, many_rows, qlora_nb.training.data as data, qlora_nb.training.finetune as training
folder, base, large, counts, how = Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
datasets.config.HF_DATASETS_CACHE = str(folder/"cache")
known, real = [], data._fit
def fit(*args, **how):   # of equally long rows: what the tokenizer computes takes long, and no memory
    if not known: known.append(real(*args, **how))
    example, *more = known[0]
    return {k: [*v] for k, v in example.items()}, *more
data._fit, data._notes = fit, lambda *args: {}
for name in ("prepare", "train_run"): assert callable(getattr(training, name))
found = []
for n in counts:
    rows = (json.dumps(dict(prompt=f"Is {i:7} a number? " + "Say yes or no. "*5, response="yes")) for i in range(n))
    (path := folder/f"{n}.jsonl").write_text("\\n".join(rows) + "\\n", encoding="utf-8")
    with many_rows.Watch() as watch:
        for name in ("prepare", "train_run"): watch.add(training, name)
        training.finetune(base, path, folder/f"run{n}", large=large, **how)
    found.append({k: o["anonymous"] + watch.start[0] for k, o in watch.phases.items()})
print(json.dumps(found[1:]))
"""  # anonymous memory at the highest moment of two phases


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_does_not_grow_with_the_rows(base, tmp_path):
    """A list of such rows takes some thousand bytes for each, mapped ones a few numbers in arrays. The peak of a process is known
    to some megabytes, which are hundreds of bytes for each of so few rows; `many_rows.json` holds more of them."""
    few, many = 2_500, 14_500   # both more than the thousand that are in memory at a time
    how = dict(max_steps=1, fast=False, device="cpu", progress=False)
    def growth(large):
        (folder := tmp_path/str(large)).mkdir()
        args = Path(__file__).parent.parent/"nbs"/"experiments", folder, *map(json.dumps, (str(base), large, [1_500, few, many], how))
        p = Fork(MANY, *args)
        out, err = p.communicate()
        assert p.returncode == 0, err
        a, b = json.loads(out.splitlines()[-1])
        return {k: round((b[k] - a[k])/(many - few)) for k in a}
    mapped, listed = growth(True), growth(False)
    assert 2*max(mapped.values()) < min(listed.values()), (mapped, listed)


def test_numbers_of_rows_are_arrays():
    "What is drawn, left out, packed and compared, for so many rows: a list of Python's numbers takes 40 bytes a row, a set 100."
    import datasets, numpy as np, tracemalloc
    from qlora_nb.base.mapped import Mapped, Order, all_but
    from qlora_nb.evaluation.evaluation import rows_to_score
    from qlora_nb.training.packing import pack
    from qlora_nb.training.schedule import set_aside
    n, g = 100_000, np.random.default_rng(0)
    rows = Mapped(datasets.Dataset.from_dict(dict(prompt=np.arange(n))), lambda o: dict(prompt=str(o["prompt"]), response="yes"))
    rows.counted = {f"content to {end}": np.arange(n) for end in (None, -1)} | dict(tokens=g.integers(8, 200, n))
    def taken(f):
        "Bytes of a row, at the highest moment."
        tracemalloc.start()
        try: return f(), tracemalloc.get_traced_memory()[1]/n
        finally: tracemalloc.stop()
    found = dict(order=taken(lambda: sum(Order(n)))[1], left=taken(lambda: all_but(range(5, 9), n))[1], packs=taken(lambda: pack(rows, 512))[1],
                 same=taken(lambda: (repetitions(rows), overlap(rows, [rows[3]]), overlap([rows[3]], rows)))[1],
                 aside=taken(lambda: set_aside(rows, wanted=True))[1], scored=taken(lambda: rows_to_score(rows, rows))[1])
    assert found["order"] < 1 and max(found.values()) < 80 and max(v for k, v in found.items() if k != "packs") < 36, found


def test_mapped_rows_are_scored_too(base, on_disk, tmp_path):
    report = finetune_and_evaluate(on_disk, eval_rows=2, test_data=on_disk, model=base, output_dir=tmp_path/"run", large=True,
                                   **HOW | dict(max_steps=1, eval_steps=None, early_stopping_patience=None))
    assert report.after.n == 2 and report.info["data"] == str(on_disk)
