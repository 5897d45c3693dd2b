"What several test files look at: the settings, the notebooks, and the cells of a notebook."
from configparser import ConfigParser
from copy import deepcopy
from functools import cache
from pathlib import Path

import nbformat
from filelock import FileLock

from qlora_nb.base.cells import directives

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT/"qlora_nb"
NBS = ROOT/"nbs"
# In the order of the course: 1_foundations … 7_speed, apps, base, classroom. The pages in zh are translations: tests/test_zh.py.
PAGES = sorted(o for o in NBS.glob("*/*.ipynb") if o.parent.name != "zh")
NOTEBOOKS = [*PAGES, NBS/"index.ipynb"]
LESSONS = [o for o in PAGES if o.name[0].isdigit()]
MODULES = sorted(o for o in PACKAGE.rglob("*.py") if not o.name.startswith("_"))
def module_name(path): return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)  # `training.data`
_ini = ConfigParser(delimiters=["="])
_ini.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = _ini["DEFAULT"]


@cache
def learnt_tokenizer(size):
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.training.tickets import make_tickets
    return load_tokenizer().train_new_from_iterator([str(row) for row in make_tickets("train")], size)


def small_tokenizer(size=1000):
    """SmolLM2's tokenizer, its rules, special tokens and template, with entries learnt from the tickets instead of 49,152.

    For models whose weights are random anyway: most of their time would go into the head, and into a GGUF's vocabulary.
    It is learnt once, and each test gets a copy of its own."""
    return deepcopy(learnt_tokenizer(size))


def small_base(folder, size):
    "A folder with a small random Llama and a small tokenizer."
    from qlora_nb.base.model_files import tiny_model
    from qlora_nb.base.nf4_config import quiet
    tok = small_tokenizer(size)
    with quiet():
        tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(folder)
        tok.save_pretrained(folder)
    return folder


def once(tmp_path_factory, worker_id, name, build):
    "The folder that `build` makes, once for all workers of a run: the first builds, the others wait."
    folder = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    out, done = folder/name, folder/f"{name}.done"
    with FileLock(folder/f"{name}.lock"):
        if not done.exists():
            build(out)
            done.touch()
    return out


def read(path): return nbformat.read(path, as_version=4)
def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code"]
def install_cells(nb): return [c.source for c in code_cells(nb) if "%pip install" in c.source]


def exported_module(nb):
    "The name that a page gives its module in `#| default_exp`, or None."
    return next((d["default_exp"] for c in code_cells(nb) if "default_exp" in (d := directives(c.source))), None)
