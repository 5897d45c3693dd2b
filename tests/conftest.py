"""How the suite runs: as many workers as cores and memory allow, each on its share of the cores, long tests first.

    pytest --changed         # only what differs from main touches: pages and test files whose module or imports changed
    pytest --changed=HEAD~1  # ... what differs from that commit touches
    pytest --save-durations  # write what pages and tests took to tests/durations.json: order and budgets of later runs
A run of many pages fails when one takes half as much again as its budget, at the pace of the others, and again when run alone.
"""
import compileall, gc, importlib.metadata, json, os, re, subprocess, sys, tempfile
from functools import cache
from pathlib import Path

# For addresses in a schema, which nbformat's has none of, jsonschema would compile 38 grammars at import, in seconds.
sys.modules.setdefault("rfc3987_syntax", None)

import jinja2, psutil, pytest

import browser, changed, durations, forks

GIB = 2**30
PER_WORKER = 4*GIB  # a page that loads SmolLM2-135M several times peaks below this, together with its worker
LEFT = 20_000  # objects that Python may look through again and again: some milliseconds
NOTEBOOK_TESTS = re.compile(r"\b(?:NOTEBOOKS|PAGES)\b")  # a test file that makes a test of each page


def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory(limit=Path("/sys/fs/cgroup/memory.max")):
    "Bytes that this process may still take: what the machine has free, or less in a container with a limit."
    free = psutil.virtual_memory().available
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(free, int(text)) if text.isdigit() else free


def pytest_xdist_auto_num_workers(config): return max(1, min(cores(), free_memory()//PER_WORKER))


# Set before any test file imports torch; the kernels inherit it. Two workers must not fight over the same cores, and only a
# worker knows how many there are: a value set in the process that starts them would be what they inherit.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if _workers > 1: os.environ.update({o: str(max(1, cores()//_workers)) for o in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits leaves its core to the others at once
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")


# ---- which tests, and in which order ----

def pytest_addoption(parser):
    group = parser.getgroup("qlora_nb")
    group.addoption("--changed", nargs="?", const="", metavar="REF",
                    help="run only what the changes since REF (main) touch")
    group.addoption("--save-durations", action="store_true", help="write tests/durations.json")
    group.addoption("--took", metavar="FILE", help="write {test: [CPU seconds, seconds]} as JSON")


def is_controller(config): return not hasattr(config, "workerinput")


def pytest_configure(config):
    if is_controller(config):
        config.pluginmanager.register(Durations(config))
        compileall.compile_dir(changed.ROOT/"qlora_nb", quiet=2)   # or each kernel would, where Python may not write what it compiles
    config.touched, ref = None, config.option.changed
    if ref is None: return
    try: config.base, config.differ = changed.changed_files(ref)
    except ValueError as e: raise pytest.UsageError(str(e)) from None
    config.touched = changed.touched(config.differ, changed.sources())


def pytest_report_header(config):
    if config.touched is None or not is_controller(config): return None
    pages = [Path(o).stem for o in sorted(config.touched) if o.endswith(".ipynb")]
    files = [o for o in sorted(config.touched) if re.match(r"tests/test_\w+\.py", o)]
    rows = durations.rows_for(durations.load())
    took = [rows.get(k, {}).get(o) for k, names in (("pages", pages), ("files", files)) for o in names]
    seconds = sum(o[1] for o in took if o)/max(1, pytest_xdist_auto_num_workers(config))
    unknown = f", {took.count(None)} of them not in the table" if None in took else ""
    return [f"changed since {config.base}: {len(config.differ)} files; to run, in about {seconds:.0f} s{unknown}:",
            f"  {len(pages)} pages: {' '.join(pages)}", f"  {len(files)} test files: {' '.join(files)}"]


def spoken_of(path, words):
    "May a test of `path` match one of these words of `-k`? A file that says none of them is not imported to find out."
    text = f"{path.name} {path.read_text(encoding='utf-8')}"
    return NOTEBOOK_TESTS.search(text) is not None or any(o in text.lower() for o in words)


@cache
def page_words(expression):
    "The words of a `-k` expression when each is a part of a page's name and none is denied; else nothing."
    words = re.findall(r"[\w.]+", expression.lower())
    if not words: return []
    pages = [o.name for o in (changed.ROOT/"nbs").rglob("*.ipynb") if o.parent.name != "zh"]
    if {"not"} & set(words): return []
    words = [o for o in words if o not in ("and", "or")]
    return words if all(any(w in p for p in pages) for w in words) else []


def pytest_ignore_collect(collection_path, config):
    "Leave out, without importing it, a test file that has nothing to run: PyTorch and its company take their time."
    if not (collection_path.is_file() and collection_path.name.startswith("test_")): return None
    if config.touched is not None:
        makes_pages = NOTEBOOK_TESTS.search(collection_path.read_text(encoding="utf-8"))
        return True if f"tests/{collection_path.name}" not in config.touched and not makes_pages else None
    words = page_words(config.option.keyword)
    return True if words and not spoken_of(collection_path, words) else None


def wanted(item, touched):
    "Is this test of a touched file, or of a touched page?"
    path = getattr(item, "callspec", None) and item.callspec.params.get("path")
    if path is not None and Path(path).suffix == ".ipynb": return Path(path).resolve().relative_to(changed.ROOT).as_posix() in touched
    return f"tests/{item.path.name}" in touched


def pytest_collection_modifyitems(config, items):
    if config.touched is not None:
        out = [o for o in items if not wanted(o, config.touched)]
        config.hook.pytest_deselected(items=out)
        items[:] = [o for o in items if o not in set(out)]
    # Files take turns, so that a fixture of a module would be made anew for many of its tests: what takes time is one of the session.
    rows = durations.rows_for(durations.load())
    items.sort(key=lambda o: durations.position(o.nodeid, rows))


# ---- what every test would pay again ----

def pytest_collection_finish(session):
    """The libraries' million objects are left out of each `gc.collect()` that a training run ends with.
    And this process takes as many threads as the processes that tests start, also where a plugin has loaded PyTorch before it was told:
    in float32, another number of threads adds up in another order."""
    gc.collect(), gc.freeze()
    if "torch" in sys.modules and (n := os.environ.get("OMP_NUM_THREADS")): sys.modules["torch"].set_num_threads(int(n))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """So is what a test has left for good, as a compiler that it imported or a plan that is kept: several times in each run, half a
    second would go into it. What it has left for nobody is gone before."""
    try: return (yield)
    finally:
        if len(gc.get_objects()) > LEFT: gc.collect(), gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once():
    "PEFT writes a model card beside each adapter, of each checkpoint too, and compiles the card's template for it."
    with pytest.MonkeyPatch.context() as m:
        compiled = cache(jinja2.Environment.compile)
        m.setattr(jinja2.Environment, "compile", lambda self, source, *a, **k: compiled(self, source, *a, **k))
        yield


@pytest.fixture(scope="session", autouse=True)
def packages_are_described_once():
    "A run notes its versions, and Accelerate asks for PEFT's with every file: what lies beside a package is parsed for milliseconds."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(importlib.metadata.Distribution, "metadata", property(forks.described_once()))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """No test pulls the plug, and a checkpoint waits for the disk at each of its files, for a quarter of a second in all. In which
    order files are written and synced is checked on the page of `runs`, where a process of its own calls the real function."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_of_the_loss_are_drawn_once():
    """A run ends with `loss.png`, and Matplotlib takes a fifth of the time of a tiny one to draw it. The figure of each run is made; the
    first is drawn, and the others get its bytes. Commands and pages are processes of their own, and draw theirs."""
    if "matplotlib.figure" not in sys.modules: return (yield)
    figure, drawn = sys.modules["matplotlib.figure"].Figure, []
    def savefig(self, to, *args, **how):
        if getattr(to, "name", "") != "loss.png": return real(self, to, *args, **how)
        if not drawn: real(self, to, *args, **how), drawn.append(Path(to).read_bytes())
        Path(to).write_bytes(drawn[0])
    with pytest.MonkeyPatch.context() as m:
        real = figure.savefig
        m.setattr(figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session")
def chromium():
    "Opens pages of one Chromium for all tests of a worker: a thread can hold Playwright only once."
    browser.need_browser()
    with browser.browsing() as open: yield open


# ---- what they take ----

def cpu_seconds():
    "CPU seconds of this process and of those that it started and that have ended."
    return sum(os.times()[:4]) + forks.cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.cpu_before = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    forks.peak_kilobytes()
    try: return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", round(cpu_seconds() - item.cpu_before, 2)))
        item.user_properties.append(("peak", forks.peak_kilobytes()))


def run_alone(tests, root):
    "{test: (CPU seconds, seconds)} of these tests in a run of their own, without other workers beside it."
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        subprocess.run([sys.executable, "-m", "pytest", "-n0", "-q", f"--took={folder}/took", *tests], cwd=root, env=env,
                       stdout=subprocess.DEVNULL)
        took = Path(folder)/"took"
        return json.loads(took.read_text(encoding="utf-8")) if took.exists() else {}


class Durations:
    "Gathers, in the process that reports, what each test that passed took."
    def __init__(self, config):
        self.config, self.took, self.peaks, self.setup, self.failed = config, {}, {}, {}, 0

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed
        if report.when == "setup": self.setup[report.nodeid] = report.duration
        if report.when == "call" and report.passed:
            cpu = dict(report.user_properties).get("cpu_seconds", 0.)
            self.took[report.nodeid] = cpu, report.duration + self.setup.get(report.nodeid, 0.)
            self.peaks[report.nodeid] = dict(report.user_properties).get("peak", 0)

    def rows(self): return durations.load().get(durations.kind(), {})

    def over(self): return durations.over_budget(self.took, self.rows())

    def pytest_sessionfinish(self, session):
        "What disturbed a page once may not disturb it twice: a page over its budget is run again, alone, before it counts."
        if path := self.config.option.took: Path(path).write_text(json.dumps(self.took), encoding="utf-8")
        many = len(durations.paces(self.took, self.rows())) >= durations.ENOUGH
        if not many or self.config.option.save_durations or not (over := self.over()): return
        tests = [o for o in self.took if durations.page_of(o) in over]
        for test, took in run_alone(tests, self.config.rootpath).items(): self.took[test] = min(self.took[test], tuple(took))
        if self.over(): session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.over().values(): terminalreporter.write_line(line)
        if not self.config.option.save_durations: return
        option, whole = self.config.option, self.config.args_source == pytest.Config.ArgsSource.TESTPATHS
        whole &= not (self.failed or option.keyword or option.markexpr or self.config.touched is not None)
        durations.save(self.took, whole, peaks=self.peaks)
        terminalreporter.write_line(f"{durations.TABLE.name}: {len(self.took)} tests, on {durations.kind()}")
