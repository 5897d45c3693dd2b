"The suite itself: what a change touches, how long things take and in which order they run, and the limit of `.ci/run`."
import json, os, re, shutil, subprocess, sys
from types import SimpleNamespace

import nbformat, pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import changed, durations, forks
from cell_times import cell_times
from common import NOTEBOOKS, ROOT
from changed import touched

PAGE = "tests/test_notebooks.py::test_page_runs[{}.ipynb]"


# ---- what a change touches ----

TEXTS = {"qlora_nb/p/a.py": "import torch", "qlora_nb/p/b.py": "from .a import x", "qlora_nb/q/c.py": "def f():\n    from ..p.b import y",
         "qlora_nb/q/d.py": "", "nbs/1_p/01_a.ipynb": "#| default_exp p.a", "nbs/2_q/02_c.ipynb": "from qlora_nb.q.c import f",
         "nbs/2_q/03_d.ipynb": "from qlora_nb.q import d\nrows = stored_results('speed')", "tests/common.py": "from run_notebook import run",
         "tests/run_notebook.py": "", "tests/test_b.py": "from common import x\nCODE = '''\nimport qlora_nb.p.b\n'''",
         "tests/test_frame.py": "", "tests/test_d.py": "from qlora_nb.p import a as x\nfrom qlora_nb import call",
         "qlora_nb/__init__.py": 'FRONT = dict(call="q.d")'}


@pytest.mark.parametrize("file, expected", [
    ("qlora_nb/p/a.py", "qlora_nb/p/a.py qlora_nb/p/b.py qlora_nb/q/c.py nbs/2_q/02_c.ipynb tests/test_b.py tests/test_d.py"),
    ("qlora_nb/q/c.py", "qlora_nb/q/c.py nbs/2_q/02_c.ipynb"), ("qlora_nb/q/d.py", "qlora_nb/q/d.py nbs/2_q/03_d.ipynb tests/test_d.py"),
    ("nbs/1_p/01_a.ipynb", "nbs/1_p/01_a.ipynb"), ("nbs/results/speed.json", "nbs/2_q/03_d.ipynb"), ("tests/test_d.py", "tests/test_d.py"),
    ("tests/run_notebook.py", "tests/run_notebook.py tests/common.py tests/test_b.py nbs/1_p/01_a.ipynb nbs/2_q/02_c.ipynb nbs/2_q/03_d.ipynb"),
    ("LICENSE", ""), ("constraints.txt", " ".join(TEXTS))])
def test_what_a_change_touches(file, expected):
    assert touched([file], TEXTS) == {*expected.split(), "tests/test_frame.py"}


def test_nothing_changed(): assert touched([], TEXTS) == set()


def test_every_page_that_imports_a_module_is_found():
    "Against another way to look: the modules that Python has loaded after the imports of a page's module."
    texts = changed.sources()
    code = "import sys\nfor m in sys.argv[1:]: __import__(f'qlora_nb.{m}')\nprint(*(o for o in sys.modules if o.startswith('qlora_nb.')))"
    loaded = forks.run(code, "evaluation.perplexity").stdout.split()   # none of our modules is loaded in a fork
    assert len(loaded) > 5
    for o in loaded:
        if o.count(".") == 2: assert "nbs/5_evaluation/56_data_types.ipynb" in touched([o.replace(".", "/") + ".py"], texts), o
    assert "nbs/5_evaluation/55_perplexity.ipynb" in touched(["qlora_nb/foundations/loading.py"], texts)
    assert "tests/test_cli.py" in touched(["qlora_nb/training/finetune.py"], texts)


def test_files_that_differ_from_a_commit():
    base, files = changed.changed_files("HEAD")
    assert base and all((ROOT/o).exists() or o for o in files)
    with pytest.raises(ValueError, match="no commit 'nowhere'"): changed.changed_files("nowhere")


def test_fixtures_are_made_once():
    "Long tests of all files come first, and between two files pytest takes down what belongs to a module: that may only be a setting."
    made = [(o.name, *f) for o in (ROOT/"tests").glob("test_*.py") if o.name != "test_browser.py"
            for f in re.findall(r'^@pytest.fixture\((.*scope="module".*)\)\ndef (\w+)', o.read_text(encoding="utf-8"), re.M)]
    assert made and not [o for o in made if "autouse" not in o[1] and "params" not in o[1]], made


# ---- how long it takes ----

ROWS = dict(pages={"core": [8, 9], "45_merge": [80, 90]}, files={"tests/test_a.py": [5, 6]}, tests={"tests/test_a.py::long": [4, 5]})


def test_longest_first():
    names = ["tests/test_a.py::short", "tests/test_a.py::long", PAGE.format("core"), PAGE.format("99_new"), PAGE.format("45_merge")]
    order = sorted(names, key=lambda o: durations.position(o, ROWS))
    assert order == [PAGE.format("99_new"), PAGE.format("45_merge"), PAGE.format("core"), names[1], names[0]]


def test_pages_over_their_budget():
    took = {PAGE.format("core"): (12.5, 50), PAGE.format("45_merge"): (121, 90), PAGE.format("99_new"): (500, 500),
            "tests/test_a.py::long": (500, 500)}
    assert durations.over_budget(took, ROWS) == {"45_merge": "45_merge took 121 CPU seconds; its budget is 80"}
    assert durations.over_budget({PAGE.format("core"): (13.5, 9)}, ROWS) == {"core": "core took 14 CPU seconds; its budget is 8"}


@pytest.mark.parametrize("busy", [.5, 1, 3])
def test_a_budget_knows_how_busy_the_machine_is(busy):
    rows = dict(pages={f"{o:02}_page": [20, 20] for o in range(12)})
    took = {PAGE.format(o): (20*busy, 20) for o in rows["pages"]}
    assert durations.pace(took, rows) == max(1, busy) and not durations.over_budget(took, rows)
    took[PAGE.format("03_page")] = 20*max(1, busy)*1.6, 20
    assert list(durations.over_budget(took, rows)) == ["03_page"]
    for o in ("07_page", "08_page", "09_page"): took[PAGE.format(o)] = took[PAGE.format("03_page")]
    assert not durations.over_budget(took, rows)   # a third of all pages has not grown: the processor is another


def test_the_table_is_written_and_read(tmp_path):
    path = tmp_path/"durations.json"
    whole = {PAGE.format("core"): (8.04, 9), "tests/test_a.py::long[1-2]": (4, 5), "tests/test_a.py::short": (1, .5)}
    durations.save(whole, True, path)
    rows = durations.load(path)[durations.kind()]
    assert rows == {"pages": {"core": [8, 9]}, "files": {"tests/test_a.py": [5, 5.5]}, "tests": {"tests/test_a.py::long[1-2]": [4, 5]}}
    durations.save({PAGE.format("08_loading"): (3, 3), "tests/test_a.py::long[1-2]": (6, 6)}, False, path)
    rows = durations.load(path)[durations.kind()]
    assert rows["pages"] == {"core": [8, 9], "08_loading": [3, 3]} and rows["files"] == {"tests/test_a.py": [5, 5.5]}
    assert rows["tests"] == {"tests/test_a.py::long[1-2]": [6, 6]}
    assert durations.rows_for({"another": 1}, "this") == 1 and durations.rows_for({}) == {}


def test_each_page_has_a_budget():
    "On one kind of processor at least, since nobody has all of them: `pytest -k PAGE --save-durations` gives it one."
    pages, table = {o.stem for o in NOTEBOOKS}, durations.load()
    for kind, rows in table.items(): assert set(rows["pages"]) <= pages, f"{kind}: rows of pages that are gone"
    if table: assert pages == {p for rows in table.values() for p in rows["pages"]}


def test_slow_cells_are_named(tmp_path):
    slow = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    cells = [new_markdown_cell("# One"), *map(new_code_cell, ["1", "#| eval: false\n1/0", slow, "1/0", "never"])]
    nbformat.write(new_notebook(cells=cells), tmp_path/"a.ipynb")
    lines = cell_times(tmp_path/"a.ipynb")
    whole, first, *rest = (next(lines) for _ in range(4))
    assert whole.endswith("3 cells") and first.endswith("[3] import time") and float(whole.split()[0]) >= float(first.split()[0]) >= .4
    with pytest.raises(CellExecutionError, match="division by zero"): next(lines)


# ---- in use ----

def pytest_in(folder, *args):
    "A run of pytest in its own process, in `folder`, with the suite's conftest."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    light = [o for name in ("cacheprovider", "hypothesispytest", "anyio") for o in ("-p", f"no:{name}")]
    r = subprocess.run([sys.executable, "-m", "pytest", *light, *args], cwd=folder, env=env, capture_output=True, text=True)
    return f"{r.stdout}{r.stderr}\nexit status {r.returncode}"


@pytest.fixture
def small(tmp_path):
    "A small project with the suite's own conftest: two pages that need nothing, and a test file that cannot be imported."
    for o in ("browser", "conftest", "changed", "durations", "forks"): (tmp_path/"tests").mkdir(exist_ok=True), shutil.copy(ROOT/"tests"/f"{o}.py", tmp_path/"tests")
    (tmp_path/"nbs").mkdir(), shutil.copy(ROOT/"pytest.ini", tmp_path)
    for o in ("00_one", "01_two"): (tmp_path/"nbs"/f"{o}.ipynb").write_text('{"cells": []}', encoding="utf-8")
    (tmp_path/"tests"/"test_notebooks.py").write_text(
        "import pytest, time\nfrom pathlib import Path\nNOTEBOOKS = sorted(Path('nbs').glob('*.ipynb'))\n"
        "@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda o: o.name)\n"
        "def test_page_runs(path):\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n", encoding="utf-8")
    (tmp_path/"tests"/"test_heavy.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    for o in (["init", "-qb", "main"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "one"]):
        subprocess.run(["git", *o], cwd=tmp_path, check=True)
    return tmp_path


def test_one_page_imports_nothing_else(small):
    out = pytest_in(small, "-k", "01_two", "-n0")
    assert "1 passed" in out and "imported" not in out
    assert "imported" in pytest_in(small, "-n0")


def test_only_what_a_change_touches(small):
    assert "0 pages" in (out := pytest_in(small, "--changed", "-n0")) and "imported" not in out
    (small/"nbs"/"01_two.ipynb").write_text('{"cells": [ ]}', encoding="utf-8")
    out = pytest_in(small, "--changed", "-n0")
    assert "1 pages: 01_two" in out and "1 of them not in the table" in out and "1 passed" in out
    assert "git knows no commit 'moon'" in pytest_in(small, "--changed=moon", "-n0")


def test_forks_are_asked_when_one_has_ended(monkeypatch):
    "Most tests start none, and what forks took is wanted before and after each test."
    used = forks.cpu_seconds()
    forks.run("sum(range(10**6))")
    now = forks.cpu_seconds()
    assert now > used and forks.peak_kilobytes() > 0
    monkeypatch.setattr(forks, "ask", None)
    assert (forks.cpu_seconds(), forks.peak_kilobytes()) == (now, 0)


def test_durations_come_from_the_run(small):
    (small/"tests"/"test_heavy.py").unlink()
    out = pytest_in(small, "--save-durations", "-n2")
    pages = json.loads((small/"tests"/"durations.json").read_text(encoding="utf-8"))[durations.kind()]["pages"]
    assert "2 tests, on" in out and set(pages) == {"00_one", "01_two"} and all(0.3 <= cpu < 10 for cpu, _ in pages.values())


@pytest.mark.parametrize("alone, status", [(.05, 0), (1, 1)])
def test_a_page_over_its_budget_fails_when_it_is_so_alone_too(small, alone, status):
    tests, names = small/"tests", [f"{o:02}_page" for o in range(2, 12)]
    (tests/"test_heavy.py").unlink()
    for o in names: (small/"nbs"/f"{o}.ipynb").write_text('{"cells": []}', encoding="utf-8")
    rows = {durations.kind(): dict(pages={o: [.05, .05] for o in names})}
    (tests/"durations.json").write_text(json.dumps(rows), encoding="utf-8")
    for name, old, new in [("durations.py", "GRACE = 5", "GRACE = .5"), ("test_notebooks.py", "0.3", f"seconds(path)")]:
        (tests/name).write_text((tests/name).read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with (tests/"test_notebooks.py").open("a", encoding="utf-8") as f:
        f.write(f"def seconds(path):\n    import os\n    alone = 'PYTEST_XDIST_WORKER' not in os.environ\n"
                f"    return .05 if path.stem != '03_page' else {alone} if alone else 1\n")
    out = pytest_in(small, "-n2")
    assert "12 passed" in out and f"exit status {status}" in out and ("03_page took 1 CPU seconds" in out) == (status == 1)


# ---- the limit of the whole check ----

@pytest.mark.parametrize("command, limit, how, said", [("sleep 600", 2, "LATE", "exceeds its limit of 2 s: it was cut off in 'sleep 600'"),
                                                       ("false", 60, "FAILED", ""), ("true", 60, "ok", "")])
def test_the_check_has_a_limit(tmp_path, command, limit, how, said):
    (tmp_path/".ci").mkdir(), shutil.copy(ROOT/".ci"/"run", tmp_path/".ci")
    (tmp_path/"README.md").write_text(f"```sh\n{command}\necho 3 passed\n```\n", encoding="utf-8")
    r = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True,
                       env={**os.environ, "PYTHON": "true", "CI_LIMIT": str(limit)})
    assert r.returncode == 1   # this folder has no notebooks, which are to be clean
    first = next(o for o in r.stdout.splitlines() if o.endswith(f"s  {command}"))
    assert first.split()[0] == how and said in r.stderr and ("LATE" in r.stdout) == (how == "LATE")
