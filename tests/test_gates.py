"Gates: a T4, which has no bfloat16; no network; and the versions of what draws on Colab."
import ast, json, os, re, subprocess, sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import FalconConfig

from qlora_nb.base.model_files import tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.base.small_falcon import FALCON_RW_1B
from qlora_nb.foundations.adapters import BACKENDS
from qlora_nb.memory.planner import plan
from qlora_nb.training.data import encode_prompt
from qlora_nb.training.finetune import finetune
from qlora_nb.training.settings import Settings
from qlora_nb.using.inference import generate
from common import PAGES, code_cells, read, small_tokenizer

ROOT = Path(__file__).parent.parent


class Seen(TorchDispatchMode):
    "The operations that made a tensor of `dtype`."
    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.ops = dtype, set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(o, torch.Tensor) and o.dtype == self.dtype for o in tree_flatten(out)[0]): self.ops.add(str(func))
        return out


@contextmanager
def a_t4(monkeypatch):
    "What PyTorch says on a T4, as far as types are chosen by it: capability 7.5, and bfloat16 only emulated."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    for o in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):    # the work itself is done by this processor
        if hasattr(torch.cpu, o): monkeypatch.setattr(torch.cpu, o, lambda: False)
    yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "A model that was saved in bfloat16, as most are."
    folder, tok = tmp_path_factory.mktemp("base"), small_tokenizer()
    with quiet():
        tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2).to(torch.bfloat16).save_pretrained(folder)
        tok.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_t4_meets_no_bfloat16(backend, base, tmp_path, monkeypatch):
    "Neither what is loaded, nor a step of training, nor an answer has a tensor in bfloat16."
    from qlora_nb.base.core import pick_dtype
    rows = [dict(prompt=f"{i}?", response="yes") for i in range(12)]
    with a_t4(monkeypatch):
        assert pick_dtype("cpu") == torch.float32 and not torch.cuda.is_bf16_supported(including_emulation=False)
        with monkeypatch.context() as m:
            m.setattr(torch.cuda, "is_available", lambda: True)
            assert pick_dtype("cuda") == torch.float16
        with quiet(): model = BACKENDS[backend](str(base), device="cpu")
        wide = {n for n, o in [*model.named_parameters(), *model.named_buffers()] if o.dtype == torch.bfloat16}
        assert not wide, wide
        del model
        # files in bfloat16 are read as they are, so the run is watched from its first step on
        seen = Seen(torch.bfloat16)
        from qlora_nb.training import finetune as module
        usual = module.train_run
        def watched(*a, **k):
            with seen: return usual(*a, **k)
        monkeypatch.setattr(module, "train_run", watched)
        with quiet(): run = finetune(base, rows, tmp_path/"run", max_steps=2, backend=backend, device="cpu", progress=False)
        with seen: generate(run.model, run.tokenizer, encode_prompt(rows[0], run.tokenizer), max_new_tokens=4)
    assert not seen.ops, seen.ops
    kept = {o.dtype for o in run.model.parameters()}
    assert torch.bfloat16 not in kept, kept


def test_the_watch_sees_bfloat16():
    with Seen(torch.bfloat16) as seen: torch.ones(2).to(torch.bfloat16)*2
    assert seen.ops


@pytest.mark.parametrize("how", [dict(), dict(per_device_train_batch_size=4, max_length=512), dict(method="lora"), dict(method="full")],
                         ids=["plan's", "finetune's", "lora", "full"])
def test_the_packaged_model_fits_a_t4(how):
    assert plan("smollm2", dtype=torch.float16, **how).peak < 15e9


# ---- each model of the pages on a T4 ----

LOADS = "load_model load_base load_chat from_pretrained from_config finetune finetune_and_evaluate".split()
LEVERS = "per_device_train_batch_size max_length r gradient_checkpointing".split()   # settings that `plan` takes too
FALCON = "tiiuae/falcon-rw-1b"


def literal(node):
    try: return ast.literal_eval(node)
    except ValueError: return None


def calls(source):
    "(model, settings) of each call in a cell that loads or trains one; the model is None where no name stands in its place."
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(re.sub(r"^%%?time\b *", "", source, flags=re.M)))):
        if not isinstance(node, ast.Call): continue
        name, keys = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        kind = name.rpartition(".")[2]
        if kind not in LOADS or "Tokenizer" in name: continue
        place = keys.get("model") or keys.get("name") or (node.args[0] if node.args and kind != "finetune_and_evaluate" else ast.Constant("smollm2"))
        how = {k: v for k in LEVERS if k in keys and (v := literal(keys[k])) and v > 0}   # what is refused on a page needs nothing
        if kind.startswith("finetune"): how = {k: v for k in LEVERS if (v := getattr(Settings(), k)) is not None} | how
        if kind == "from_config" or "bits" in keys and literal(keys["bits"]) is None: how["method"] = "lora"
        if "dtype" in keys and ast.unparse(keys["dtype"]) == "torch.float32": how["dtype"] = torch.float32
        yield (model if isinstance(model := literal(place), str) else None), how


def planned(pages):
    """{(model, settings): cells} of all pages. Behind a variable may be any model that its page names; what a page draws at
    random and saves is smaller than the packaged one, or `test_no_page_takes_more_than_a_t4` would notice."""
    out = {}
    for path in pages:
        cells = [(c.id, c.source) for c in code_cells(read(path)) if any(o in c.source for o in LOADS)]
        found = [(f"{path.stem}: {i}", *o) for i, source in cells for o in calls(source)]
        named = {o[1] for o in found} - {None} | ({FALCON} if "FALCON_RW_1B" in path.read_text(encoding="utf-8") else set())
        for cell, model, how in found:
            for name in [model] if model else named: out.setdefault((name, tuple(sorted(how.items()))), []).append(cell)
    return out


def falcon():
    "The configuration as its page writes it down: nothing is asked of the Hub."
    return FalconConfig(**FALCON_RW_1B)


def test_calls_are_found():
    source = "%time m = load_model(bits=None, dtype=torch.float32)\nfinetune(model='a/b', r=8, max_steps=n)\nload_model(folder)"
    train = dict(per_device_train_batch_size=4, max_length=512, gradient_checkpointing=False)
    found = dict(calls(source))
    assert found == {"smollm2": dict(method="lora", dtype=torch.float32), "a/b": train | dict(r=8), None: {}}
    assert list(calls("finetune_and_evaluate(rows)")) == [("smollm2", train)]


def test_every_model_of_the_pages_fits_a_t4():
    "Each as it is loaded or trained there, with CUDA's own part; to load alone takes less than the step that is planned."
    jobs, configs = planned(PAGES), {FALCON: falcon(), "smollm2": "smollm2"}
    assert {m for m, _ in jobs} == configs.keys(), "give the new model's configuration, or say here why it cannot be planned"
    wide = {}
    for (model, how), cells in jobs.items():
        needs = plan(configs[model], **dict(dtype=torch.float16) | dict(how)).needs()
        if needs >= 15e9: wide[model, how] = (needs, cells)
    assert not wide, wide
    assert sum(map(len, jobs.values())) > 60


def test_no_page_takes_more_than_a_t4():
    "What the kernel of each page had in memory, weights and all, where it computes on a processor."
    table = json.loads((ROOT/"tests/durations.json").read_text(encoding="utf-8"))
    assert not {k: gb for rows in table.values() for k, gb in rows["memory"].items() if gb >= 15}


# One process imports the libraries, and what is to run is forked from it: kernels, commands and tests. Imports take longer than these.
FORKED = """
import sys
sys.path.insert(0, "tests")
import forks
from run_notebook import run
def pages(names):
    for o in names:
        print(o, flush=True)   # the last one is the one that failed
        run(f"nbs/{o}.ipynb", kernel_manager_class=forks.Kernels)
def python(code, *args):
    r = forks.run(code, *args, timeout=600)
    print(r.stdout, flush=True)
    if r.returncode: sys.exit(r.stderr)
"""


# ---- no network ----

@cache
def may_unshare():
    try: return subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0
    except OSError: return False


def offline(*args, **env):
    "Run a command in a namespace without a network; the Hub is not switched off by a variable."
    gone = "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"
    env = {k: v for k, v in os.environ.items() if k not in gone} | env
    cmd = ["unshare", "--user", "--map-root-user", "--net", sys.executable, ROOT/"tests/no_network.py", *args]
    return subprocess.run([str(o) for o in cmd], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


needs_namespace = pytest.mark.skipif(sys.platform != "linux" or not may_unshare(), reason="no network namespace may be made here")


@needs_namespace
def test_the_first_command_and_pages_without_a_network(tmp_path):
    "Once the model is in the cache, nothing is asked of the world."
    from qlora_nb.base.model_files import smollm2_folder
    smollm2_folder()
    small = "--per-device-train-batch-size 1 --gradient-accumulation-steps 1 --max-steps 1 --eval-rows 0"
    code = FORKED + f"""
python("from qlora_nb.apps.cli import finetune_main as f; f()", *{small.split()}, "--output-dir", sys.argv[1])
pages(["1_foundations/01_why", "2_training/20_mask_viewer"])"""
    r = offline(sys.executable, "-c", code, tmp_path/"run")
    assert r.returncode == 0, (r.stdout + r.stderr)[-2000:]
    assert json.loads((tmp_path/"run/run.json").read_text(encoding="utf-8"))["steps"] == 1
    assert "2_training/20_mask_viewer" in r.stdout


@needs_namespace
def test_there_is_no_network_there():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "unreachable" in offline(sys.executable, "-c", code).stderr


# ---- what draws and trains on Colab ----

COLAB = ("ipython==7.34.0 ipykernel==6.17.1 ipywidgets==7.7.1 widgetsnbextension==3.6.10 jupyterlab-widgets==3.0.13 trl==0.29.1 "
         "decorator==5.2.1 backcall==0.2.0 pickleshare==0.7.5 ipython-genutils==0.2.0").split()


@pytest.fixture(scope="session")
def colab(tmp_path_factory):
    "A folder of Colab's versions, to be found before ours; its torch and transformers are too large to be fetched for a test."
    folder = tmp_path_factory.mktemp("colab")
    cmd = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", "--target", folder, *COLAB]
    r = subprocess.run([str(o) for o in cmd], capture_output=True, text=True)
    if r.returncode and ("No matching distribution" in r.stderr or "connection" in r.stderr.lower()): pytest.skip("the package index does not answer")
    assert r.returncode == 0, r.stderr[-2000:]
    return folder


def with_colab(colab, *args, **how):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(colab), str(ROOT)]), PYDEVD_DISABLE_FILE_VALIDATION="1")
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def test_pages_on_colabs_versions(colab):
    "Widgets of 2022, IPython 7, and the oldest TRL that we support; one test, as each worker would install them."
    shipped = dict(o.strip().split("==") for o in (ROOT/"tests/colab-2026-08.txt").read_text(encoding="utf-8").splitlines() if "==" in o)
    code = FORKED + """
python("import IPython, ipywidgets, trl; print(IPython.__version__, ipywidgets.__version__, trl.__version__)")
pages(sys.argv[1:])
# the chat's page trains for half a minute; what test_chat.py holds it to takes seconds
python("import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_chat.py")"""
    r = with_colab(colab, "-c", code, "base/quiz", "base/explorer", "1_foundations/00_start", "1_foundations/03_nf4",
                   "2_training/20_mask_viewer", "2_training/22_training_loop", "2_training/30_packing")
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    assert r.stdout.split()[:3] == [shipped["ipython"], shipped["ipywidgets"], "0.29.1"]
    assert "2_training/30_packing" in r.stdout and " passed" in r.stdout, r.stdout[-3000:]
