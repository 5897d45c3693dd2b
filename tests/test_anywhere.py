"What must not depend on the machine: the kind of processor, the encoding of its locale."
import ast, json, os, re, subprocess, sys

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from common import MODULES, NOTEBOOKS, ROOT, code_cells, read
from qlora_nb.base.core import cpu_kind, stored_results

sys.path.insert(0, str(ROOT/"tools"))
from machine import describe
from plain_cpu import run_plain, why_not

# ---- another processor ----

NO_PLAIN = why_not() or (None if "AVX512" in cpu_kind() else f"this processor is plain already: {cpu_kind()}")

PLAIN = """
import itertools, json, sys, torch
sys.path[:0] = sys.argv[1:]
torch.set_num_threads(1)
from processors import measure
from test_quantization import BLOCKS, DTYPES, check_equal, make
for i, (kind, shape) in enumerate(itertools.product(("normal", "middles", "zeros"), ((1,), (5, 33), (64, 128)))):
    for codebook, double, dtype in itertools.product(("nf4", "fp4"), (False, True), DTYPES):
        check_equal(make(kind, shape, i, 1.).to(dtype), codebook, BLOCKS[i % len(BLOCKS)], double)
print(json.dumps(measure()))
"""


@pytest.mark.skipif(NO_PLAIN is not None, reason=f"no plain processor: {NO_PLAIN}")
def test_quantization_on_a_plain_processor():
    "Equal to bitsandbytes there too, where its kernels are others: they show the corner that the page names."
    folders = ROOT/"tests", ROOT/"nbs"/"experiments"
    r = run_plain([sys.executable, "-c", PLAIN, *map(str, folders)], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    found = json.loads(r.stdout.splitlines()[-1])
    stored = next(o for o in stored_results("processors")["rows"] if o["cpu"] == "AVX2")
    assert found["cpu"] == "AVX2" and found["fp4"]["negative"] > 0
    assert (found["fp4"], found["wrong_scales"]) == (stored["fp4"], stored["wrong_scales"])
    assert found["head"] == stored["head"] and found["head"]["with_gaps"] < 1
    assert min(found["cosine"], found["cosine_disarmed"]) > .9999, found   # nothing is repacked there


def test_not_available_is_said_in_one_line(tmp_path):
    "Here for want of a compiler, where nothing else is wanting."
    script, env = ROOT/"tools"/"plain_cpu.py", {**os.environ, "PATH": str(tmp_path), "CC": ""}
    r = subprocess.run([sys.executable, script, sys.executable, "-c", "1/0"], env=env, capture_output=True, text=True)
    assert r.returncode == 3 and r.stdout == "" and len(r.stderr.splitlines()) == 1, r.stderr
    assert r.stderr.startswith("plain_cpu: not available here: ")


@pytest.mark.skipif(why_not() is not None, reason=f"no plain processor: {why_not()}")
@pytest.mark.parametrize("code,status", [("import sys; sys.exit(7)", 7), ("import ctypes; ctypes.string_at(0)", 139)])
def test_plain_commands_end_as_ever(code, status):
    "With their own status, and a fault that is not CPUID's is the program's."
    command = sys.executable, ROOT/"tools"/"plain_cpu.py", sys.executable, "-c", code
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == status


def test_the_machine_is_described():
    lines = dict(o.split(None, 1) for o in describe() if "=" not in o)
    assert list(lines) == ["processor", "units", "cores", "memory"]
    if "AVX512" in cpu_kind(): assert {"avx2", "avx512f"} <= set(lines["units"].replace(",", " ").split())


# ---- another locale ----

def without_encoding(source):
    "Lines of `source`, which may hold IPython's magics, that read or write text in the encoding of the locale."
    if not re.search(r"\b(?:open|read_text|write_text)\b", source): return   # most cells: IPython's reading of one takes a millisecond
    for n in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if not isinstance(n, ast.Call) or any(k.arg in ("encoding", None) for k in n.keywords): continue
        if isinstance(n.func, ast.Attribute) and n.func.attr in ("read_text", "write_text"): yield n.lineno
        if isinstance(n.func, ast.Name) and n.func.id == "open":
            modes = [o for o in (*n.args[1:2], *(k.value for k in n.keywords if k.arg == "mode"))]
            if not any("b" in getattr(o, "value", "b") for o in modes): yield n.lineno


def test_calls_without_an_encoding_are_found():
    calls = ['open("a")', 'open("a", "rb")', 'p.read_text()', 'p.read_text(encoding="utf-8")', 'open(a, mode="w")', '%ls',
             'open(f, **how)', 'p.write_text("x")']
    assert list(without_encoding("\n".join(calls))) == [1, 3, 5, 8]


def test_text_is_utf8_in_every_locale():
    "Windows has cp1252 by default, and LC_ALL=C without Python's UTF-8 mode has ASCII."
    texts = {o.name: o.read_text(encoding="utf-8") for folder in ("tests", "tools") for o in (ROOT/folder).glob("*.py")}
    texts |= {o.name: o.read_text(encoding="utf-8") for o in MODULES}
    for o in NOTEBOOKS: texts |= {f"{o.name}, cell {c['id']}": c.source for c in code_cells(read(o))}
    found = {name: lines for name, source in texts.items() if (lines := list(without_encoding(source)))}
    assert not found, f"text without an encoding: {found}"


ASCII = """
import json, sys, tempfile
from pathlib import Path
from qlora_nb.apps.cli import one_line_errors
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.runs import write_json
with tempfile.TemporaryDirectory() as d:
    write_json(Path(d)/"run.json", dict(said="Grüße → 你好"))
    assert json.loads((Path(d)/"run.json").read_bytes())["said"] == "Grüße → 你好"
with one_line_errors():
    print("1 → 2")
    raise QLoRAError("there is no 'Grüße'.")
"""


def test_a_terminal_that_knows_ascii_alone(tmp_path):
    "What it cannot show is a question mark there, and not a traceback in place of the answer."
    (tmp_path/"say.py").write_text(ASCII, encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONIOENCODING", None)
    r = subprocess.run([sys.executable, tmp_path/"say.py"], env=env, capture_output=True, encoding="ascii")
    assert (r.returncode, r.stdout.strip()) == (2, "1 ? 2"), r.stderr
    assert r.stderr.splitlines()[-1] == r"error: there is no 'Gr\xfc\xdfe'."
