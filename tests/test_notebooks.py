"Each notebook runs top to bottom in a fresh kernel, and what is committed of it is fit to be read."
import re
from time import monotonic

import nbformat, pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from common import NOTEBOOKS, code_cells, read
from forks import Kernels
from run_notebook import WIDGET, run, skipped

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
HEAD, TAIL = 8, 20  # lines of a traceback to show: where it left the notebook, and what went wrong in the end
MACHINE_PATH = re.compile(r"/root/|/home/\w|/tmp/|/Users/\w|C:\\+Users|(?:site|dist)-packages/")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.name)


def explain(path, err):
    "The failing cell's source, then its traceback without colours and, where it is long, without its middle."
    text = ANSI.sub("", str(err)).rstrip()
    if not isinstance(err, CellExecutionError): return f"{path}: {type(err).__name__}: {text}"
    _, source, trace = re.split(r"^-{18}$", text, maxsplit=2, flags=re.M)
    lines = trace.strip().splitlines()
    if len(lines) > HEAD + TAIL: lines = [*lines[:HEAD], "[...]", *lines[-TAIL:]]
    return "\n".join([f"{path}: this cell failed:", "", source.strip("\n"), "", *lines])


def attempt(path):
    "(executed notebook, None), or (None, what went wrong)."
    try: nb = run(path, kernel_manager_class=Kernels)
    except Exception as e: return None, explain(path, e)
    # An exception in a widget callback is printed in red below the cell, and the kernel goes on as if nothing happened.
    for c in code_cells(nb):
        for o in c.outputs:
            if o.output_type != "error": continue
            return None, f"{path}: {o.ename}: {o.evalue}\nshown below this cell:\n\n{c.source}"
    return nb, None


def run_or_fail(path):
    "Run a notebook; when it fails, fail with what its reader needs to see and nothing else."
    nb, problem = attempt(path)
    if problem: pytest.fail(problem, pytrace=False)
    return nb


@each_notebook
def test_page_runs(path): run_or_fail(path)


# ---- the runner itself: it must be able to fail ----

def write(folder, *sources):
    "A notebook of code cells in `folder`."
    path = folder/"planted.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Planted"), *map(new_code_cell, sources)]), path)
    return path


def message(path):
    "How `run_or_fail` reports the failure of `path`."
    with pytest.raises(pytest.fail.Exception) as e: run_or_fail(path)
    return str(e.value)


def test_failing_cell_is_reported(tmp_path):
    msg = message(write(tmp_path, "good = 1", "bad = 40 + 2\nassert bad == 43, 'not the answer'", "never = 1"))
    assert "planted.ipynb" in msg and "bad = 40 + 2\nassert bad == 43" in msg
    assert "AssertionError: not the answer" in msg
    assert "\x1b" not in msg and "nbclient" not in msg and "never" not in msg


def test_deep_traceback_is_cut(tmp_path):
    msg = message(write(tmp_path, "def f(n):\n    return f(n-1) if n else 1/0\nf(40)"))
    assert "return f(n-1)" in msg and msg.endswith("ZeroDivisionError: division by zero")
    assert "Cell In[1], line 3" in msg and len(msg.splitlines()) < HEAD + TAIL + 10


def test_dead_kernel_is_reported(tmp_path):
    assert "DeadKernelError" in message(write(tmp_path, "import os; os._exit(1)"))


def test_state_does_not_leak(tmp_path):
    run_or_fail(write(tmp_path, "leak = 1"))
    assert "NameError: name 'leak' is not defined" in message(write(tmp_path, "leak"))


@pytest.mark.parametrize("capture", ["@out.capture()", ""], ids=["in an Output", "below the cell"])
def test_widget_callback_error_is_reported(tmp_path, capture):
    code = f"out, button = widgets.Output(), widgets.Button()\n{capture}\ndef click(_): raise KeyError('planted')\n"
    path = write(tmp_path, "import ipywidgets as widgets", code + "button.on_click(click)\nbutton.click()\nout")
    assert "KeyError: 'planted'" in message(path)


def test_output_widgets_do_not_stall_the_run(tmp_path):
    many = ["with out:\n    for i in range(5): print(i)"]*150
    start, limit = monotonic(), 120   # one stalled cell takes this long; all of them take a few seconds on a quiet machine
    run(write(tmp_path, "import ipywidgets as widgets\nout = widgets.Output()", *many), timeout=limit, kernel_manager_class=Kernels)
    assert monotonic() - start < limit, "a reply lay unread until the time limit of its cell (see run_notebook.Client)"


def test_flagged_cells_are_skipped(tmp_path):
    path = write(tmp_path, "ran = []", "#| eval: false\n1/0", "#| cuda\n1/0", "#| hub\n1/0", "#| slow\n#| hub\n1/0",
                 "#| hide\n#| eval: true\nran.append(1)", "assert ran == [1]")
    assert len(run_or_fail(path).cells) == 4
    with pytest.raises(CellExecutionError, match="division by zero"): run(path, flags={"slow", "hub"}, kernel_manager_class=Kernels)
    run(path, flags={"slow"}, kernel_manager_class=Kernels)   # that cell needs both


def test_paths_are_hidden(tmp_path):
    path = write(tmp_path, "import warnings, tempfile, numpy\nwarnings.warn_explicit('odd', UserWarning, numpy.__file__, 3)\n"
                           "print(f'kept in {tempfile.gettempdir()}/run')")
    run(path, save=True, kernel_manager_class=Kernels)
    text = "".join(o.text for o in read(path).cells[1].outputs)
    assert "numpy/__init__.py:3: UserWarning: odd" in text and "kept in run" in text
    assert not MACHINE_PATH.search(text)


# ---- what is committed ----

@each_notebook
def test_committed_outputs(path):
    nb = read(path)
    cells = code_cells(nb)
    outputs = [o for c in cells for o in c.outputs]
    if any(not skipped(c) for c in cells): assert outputs, f"{path.name} is committed without outputs"
    assert not [o for o in outputs if o.output_type == "error"], "an error is committed as an output"
    for o in outputs:
        data = o.get("data", {})
        assert WIDGET not in data and not re.match(r"[VH]?Box\(|\w+\(description=", data.get("text/plain", "")), (
            f"{path.name} holds a widget, which shows nothing without its kernel")
        for kind in data:
            if kind.startswith("image/"):
                alt = o.metadata.get(kind, {}).get("alt", "").strip()
                assert alt, f"{path.name}: a figure has no alternative text"
        for tag in re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", ""))):
            assert re.search(r"""\balt=["'][^"']""", tag), f"{path.name}: {tag[:80]} has no alternative text"


@each_notebook
def test_no_machine_paths(path):
    found = {m[0] for m in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))}
    assert not found, f"{path.name} holds paths of somebody's machine: {found}"
