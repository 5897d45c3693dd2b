"""How long pages and tests take: the table `durations.json`, which `pytest --save-durations` writes.

For each kind of processor, {name: [CPU seconds, seconds on the clock]}:
pages, test files, and tests of more than `SLOW` seconds; and of pages the gigabytes that their kernel had at its highest.
CPU seconds are those of the test and of the processes that it started, such as a page's kernel."""
import json, os, platform
from pathlib import Path
from statistics import quantiles

TABLE = Path(__file__).parent/"durations.json"
SLOW = 2    # seconds from which a test has a row of its own
GRACE = 5   # CPU seconds over its budget that a page may always take
ENOUGH = 10  # pages whose pace tells how busy the machine is


def kind():
    "The kind of this processor, as far as it decides what PyTorch computes in and how fast."
    if platform.machine() not in ("x86_64", "AMD64"): return platform.machine()
    try: from numpy._core._multiarray_umath import __cpu_features__ as features
    except ImportError: from numpy.core._multiarray_umath import __cpu_features__ as features
    wide = features.get("AVX512F") and os.environ.get("ATEN_CPU_CAPABILITY", "avx512") == "avx512"
    info = Path("/proc/cpuinfo")  # NumPy asks the processor, but not about bfloat16
    bf16 = info.exists() and "avx512_bf16" in info.read_text(encoding="utf-8")
    return ("AVX512-BF16" if bf16 else "AVX512") if wide else "AVX2" if features.get("AVX2") else "x86-64"


def load(path=TABLE): return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def rows_for(table, this=None):
    "The rows of this kind of processor, or of one that was measured when this one was not."
    return table.get(this or kind()) or next(iter(table.values()), {})


def page_of(nodeid):
    "`core` for the test that runs this page."
    head, _, name = nodeid.partition("::test_page_runs[")
    return name.removesuffix("]").removesuffix(".ipynb") if name and head.endswith("test_notebooks.py") else None


def gigabytes(peaks):
    "{page: gigabytes} from {test: kilobytes}, of the pages whose kernel was asked."
    return {page_of(test): round(n*1024/1e9, 1) for test, n in sorted(peaks.items()) if n and page_of(test)}


def summary(tests):
    "Rows of the table from {test: (CPU seconds, seconds)}."
    rows = dict(pages={}, files={}, tests={})
    for test, took in tests.items():
        if page := page_of(test): rows["pages"][page] = took
        else:
            file = rows["files"].setdefault(test.partition("::")[0], (0, 0))
            rows["files"][test.partition("::")[0]] = file[0] + took[0], file[1] + took[1]
            if max(took) >= SLOW: rows["tests"][test] = took
    return {k: {n: [round(o, 1) for o in v] for n, v in sorted(kind_rows.items())} for k, kind_rows in rows.items()}


def save(tests, whole, path=TABLE, peaks={}):
    "Write what a run took: after the whole suite all rows of this processor, else those of pages and single tests."
    table, new = load(path), summary(tests)
    memory = (table.get(kind(), {}).get("memory", {}) if not whole else {}) | gigabytes(peaks)
    if not whole:
        old = table.get(kind(), {})
        new = {k: {**old.get(k, {}), **({} if k == "files" else rows)} for k, rows in new.items()}
    table[kind()] = new | (dict(memory=memory) if memory else {})
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def expected(nodeid, rows):
    "Seconds that a test takes by the table, as far as it has a row."
    page = page_of(nodeid)
    return (rows.get("pages", {}).get(page) if page else rows.get("tests", {}).get(nodeid)) or (0, 0)


def position(nodeid, rows):
    "A sort key: longest first; a page without a row may be long, so it comes first, and quick tests keep their order."
    page = page_of(nodeid)
    return -float("inf") if page and page not in rows.get("pages", {}) else -expected(nodeid, rows)[1]


def paces(tests, rows):
    "{page: CPU seconds it took for each of its budget}, of pages with a budget."
    budgets = rows.get("pages", {})
    return {page_of(test): cpu/budgets[page_of(test)][0] for test, (cpu, _) in tests.items() if budgets.get(page_of(test), [0])[0]}


def pace(tests, rows):
    """By how much the machine is slower than that of the table: what three of four pages keep to, and never below 1.
    With other processes beside it, the same work takes more CPU seconds on every page; a processor that multiplies more slowly
    takes more on the many pages that multiply much, and none of them has grown."""
    found = paces(tests, rows)
    return max(1, quantiles(found.values(), n=4)[2]) if len(found) >= ENOUGH else 1


def over_budget(tests, rows):
    "{page: a line} on the pages that took half as much again as the table says, in CPU seconds, at the pace of the run."
    p, lines = pace(tests, rows), {}
    for test, (cpu, _) in sorted(tests.items()):
        budget = p*rows.get("pages", {}).get(page_of(test), (float("inf"),))[0]
        if cpu > max(1.5*budget, budget + GRACE):
            lines[page_of(test)] = f"{page_of(test)} took {cpu:.0f} CPU seconds; its budget is {budget:.0f}"
    return lines
