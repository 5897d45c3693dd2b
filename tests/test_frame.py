"What holds the house together: one address, one version, imports that go downwards, modules that stay small."
import ast, json, os, re, shlex, subprocess, sys

import nbformat, pytest, yaml
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import forks, qlora_nb
from common import (LESSONS, MODULES, NBS, NOTEBOOKS, PACKAGE, PAGES, ROOT, SETTINGS, code_cells, exported_module, install_cells,
                    module_name, read)
from qlora_nb import FRONT
from qlora_nb.base.cells import directives
from qlora_nb.base.diagrams import crowded, part_map, steps_of, texts_of

sys.path.insert(0, str(ROOT/"tools"))
from make_course import accelerate, course, map_pages, stale
from make_links import fix_links
from make_pictures import course_map
from make_readme import make_readme

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.name)
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda o: o.name)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda o: f"{o.parent.name}/{o.name}")
USER, REPO, BRANCH = (SETTINGS[o] for o in ("user", "repo", "branch"))


def text(name): return (ROOT/name).read_text(encoding="utf-8")


# ---- the address ----

@each_notebook
def test_links_agree_with_settings(path):
    raw = path.read_text(encoding="utf-8")
    assert raw == fix_links(raw, SETTINGS), "a link names another repository than settings.ini: run tools/make_links.py"
    others = set(re.findall(rf"github(?:usercontent)?\.com/(?:github/)?{re.escape(USER)}/([\w-]+)", raw)) - {REPO}
    assert not others, f"settings.ini knows no repository {others}"


@each_notebook
def test_colab_badge(path):
    url = f"https://colab.research.google.com/github/{USER}/{REPO}/blob/student/{path.relative_to(NBS).as_posix()}"
    title = next(c.source for c in read(path).cells if c.cell_type == "markdown")
    picture = os.path.relpath(NBS/"images"/"colab.svg", path.parent)   # no server is asked; words stand in its place where it is not found
    assert title.startswith("# ") and f"[![Open in Colab]({picture})]({url})" in title


@each_notebook
def test_install_cell(path):
    nb = read(path)
    mine, first = install_cells(nb), install_cells(read(PAGES[0]))
    if not (path in PAGES or mine): return  # the index needs none as long as it runs nothing of ours
    assert mine == first, f"the install cell differs from that of {PAGES[0].name}"
    assert code_cells(nb)[0].source == mine[0], "the install cell must come before all other code"
    head, *body = mine[0].splitlines()
    assert head == "#| eval: false" and 'if "google.colab" in sys.modules:' in body
    assert any(o.startswith('elif find_spec("qlora_nb") is None:') for o in body), "no help where the package is missing"
    assert all(o.startswith("    ") for o in body if "%pip" in o), "%pip runs outside Colab too"
    assert f'"git+{SETTINGS["git_url"]}@{BRANCH}"' in mine[0]


def test_links_can_be_moved_and_checked():
    raw = text("nbs/base/core.ipynb")
    fork = dict(user="someone", repo="their_copy", branch="dev", git_url="https://github.com/someone/their_copy")
    moved = fix_links(raw, fork)
    assert "/github/someone/their_copy/blob/student/base/core.ipynb" in moved and f"{USER}/{REPO}" not in moved
    assert "git+https://github.com/someone/their_copy@dev" in moved
    assert fix_links(moved, SETTINGS) == raw
    foreign = "https://github.com/huggingface/peft and https://colab.research.google.com/github/a/b/blob/c/d.ipynb"
    assert fix_links(foreign, SETTINGS) == foreign


def test_address_stands_in_settings_alone():
    names = "setup.py constraints.txt CITATION.cff CONTRIBUTING.md CHANGELOG.md .ci/run"
    files = [ROOT/o for o in names.split()]
    files += [*MODULES, *(ROOT/"tests").glob("*.*"), *(ROOT/"tools").glob("*.py"), *(ROOT/".github").rglob("*.yml")]
    holders = [o.name for o in files if f"{USER}/" in o.read_text(encoding="utf-8")]
    assert not holders, f"{holders} repeat the address"


def heading_anchors(nb):
    "What a link may name behind `#`: headings, with hyphens for spaces, as Jupyter, GitHub and Colab write them."
    heads = [m[1] for c in nb.cells if c.cell_type == "markdown" for m in re.finditer(r"^#+ (.+)$", c.source, re.M)]
    return {form for o in heads for form in (o.replace(" ", "-"), re.sub(r"[^\w\- ]", "", o.lower()).replace(" ", "-"))}


@each_notebook
def test_links_lead_somewhere(path):
    for c in read(path).cells:
        if c.cell_type != "markdown": continue
        for target, anchor in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(?:#([^)\s]*))?\)", c.source):
            there = (path.parent/target).resolve()
            assert there.exists(), f"{path.name} links to {target}"
            if anchor: assert anchor in heading_anchors(read(there)), f"{path.name} links to {target}#{anchor}"


# ---- the course ----

COURSE = course()


def test_course_holds_every_page_in_order():
    listed = [p["path"] for part in COURSE for p in part["page"]]
    assert sorted(listed) == [o.relative_to(NBS).as_posix() for o in PAGES]
    lessons = [o for o in listed if o[0].isdigit()]
    assert lessons == sorted(lessons), "course.toml is not in the order of the numbers"


def test_pages_say_what_the_course_says():
    assert not (found := stale()), f"run tools/make_course.py: {', '.join(o.stem for o in found)}"


@each_notebook
def test_colab_gives_a_gpu_to_pages_that_need_one(path):
    nb = read(path)
    needs = any("cuda" in directives(c.source) for c in code_cells(nb))
    said = {k: nb.metadata[k] for k in ("accelerator", "colab") if k in nb.metadata}
    assert said == (dict(accelerator="GPU", colab=dict(gpuType="T4")) if needs else {}), "run tools/make_course.py"


def test_a_page_is_given_a_gpu_and_loses_it():
    nb = dict(metadata=dict(kernelspec=1), cells=[dict(cell_type="code", source=["#| cuda\n", "1"])])
    accelerate(nb)
    assert nb["metadata"] == dict(accelerator="GPU", colab=dict(gpuType="T4"), kernelspec=1)
    nb["cells"][0]["source"] = ["# no cuda"]
    accelerate(nb)
    assert nb["metadata"] == dict(kernelspec=1)


def test_nothing_is_needed_before_it_was_taught():
    seen = {p["name"] for part in COURSE for p in part["page"] if not p["path"][0].isdigit()}   # may be read at any time
    for part in COURSE:
        for p in part["page"]:
            later = set(p["first"]) - seen if p["path"][0].isdigit() else ()
            assert not later, f"{p['name']} wants {later} to be known, which come later or are no pages"
            seen.add(p["name"])


# ---- figures ----

def captioned(cells):
    "{id of a cell that shows a picture: has it a caption?} A line in italics, below it or (an explorer's) among its outputs."
    found = {}
    for c, after in zip(cells, [*cells[1:], None]):
        shown = [o.get("data", {}) for o in c.get("outputs", ())]
        if not any(k.startswith("image/") or k == "text/html" and re.search("<svg|<img", v) for o in shown for k, v in o.items()): continue
        below = [o.get("text/markdown", "") for o in shown] + [after.source if after and after.cell_type == "markdown" else ""]
        found[c.id] = any(re.match(r"\*[^\s*][^\n]{9,}\*( |\n|$)", o) for o in below)
    return found


@each_notebook
def test_each_figure_has_a_caption(path):
    "Front ends drop alternative texts, and a reader who skims reads captions."
    bare = [k for k, has in captioned(read(path).cells).items() if not has]
    assert not bare, f"{path.name}: no caption, *a line in italics*, at the top of the cell below {bare}"


def test_a_figure_without_a_caption_is_found():
    figure = [nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})]
    def cells(*below): return [nbformat.v4.new_code_cell("1", outputs=figure), *map(nbformat.v4.new_markdown_cell, below)]
    said = [[*captioned(cells(*o)).values()] for o in (["*What it shows.* And more."], ["**Bold** words"], ["Prose"], [])]
    assert said == [[True], [False], [False], [False]]


STARTS = [p for p in COURSE if p["folder"][0].isdigit()]


@pytest.mark.parametrize("part", STARTS, ids=lambda o: o["folder"])
def test_the_map_of_a_part_shows_each_page(part):
    start, *lessons = part["page"]
    cell = next(c for c in read(NBS/start["path"]).cells if c.id == "course-map")
    pages = map_pages(part)
    assert [k.split()[0] for k in pages] == [p["name"].split("_")[0] for p in lessons]
    assert all(json.dumps(k, ensure_ascii=False) in cell.source for k in pages), "run tools/make_course.py"
    fig = part_map(pages)
    shown = [t.get_text().replace("\n", " ") for t in texts_of(fig)]
    assert crowded(fig) == [] and [o for o in shown if o in pages] == [*pages]
    assert cell.outputs[0].data["text/plain"] == fig.get_label() and all(k in fig.get_label() for k in pages)


def test_a_map_leads_to_what_each_page_needs():
    "From each page one comes back, along arrows, to all pages of its part that it says to know first."
    for part in STARTS:
        pages = map_pages(part)
        steps, names = steps_of(pages), [k.split()[0] for k in pages]
        below = {i: {j for j, k in steps if k == i} for i in range(len(pages))}
        for i in below: below[i] |= set().union(*(below[j] for j in below[i]))
        for i, v in enumerate(pages.values()): assert {names.index(o) for o in v.split() if o in names} <= below[i], (part["folder"], names[i])


def test_the_map_of_the_course_is_that_of_its_parts():
    fig, index = course_map(COURSE), "\n".join(c.source for c in read(NBS/"index.ipynb").cells)
    assert crowded(fig) == []
    assert f"![{fig.get_label()}](images/course_map.svg)" in index, "run tools/make_pictures.py, and write its new label into index.ipynb"
    drawn = set(re.findall(r"<!-- (.+?) -->", (NBS/"images"/"course_map.svg").read_text(encoding="utf-8")))
    assert {t.get_text() for t in texts_of(fig) if t.get_text()} <= drawn, "run tools/make_pictures.py"


# ---- versions and packages ----

def test_one_version():
    version, citation = SETTINGS["version"], yaml.safe_load(text("CITATION.cff"))
    assert re.search(r'^__version__ = "(.*)"$', text("qlora_nb/__init__.py"), re.M)[1] == version
    assert citation["version"] == version and citation["title"] == SETTINGS["lib_name"]
    assert re.search(rf"^## \[{re.escape(version)}\]", text("CHANGELOG.md"), re.M)


def test_constraints_pin_every_requirement():
    pins = {canonicalize_name(m[1]): m[2] for m in re.finditer(r"^([\w.-]+)==(\S+)$", text("constraints.txt"), re.M)}
    lines = [o for o in text("constraints.txt").splitlines() if o and not o.startswith("#")]
    assert len(pins) == len(lines), "a line of constraints.txt is no exact pin"
    for r in map(Requirement, shlex.split(SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"])):
        pin = pins[canonicalize_name(r.name)]
        assert r.specifier.contains(pin), f"{r.name} is pinned to {pin}, outside {r.specifier} in settings.ini"


def test_requirements_span_colab_and_today():
    wanted = {r.name: r.specifier for r in map(Requirement, shlex.split(SETTINGS["requirements"]))}
    for lib, versions in dict(trl="0.29.1 1.14.0 1.16.0", transformers="5.15.0 5.17.0 5.23.0", fastcore="1.14.5 2.2.12",
                              ipywidgets="7.7.1 8.1.9", peft="0.20.0 0.21.2").items():
        assert all(wanted[lib].contains(o) for o in versions.split()), lib
    assert not wanted["trl"].contains("1.15.0")   # see 22_training_loop: it trains nothing on a CPU beside a GPU


# ---- the README ----

def test_readme_is_generated():
    fresh = make_readme(ROOT/"nbs"/"index.ipynb")
    assert text("README.md") == fresh, "run tools/make_readme.py"


def test_readme_begins_with_the_two_commands():
    r = subprocess.run(["bash", ROOT/".ci"/"run", "--commands"], capture_output=True, text=True, check=True)
    assert r.stdout.splitlines() == ["pip install -e . -c constraints.txt && qlora_finetune",
                                     "pip install -e '.[dev]' -c constraints.txt && pytest"]


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)\s#]+)\)", text("README.md")):
        assert target.startswith(("http", "mailto:")) or (ROOT/target).exists(), f"README.md links to {target}"


# ---- the modules ----

def imports(source, part=""):
    "(module of ours, is it a star import?) for each import in `source`, which may hold IPython's magics and stand in `part`."
    if "import" not in source: return
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.Import):
            yield from ((m[1], False) for o in node.names if (m := re.match(r"qlora_nb\.([\w.]+)", o.name)))
        elif isinstance(node, ast.ImportFrom):
            above = ["", f"qlora_nb.{part}", "qlora_nb"][node.level]   # `from .x`, `from ..part.x`
            ours, _, module = ".".join(filter(None, (above, node.module))).partition(".")
            if ours != "qlora_nb": continue
            for o in node.names:
                name = module if "." in module else f"{module}.{o.name}" if module else FRONT.get(o.name, o.name)
                yield name, o.name == "*"


NAMES = {module_name(o): o for o in MODULES}
def part_of(name): return name.partition(".")[0]


def test_imports_are_found():
    found = imports("import qlora_nb.p.a, os\ndef f():\n    from qlora_nb.p.b import x\n%matplotlib inline\n"
                    "from .c import *\nfrom qlora_nb.p import d\nfrom ..q.e import y\nfrom qlora_nbx.f import g\n"
                    "from qlora_nb import finetune", "p")
    assert sorted(found) == [("p.a", False), ("p.b", False), ("p.c", True), ("p.d", False), ("q.e", False), ("training.finetune", False)]


@each_page
def test_imports_of_a_page_exist(path):
    for c in code_cells(read(path)):
        for module, star in imports(c.source):
            assert not star, f"a star import of {module}"
            assert module in NAMES, f"no page exports {module}"


def graph():
    "{module: modules that it imports}, functions included."
    return {name: {m for m, _ in imports(o.read_text(encoding="utf-8"), part_of(name))} for name, o in NAMES.items()}


def cycle(graph):
    "The nodes of `graph` that stand on a cycle, or lead from one to another."
    left = {a: set(b) & set(graph) - {a} for a, b in graph.items()}
    for ends in (lambda a: left[a], lambda a: {b for b in left if a in left[b]}):
        while free := {a for a in left if not ends(a)}: left = {a: b - free for a, b in left.items() if a not in free}
    return sorted(left)


def test_a_cycle_is_found(): assert cycle(dict(a="b", b="c", c="b", d="a", e="d")) == ["b", "c"] and not cycle(dict(a="b", b="c", c=""))


def test_no_cycle_between_modules_nor_between_parts():
    modules, parts = graph(), {}
    for a, needs in modules.items(): parts.setdefault(part_of(a), set()).update(part_of(b) for b in needs)
    assert not cycle(modules)
    assert not cycle(parts)
    assert parts["base"] <= {"base"}, "the base imports a lesson"
    for part, may in dict(apps={"apps", "classroom"}, classroom={"classroom"}).items():
        assert {a for a, b in parts.items() if part in b} <= may, f"only {sorted(may)} may import from {part}"


@each_module
def test_no_import_hidden_in_a_string(path):
    runs_answers = path.stem in ("exercises", "answers")   # to run what a student wrote is what they are for
    assert not re.search(r"import_module\(|__import__\(" + r"|exec\("*(not runs_answers), path.read_text(encoding="utf-8"))


def test_each_module_has_one_page():
    exported = [m for o in PAGES if (m := exported_module(read(o)))]
    assert sorted(exported) == sorted(NAMES)


@each_page
def test_page_and_module_have_one_name(path):
    if not (module := exported_module(read(path))): return
    part, page = (re.sub(r"^\d+_", "", o) for o in (path.parent.name, path.stem))
    assert module == f"{part}.{page}"


def test_numbers_of_lessons_are_places_in_the_course():
    numbers = [int(o.name[:2]) for o in LESSONS]
    assert numbers == sorted(set(numbers)), "a number twice, or out of the order of the parts"
    assert len({o.stem for o in NOTEBOOKS}) == len(NOTEBOOKS), "two pages of one name"


# ---- the front door ----

def test_the_front_door_opens():
    for name, module in FRONT.items(): assert getattr(qlora_nb, name) is getattr(sys.modules[f"qlora_nb.{module}"], name)
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'; it has finetune"): qlora_nb.fine_tune
    assert {"finetune", "__version__"} <= set(dir(qlora_nb))


def test_importing_the_package_loads_and_changes_nothing():
    code = ("import os, sys, time, warnings, logging; before = set(sys.modules), dict(os.environ), [*warnings.filters]\n"
            "start = time.process_time(); import qlora_nb; took = time.process_time() - start\n"
            "print(sorted(set(sys.modules) - before[0]), dict(os.environ) == before[1], warnings.filters == before[2], took < .2)")
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert r.stdout.split() == ["['qlora_nb']", "True", "True", "True"]


@each_notebook
def test_no_output_holds_the_notice_that_is_filtered(path):
    "`base.core` filters it, so a page that shows it has imported bitsandbytes (or PEFT) before anything of ours."
    said = [c.id for c in code_cells(read(path)) if "gemm_4bit_forward" in str(c.outputs)]
    assert not said, f"{path.name}: import qlora_nb.base.core before bitsandbytes, PEFT and TRL: {said}"


# ---- what base.core sets has to be set before PyTorch is loaded ----

LOADS = re.compile(r"(torch|transformers|peft|trl|bitsandbytes|accelerate|triton|liger_kernel)\b|safetensors\.torch")


def in_order(sources):
    "Modules in the order in which cells import them, within functions left out. `TrlParser` alone loads no PyTorch."
    for s in sources:
        for o in ast.parse(TransformerManager().transform_cell(s)).body if "import" in s else ():
            if isinstance(o, ast.Import): yield from (a.name for a in o.names)
            elif isinstance(o, ast.ImportFrom) and [a.name for a in o.names] != ["TrlParser"]: yield o.module or ""


def first_of(names, ready): return next((o for o in names if o in ready or LOADS.match(o)), None)


def test_the_first_import_is_found():
    cells = "import os\ndef f(): import torch\nfrom trl import TrlParser", "import torchvision, qlora_nb.b\nfrom torch import nn"
    assert first_of(in_order(cells), {"qlora_nb.b"}) == "qlora_nb.b" and first_of(in_order(cells), ()) == "torch"


def test_base_core_comes_before_pytorch():
    "In each page and each module: it is imported, or a module that begins with it, before what loads PyTorch."
    cells = {o: [c for c in code_cells(read(o)) if "eval" not in directives(c.source)] for o in PAGES}
    modules = {f"qlora_nb.{exported_module(read(o))}": [*in_order(c.source for c in v if {"export", "exports"} & {*directives(c.source)})]
               for o, v in cells.items()}
    ready, more = {"qlora_nb.base.core"}, True
    while more: ready |= (more := {k for k, v in modules.items() if first_of(v, ready) in ready} - ready)
    early = {o.stem: first for o, v in cells.items() if o.stem != "core" and (first := first_of(in_order(c.source for c in v), ready)) not in {None, *ready}}
    early |= {k: first for k, v in modules.items() if not k.endswith(".core") and (first := first_of(v, ready)) not in {None, *ready}}
    assert not early, f"import qlora_nb.base.core first: {early}"


TABLES = "class Settings",   # a list of settings, a line each

@each_notebook
def test_code_cells_are_short(path):
    "A line fits on the page, and a cell on the screen."
    for c in nbformat.read(path, as_version=4).cells:
        if c.cell_type != "code": continue
        lines = [o for o in c.source.splitlines() if not o.startswith("#|")]
        assert not (long := [o for o in lines if len(o) > 100]), f"{path.name}, cell {c.id}, over 100 columns: {long[0]}"
        n = sum(bool(o.strip()) for o in lines)
        assert n <= 30 or any(o in c.source for o in TABLES), f"{path.name}, cell {c.id}: {n} lines"


@each_notebook
def test_a_page_has_sixty_code_cells_at_the_most(path):
    "Those of its exercises are counted too."
    n = len(code_cells(read(path)))
    assert n <= 60, f"{path.name} has {n} code cells, so it holds two ideas: make two pages, or let what is no lesson be a test"


@each_module
def test_module_is_small_and_safe(path):
    source = path.read_text(encoding="utf-8")
    lines = sum(bool(o.strip()) and not o.startswith("# %% ") for o in source.splitlines())   # nbdev's marks apart
    assert lines <= 200, f"{path.name} has {lines} lines, so it holds two ideas: make two notebooks"
    assert not [m for m, star in imports(source, path.parent.name) if star]
    for bad in (r"trust_remote_code\s*=\s*True", r"\btorch\.load\(", r"\bpickle\b", r"\b(import|from) nbdev\b"):
        found = re.search(bad, source)
        assert not found, f"{path.name} holds {found[0]}"


@each_module
def test_warnings_name_the_line_of_the_reader(path):
    "What `warnings.warn` finds by counting calls is often a line of ours, which says nothing to who reads it: `base.notes.warn` looks for theirs."
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call) and ast.unparse(n.func) == "warnings.warn"]
    assert not calls or path.name == "notes.py", [ast.unparse(n) for n in calls]


ALONE = """
import os, sys, bitsandbytes, datasets, gguf, peft, torch, transformers, trl
def no_cuda(*a): raise RuntimeError("an import starts CUDA")
torch.cuda._lazy_init = no_cuda
for name in sys.argv[1:]:
    if (pid := os.fork()) == 0:
        try: __import__(name)
        except BaseException as e:
            sys.stderr.write(f"{name}: {type(e).__name__}: {e}\\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
"""  # the libraries are loaded once; each of our modules then meets a process that has none of the others


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_each_module_imports_alone(tmp_path):
    names = [f"{PACKAGE.name}.{module_name(o)}" for o in MODULES]
    r = forks.run(ALONE, *names, cwd=tmp_path)
    failed = [line for line in r.stderr.splitlines() if line.startswith(tuple(f"{o}: " for o in names))]
    assert r.returncode == 0 and not failed, r.stderr


def test_phases_of_the_main_job_exist():
    "The script that times the main job wraps functions by name."
    import importlib, sys
    sys.path.insert(0, str(ROOT/"nbs"/"experiments"))
    for module, name in importlib.import_module("main_job").PHASES:
        assert callable(getattr(importlib.import_module(module), name)), (module, name)
