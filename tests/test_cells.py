"Cells that need more than every reader has: guarded in a real kernel, stored, and of no use to those that need less."
import ast, shutil, socket, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import nbformat, pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from common import NOTEBOOKS, ROOT, SETTINGS, code_cells, read
from forks import Kernels
from run_notebook import run
from qlora_nb.base.cells import NEEDS, NOT_RUN, cell_key, directives, stored_outputs

sys.path.insert(0, str(ROOT/"tools"))
from store_outputs import STORE, collect, flags_of, make_store, storable

FLAGGED = [o for o in NOTEBOOKS if any(flags_of(c.source) for c in code_cells(read(o)))]
each_flagged = pytest.mark.parametrize("path", FLAGGED, ids=lambda o: o.name)
GUARD = "from qlora_nb.base.cells import guard_cells\nguard_cells()"
MARK = "ran.append(1)"
FRESH = AsyncKernelManager  # not forked: huggingface_hub reads the environment when it is imported


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch): monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a machine with one passes these tests, too


def write(folder, *sources, outputs=()):
    "A notebook of code cells in `folder`; `outputs` are those of its last cell."
    path = folder/"planted.ipynb"
    cells = [new_code_cell(o) for o in sources]
    cells[-1].outputs = list(outputs)
    nbformat.write(new_notebook(cells=cells), path)
    return path


def run_all(path, kernels=Kernels):
    "The cells of `path` after a reader's Run All; none may have failed."
    cells = code_cells(run(path, everything=True, kernel_manager_class=kernels))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    return cells


def said(cell): return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


# ---- in a kernel ----

MAKE = "open('planted_package.py', 'w').close()\nimport importlib; importlib.invalidate_caches()"
ASK = "(%env QLORA_NB_RUN=slow at the top of the page runs it)"
HAVE_GPU = "import torch; torch.cuda.is_available = lambda: True"


@pytest.mark.parametrize("flags, cure, needs", [
    ("#| cuda", HAVE_GPU, "a CUDA GPU (on Colab: Runtime > Change runtime type)"),
    ("#| extra: json planted_package", MAKE, "planted_package (pip install planted_package)"),
    ("#| slow: about an hour", "%env QLORA_NB_RUN=slow", f"about an hour {ASK}"),
    ("#| slow", "%env QLORA_NB_RUN=slow", f"minutes {ASK}"),
    ("#| hub", "import os; os.environ['QLORA_NB_RUN'] = 'cuda hub'", "the Hugging Face Hub (HF_HUB_OFFLINE is set)")],
    ids="cuda extra slow-known slow hub".split())
def test_unmet_then_met(tmp_path, flags, cure, needs):
    cell = f"{flags}\n{MARK}"
    cells = run_all(write(tmp_path, "ran = []", GUARD, cell, "assert ran == []", cure, cell, "assert ran == [1]"), FRESH if "hub" in flags else Kernels)
    assert said(cells[2]) == f"{NOT_RUN} {needs}.\n" and said(cells[5]) == ""


def test_all_flags_of_a_cell_count(tmp_path):
    cell = f"#| extra: planted_package\n#| slow: an hour\n%time {MARK}"
    cells = run_all(write(tmp_path, "ran = []", GUARD, cell, MAKE, cell, "assert ran == []", "%env QLORA_NB_RUN=slow",
                          cell, "assert ran == [1]"))
    assert "planted_package (" in said(cells[2]) and " and " in said(cells[2])
    assert said(cells[4]).startswith(f"{NOT_RUN} an hour (") and " and " not in said(cells[4])


class Hub(BaseHTTPRequestHandler):
    "Answers with the status of the server, and counts."
    def do_HEAD(self):
        self.server.asked += 1
        self.send_response(self.server.status)
        self.end_headers()
    def log_message(self, *args): pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.status = 0, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(), server.server_close()


def online(port): return f"%env HF_HUB_OFFLINE=0\n%env HF_ENDPOINT=http://127.0.0.1:{port}\n%env NO_PROXY=127.0.0.1"


@pytest.mark.parametrize("status, ran", [(200, [1, 1]), (503, [])])
def test_hub_is_asked_once(tmp_path, hub, status, ran):
    hub.status = status
    cell = f"#| hub\n{MARK}"
    cells = run_all(write(tmp_path, "ran = []", online(hub.server_port), GUARD, cell, cell, f"assert ran == {ran}"), FRESH)
    assert hub.asked == 1
    line = "" if ran else f"{NOT_RUN} the Hugging Face Hub (it does not answer).\n"
    assert said(cells[3]) == said(cells[4]) == line


def test_silent_hub_costs_three_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:   # takes connections and says nothing
        cell, imports = f"#| hub\n{MARK}", "from huggingface_hub import get_session; get_session()\nimport time"
        path = write(tmp_path, "ran = []", online(silent.getsockname()[1]), GUARD, imports, "start = time.monotonic()",
                     cell, cell, "seconds = time.monotonic() - start\nassert ran == [] and 2.5 < seconds < 10, seconds")
        run_all(path, FRESH)


def test_runner_forces_what_it_is_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path, GUARD, "#| cuda\n1/0")
    with pytest.raises(CellExecutionError, match="division by zero"): run(path, flags={"cuda"}, kernel_manager_class=Kernels)
    with pytest.raises(CellExecutionError, match="division by zero"): run(path, flags={"cuda"}, everything=True, kernel_manager_class=Kernels)
    monkeypatch.setenv("QLORA_NB_RUN", "cuda")
    run_all(path)   # what the runner was not asked for is not forced from outside


def test_without_the_guard_it_stops(tmp_path):
    with pytest.raises(CellExecutionError, match="ModuleNotFoundError"):
        run_all(write(tmp_path, "#| extra: planted_package\nimport planted_package"))


def shown(cell):
    "(kind, content, metadata) of what a cell shows, without its first line when that is the guard's."
    outs = [("stream", (o.name, o.text), None) if o.output_type == "stream" else ("data", o.data, o.metadata)
            for o in cell.outputs]
    if outs and outs[0][0] == "stream" and outs[0][1][1].startswith(NOT_RUN):
        first, _, rest = outs[0][1][1].partition("\n")
        outs[:1] = [("stream", ("stdout", rest), None)] if rest else []
    return outs


def test_stored_output_is_shown_again(tmp_path):
    "Every flagged cell with an output, in one kernel where nothing is there."
    real = [c for o in FLAGGED for c in code_cells(read(o)) if flags_of(c.source) and c.outputs]
    nothing = "import qlora_nb.base.cells as c\nc.missing = lambda s: 'the moon' if c.directives(s) else ''"
    cells = run_all(write(tmp_path, GUARD, nothing, *(c.source for c in real)))[2:]
    assert len(real) > 10 and len(cells) == len(real)
    for a, b in zip(real, cells):
        a.outputs = [nbformat.from_dict(o) for o in map(storable, a.outputs) if o]
        assert said(b).startswith(f"{NOT_RUN} the moon. Its stored output:\n") and shown(b) == shown(a), a.source


def test_pictures_keep_their_alternative_text(tmp_path):
    data, alt = {"image/png": "iVBORw0KGgo=", "text/plain": "a curve"}, {"image/png": {"alt": "a curve that falls"}}
    stored = [dict(output_type="stream", name="stdout", text="two\nlines\n"),
              dict(output_type="display_data", data=data, metadata=alt)]
    plant = f"import qlora_nb.base.cells as c\nc.stored_outputs = lambda _: {stored}"
    cells = run_all(write(tmp_path, GUARD, plant, "#| slow\n1/0"))
    assert shown(cells[-1]) == [("stream", ("stdout", "two\nlines\n"), None), ("data", data, alt)]


def test_a_real_page_ends_without_a_gpu():
    cells = run_all(ROOT/"nbs"/"2_training"/"21_optimizers.ipynb")
    lines = [said(c) for c in cells if "cuda" in directives(c.source)]
    assert len(cells) == len(code_cells(read(ROOT/"nbs"/"2_training"/"21_optimizers.ipynb")))
    assert lines and all(o.startswith(f"{NOT_RUN} a CUDA GPU") for o in lines)


# ---- what is stored ----

def test_import_is_light():
    code = "import sys, qlora_nb.base.cells; print(*{'torch', 'numpy', 'huggingface_hub', 'IPython'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_store_is_installed(tmp_path):
    cmd = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path/"lib"]
    left_out = shutil.ignore_patterns(".*", "benchmarks", "nbs", "results", "*.egg-info")
    shutil.copytree(ROOT, tmp_path/"copy", ignore=left_out)
    subprocess.run(cmd, cwd=tmp_path/"copy", capture_output=True, text=True, check=True)
    assert (tmp_path/"lib"/"qlora_nb"/STORE.name).read_bytes() == STORE.read_bytes()


def test_store_is_up_to_date():
    assert STORE.read_text(encoding="utf-8") == make_store(), "run tools/store_outputs.py"


@each_flagged
def test_each_flagged_output_is_stored(path):
    for c in code_cells(read(path)):
        if not flags_of(c.source) or not c.outputs: continue
        assert stored_outputs(c.source) == [o for o in map(storable, c.outputs) if o], c.source


@each_flagged
def test_no_page_holds_the_guards_line(path):
    held = [c.source for c in code_cells(read(path)) if NOT_RUN in said(c)]
    assert not held, f"saved after a run without what it needs: {held[0]}"


def test_what_is_left_out_of_the_store(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"}
    table = {"text/html": "<p>", "text/plain": "p"}
    outs = [new_output("display_data", o) for o in (widget, widget | table, table)]
    outs += [new_output("stream", name="stderr", text="99 %"), new_output("execute_result", table, execution_count=3)]
    path = write(tmp_path, "1\n", "#| slow\nx", outputs=outs)
    kept, = collect([path]).values()
    assert [o["data"] for o in kept] == [table]*3 and not any("execution_count" in o for o in kept)


def test_two_outputs_of_one_source_are_refused(tmp_path):
    for name, text in ("a", "1"), ("b", "2"):
        (tmp_path/name).mkdir()
        write(tmp_path/name, "#| slow\nx", outputs=[new_output("stream", text=text)])
    with pytest.raises(ValueError, match="same source"): collect(tmp_path.rglob("*.ipynb"))


def test_key_is_that_of_what_a_kernel_gets(tmp_path):
    source = "#| slow\n\nif 1:\n    x = 'ü'   \n"
    probe = "keys = []\nimport qlora_nb.base.cells as c\nc.stored_outputs = lambda s: keys.append(c.cell_key(s)) or []"
    run_all(write(tmp_path, GUARD, probe, source, f"assert keys == [{cell_key(source)!r}], keys"))


# ---- the pages ----

def test_every_flag_has_its_need(): assert set(NEEDS) == set(SETTINGS["tst_flags"].split())


@each_flagged
def test_guard_comes_first(path):
    cells = [c.source for c in code_cells(read(path))]
    first = next(i for i, o in enumerate(cells) if flags_of(o))
    assert any("guard_cells()" in o.splitlines() for o in cells[:first]), "guard_cells() in the set-up cell, please"
    assert all(o.get("extra", "named") for o in map(directives, cells)), "`#| extra: NAMES` says which packages"


def imported(source):
    "Packages that a cell imports, without Python's own."
    if "import" not in source: return set()
    tree = ast.parse(TransformerManager().transform_cell(source)).body   # a function may import what it can do without
    names = [o.name for n in tree if isinstance(n, ast.Import) for o in n.names]
    names += [n.module for n in tree if isinstance(n, ast.ImportFrom)]
    return {o.split(".")[0] for o in names} - sys.stdlib_module_names


def test_packages_are_named():
    "A package that no unflagged cell imports, and that is not known to be there, is named by `#| extra`."
    sources = [c.source for o in NOTEBOOKS for c in code_cells(read(o)) if "eval" not in directives(c.source)]
    known = set().union(*(imported(o) for o in sources if not flags_of(o)))
    extras = set()
    for o in filter(flags_of, sources):
        named = set(flags_of(o).get("extra", "").split())
        assert imported(o) - known <= named, f"`#| extra` does not name {imported(o) - known - named}:\n{o}"
        extras |= named
    assert len(extras) > 1


class Names(ast.NodeVisitor):
    "Names that code binds, those that it takes from before, and what each function will take when it is called."
    def __init__(self): self.bound, self.used, self.later = set(), set(), {}
    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store): self.bound.add(node.id)
        elif node.id not in self.bound: self.used.add(node.id)
    def several(self, *nodes):
        for o in nodes:
            for n in o if isinstance(o, list) else [o]:
                if n is not None: self.visit(n)
    def visit_Assign(self, node): self.several(node.value, node.targets)
    def visit_AnnAssign(self, node): self.several(node.value, node.target)
    def visit_NamedExpr(self, node): self.several(node.value, node.target)
    def visit_For(self, node): self.several(node.iter, node.target, node.body, node.orelse)
    def visit_AugAssign(self, node):
        if isinstance(node.target, ast.Name) and node.target.id not in self.bound: self.used.add(node.target.id)
        self.several(node.value, node.target)
    def visit_Import(self, node): self.bound.update((o.asname or o.name).split(".")[0] for o in node.names)
    visit_ImportFrom = visit_Import
    def inner(self, nodes, args=()):
        "What code with a scope of its own takes from outside."
        o = Names()
        o.several(nodes)
        return set().union(o.used, *o.later.values()) - o.bound - {a.arg for a in args}
    def visit_comp(self, node):
        o = Names()
        for g in node.generators: o.several(g.iter, g.target, g.ifs)
        o.several(*([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]))
        self.used |= o.used - self.bound
        self.bound |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comp
    def visit_Lambda(self, node):
        self.several(node.args.defaults)
        self.used |= self.inner([node.body], arguments(node)) - self.bound
    def visit_FunctionDef(self, node):
        self.several(node.decorator_list, node.args.defaults, node.args.kw_defaults)
        self.bound.add(node.name)
        self.later[node.name] = self.inner(node.body, arguments(node))
    def visit_ClassDef(self, node):
        self.several(node.decorator_list, node.bases)
        self.bound.add(node.name)
        self.later[node.name] = self.inner(node.body)


def arguments(node):
    a = node.args
    return [o for o in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if o]


def needs_of(source):
    "What a cell needs, each package by its name: a cell may use another that needs no more than itself."
    return {f"{k} {o}".strip() for k, v in flags_of(source).items() for o in (v.split() if k == "extra" else [""])}


def borrowed(sources):
    "(cell, name) where a cell uses a name whose value, in a run of all cells, comes from one that needs more."
    binder, later, found = {}, {}, []
    for source in sources:
        needs, names = needs_of(source), Names()
        names.visit(ast.parse(TransformerManager().transform_cell(source)))
        todo, seen = set(names.used), set()
        while todo:   # a function that is used takes what it takes now
            seen.add(name := todo.pop())
            if binder.get(name, set()) - needs: found.append((source, name))
            todo |= later.get(name, set()) - seen - names.bound
        binder |= dict.fromkeys(names.bound, needs)
        later = {k: v for k, v in later.items() if k not in names.bound} | names.later
    return found


@each_flagged
def test_no_cell_uses_one_that_needs_more(path):
    cells = [c.source for c in code_cells(read(path)) if "eval" not in directives(c.source)]
    found = borrowed(cells)
    assert not found, "\n\n".join(f"`{name}` is from a cell that needs more:\n{source}" for source, name in found)


@pytest.mark.parametrize("cells, names", [
    (["#| cuda\nx = 1", "x"], ["x"]), (["#| cuda\nx = 1", "#| cuda\nx"], []), (["#| cuda\nx = 1", "x = 2", "x"], []),
    (["x = 1", "#| cuda\nx = 2", "x = x + 1"], ["x"]), (["#| cuda\nx = 1", "x += 1"], ["x"]),
    (["#| cuda\nfor x in y: x", "for x in y: x", "[x for x in y]", "lambda x: x", "def f(x): return x\nf(1)"], []),
    (["#| cuda\nimport x.y", "x"], ["x"]), (["#| cuda\ndef x(): 1", "#| slow\nx()"], ["x"]),
    (["#| extra: a b\nx = 1", "#| extra: a\nx"], ["x"]), (["#| extra: a\nx = 1", "#| slow\n#| extra: a b\nx"], []),
    (["x = 1\ndef f(): return x", "#| cuda\nx = 2", "f()"], ["x"]), (["def f(): return x", "#| cuda\nx = 1\nf()"], []),
    (["#| cuda\nx = 1", "[a := 1 for _ in y]\nprint(a, x.y)"], ["x"])], ids=str)
def test_borrowed_names_are_found(cells, names): assert [n for _, n in borrowed(cells)] == names
