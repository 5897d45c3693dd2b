"A class is graded, thirty honest students and more than thirty who are not; each of them costs only itself."
import csv, io, json, os, pickle, platform, re, shutil, socket, subprocess, sys, tempfile, threading, time

import psutil, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell, writes

from common import NBS, once
from qlora_nb.classroom.class_report import odd_rows, report_html, report_markdown
from qlora_nb.classroom.gradebook import canvas_csv, moodle_csv, nbgrader_csv
from qlora_nb.classroom.grading import Graded, grade, learn, pages_of
from qlora_nb.classroom.isolation import CALLS, check_isolation
from qlora_nb.classroom.sandbox import Limits, Sandbox, check_answer
from qlora_nb.base.errors import QLoRAError

try: check_isolation()
except QLoRAError as e: pytestmark = pytest.mark.skip(reason=str(e))

SECONDS = 1.


# ---- a page with two exercises ----

def marks(name, **more):
    return dict(nbgrader=dict(grade=False, grade_id=name, locked=False, schema_version=3, solution=False, task=False) | more)


def exercise(slug, n, points, answer, check, wrong):
    return [new_markdown_cell(f"### Exercise {n}. {slug.title()}\n\n*Code · ★ · 5 minutes*\n\nDo it.", id=f"ex-{slug}"),
            new_code_cell(answer, id=f"ex-{slug}-answer", metadata=marks(slug, solution=True)),
            new_code_cell(check, id=f"ex-{slug}-check", metadata=marks(f"{slug}-check", grade=True, locked=True, points=points)),
            new_raw_cell(wrong, id=f"ex-{slug}-wrong")]


SCALE = """def scale(x, by=2):
    ### BEGIN SOLUTION
    return x*by
    ### END SOLUTION
### BEGIN SOLUTION
bits = 4.5
### END SOLUTION"""
SCALE_CHECK = """got = scale(torch.ones(3, dtype=torch.bfloat16), by=3)
assert got.dtype == torch.bfloat16, f"The type should stay bfloat16, yours is {got.dtype}."
assert got.tolist() == [3, 3, 3], f"scale multiplies: three times one is three, not {got.tolist()}."
assert bits == 4.5, f"bits is 4.5, not {bits}."
x = torch.arange(3.)
assert torch.equal(scale(x), 2*x), "scale multiplies by two, if nothing else is said."
### BEGIN HIDDEN TESTS
assert scale([1, 2]) == [1, 2, 1, 2], "a list is repeated."
### END HIDDEN TESTS"""
SCALE_WRONG = """### WRONG: adds instead of multiplying
def scale(x, by=2): return x + by
bits = 4.5
### WRONG: computes in float32
def scale(x, by=2): return x.float()*by
bits = 4.5
### WRONG: forgets the scale
def scale(x, by=2): return x*by
bits = 4"""
COUNT = "def count(rows):\n    ### BEGIN SOLUTION\n    return {k: rows.count(k) for k in rows}\n    ### END SOLUTION"
COUNT_CHECK = """assert count(["a", "b", "a"]) == {"a": 2, "b": 1}, "Each row is counted."
assert count([]) == {}, "Nothing is nothing."
try: count(None)
except (TypeError, AttributeError): pass
else: assert False, "None is no list." """
COUNT_WRONG = """### WRONG: counts one too many
def count(rows): return {k: rows.count(k) + 1 for k in rows}
### WRONG: takes None for a list
def count(rows): return {k: rows.count(k) for k in rows or []}
### WRONG: counts all together
def count(rows): return {"all": len(rows)} if rows else {}"""


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(writes(new_notebook(cells=cells)), encoding="utf-8")


def handed_in(scale=None, count=None):
    "The two answer cells of a submission; None leaves the stub."
    def stub(code): return re.sub(r"( *)### BEGIN SOLUTION.*?### END SOLUTION",
                                  r"\1# YOUR CODE HERE\n\1raise NotImplementedError()", code, flags=re.S)
    return [new_code_cell(scale or stub(SCALE), id="ex-scale-answer", metadata=marks("scale", solution=True)),
            new_code_cell("assert True", id="ex-scale-check", metadata=marks("scale-check", grade=True)),
            new_code_cell(count or stub(COUNT), id="ex-count-answer", metadata=marks("count", solution=True))]


GOOD = "def scale(x, by=2): return x*by\nbits = 4.5"
GOOD_COUNT = "def count(rows): return {k: rows.count(k) for k in rows}"

# ---- what honest students write: (answer, points) ----

SCALES = [(GOOD, 3), ("import torch\nbits = 9/2\ndef scale(x, by=2):\n    return by*x", 3), ("scale = lambda x, by=2: x*by\nbits = 4.5", 3),
          ("%%time\nfrom operator import mul\ndef scale(x, by=2): return mul(x, by)\nbits = 4.5", 3),
          ("def scale(x, by=2): return x + by\nbits = 4.5", 0), ("def scale(x, by=2): return x*by", 0), (None, 0),
          ("def scale(x, by=2) return x*by", 0), ("def scale(x, by=2): return x.float()*by\nbits = 4.5", 0)]
COUNTS = [(GOOD_COUNT, 1), ("from collections import Counter\ndef count(rows): return dict(Counter(list(rows)))", 1), (None, 0),
          ("from collections import Counter\ndef count(rows): return Counter(list(rows))", 1),
          ("def count(rows): return {k: rows.count(k) + 1 for k in rows}", 0),
          ("def count(rows):\n    rows.sort()\n    out = {}\n    while rows:\n        k = rows.pop()\n        out[k] = out.get(k, 0) + 1\n    return out", 1), ("print('x'*10**6)\n" + GOOD_COUNT, 1)]
HONEST = {f"student{i:02d}": (SCALES[i % len(SCALES)], COUNTS[(i + i//9) % len(COUNTS)]) for i in range(30)}

# ---- what hostile ones write. The first exercise is the attack, the second an honest answer ----

EVERY_FD = """
import json, os, struct
def flood(data):
    for fd in range(3, 64):
        try: os.write(fd, data)
        except OSError: pass
"""
FRAME = "head = json.dumps({}).encode(); flood(struct.pack('>II', len(head), 0) + head)\n"
SLOW = "while True: pass"
SEARCH = """STEP = -1
keep = b"4321-lortnoc"[::STEP]     # what is looked for stands in this code backwards alone
read, found, control, maps = 0, False, False, list(open("/proc/self/maps"))
with open("/proc/self/mem", "rb") as f:
    for line in maps:
        a, b = (int(o, 16) for o in line.split()[0].split("-"))
        if line.split()[1] != "rw-p" or not 1 << 17 <= b - a <= 1 << 25 or read > 1 << 27: continue
        f.seek(a)
        back = f.read(b - a)[::-1]
        read += b - a
        found |= b"detaeper si tsil a" in back
        control |= b"4321-lortnoc" in back
raise RuntimeError(f"found is {found}, control is {control}")
"""
ATTACKS = dict(
    exits="import os; os._exit(0)",
    exits_late="import os\ndef scale(x, by=2): os._exit(0)\nbits = 4.5",
    exits_second="import os\ncalls = []\ndef scale(x, by=2):\n    calls.append(1)\n    if len(calls) > 1: os._exit(0)\n    return x*by\nbits = 4.5",
    system_exit="raise SystemExit(0)",
    interrupt="def scale(x, by=2): raise KeyboardInterrupt\nbits = 4.5",
    endless=SLOW,
    endless_late=f"def scale(x, by=2):\n    {SLOW}\nbits = 4.5",
    sleeps="import time; time.sleep(1000)",
    deaf="import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n" + SLOW,
    prints="while True: print('x'*10**6)",
    prints_raw="import os\nwhile True: os.write(1, b'x'*10**6); os.write(2, b'x'*10**6)",
    recursion="import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()].sort(key=lambda x: f())\nf()",
    segfault="import ctypes; ctypes.string_at(0)",
    fork_bomb="import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    thread_bomb="import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    memory="x = bytearray(1 << 40)",
    memory_slow="x = []\nwhile True: x.append(bytearray(50 << 20))",
    memory_tensor="import torch\nx = torch.zeros(1 << 36)",
    disk="import os\nwhile True: open(os.urandom(4).hex(), 'wb').write(bytes(30 << 20))",
    many_files="for i in range(10**7): open(str(i), 'w').close()",
    folders="import os\nfor i in range(10**7): os.makedirs(f'd{i}/e/f')",
    network="import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\n" + GOOD,
    network_late="import socket\ndef scale(x, by=2):\n    socket.create_connection(('127.0.0.1', PORT), 1)\n    return x*by\nbits = 4.5",
    calls_host="import socket\nsocket.socket(socket.AF_VSOCK)\n" + GOOD,     # between a virtual machine and its host
    uncounted_files="import os\nos.memfd_create('x')\n" + GOOD,
    reads_source="open(SOURCE).read()\n" + GOOD,
    reads_others="import os; os.listdir(CLASS)\n" + GOOD,
    reads_home="import os; os.listdir(HOME)\n" + GOOD,
    reads_secrets="import os; assert 'GRADER_SECRET' in os.environ, 'no secret'\n" + GOOD,
    writes_package="import qlora_nb; open(qlora_nb.__file__, 'a').write('# me')\n" + GOOD,
    unmounts="import ctypes\nl = ctypes.CDLL(None)\nassert l.umount2(b'/scratch', 2) == 0 or l.unshare(0x10020000) == 0, 'no'\n" + GOOD,
    kills="import os; os.kill(-1, 9); raise OSError",
    kills_parent="import os; os.kill(os.getppid() or -1, 9); raise OSError",
    kills_group="import os; os.kill(0, 9); raise OSError",     # a process group reaches through PID namespaces
    kills_session="import os; os.setpgid(0, 0); os.killpg(os.getpgid(0), 9); raise OSError",
    equals="class A:\n    def __eq__(self, o): return True\n    def tolist(self): return [3, 3, 3]\ndef scale(x, by=2): return A()\nbits = A()",
    liar="class A:\n    __class__ = float\n    def __eq__(self, o): return True\nbits = A()\ndef scale(x, by=2): return x*by",
    floats="class A(float):\n    def __eq__(self, o): return True\n    __hash__ = None\nbits = A(1)\ndef scale(x, by=2): return x*by",
    empties="def scale(x, by=2):\n    return x.zero_() if hasattr(x, 'dtype') and x.dtype == torch.float32 else x*by\nbits = 4.5",
    reduces="class A:\n    def __reduce__(self): return print, ('x',)\ndef scale(x, by=2): return A()\nbits = 4.5",
    patches_torch="import torch\ntorch.equal = torch.allclose = torch.Tensor.__eq__ = lambda *a, **k: True\n"
                  "torch.Tensor.tolist = lambda t: [3, 3, 3]\ndef scale(x, by=2): return x\nbits = 4.5",
    patches_builtins="import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.isinstance = lambda *a: True\n"
                     "def scale(x, by=2): return 0\nbits = 4.5",
    patches_channel="import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'dumps'): m.dumps = lambda *a, **k: (b'true', b'')\n"
                    "def scale(x, by=2): return 0\nbits = 0",
    patches_names="__name__ = '__main__'\n__builtins__ = {}\nscale = 3\nbits = 'x'",
    traces="import sys\nsys.settrace(lambda *a: 1/0)\nsys.setprofile(lambda *a: 1/0)\ndef scale(x, by=2): return 0\nbits = 4.5",
    audit="import sys\nsys.addaudithook(lambda *a: 1/0)\ndef scale(x, by=2): return 0\nbits = 4.5",
    fakes=EVERY_FD + FRAME.format("dict(passed=True)")*9,
    fakes_late=EVERY_FD + FRAME.format("dict(found=dict(scale=dict(function=True), bits=dict(value=4.5)))")
               + FRAME.format("dict(value=True, passed=True)")*9,
    garbage=EVERY_FD + "while True: flood(os.urandom(1000))",
    half_frame=EVERY_FD + "flood(struct.pack('>II', 4000000, 0))\nimport time; time.sleep(1000)",
    too_large=EVERY_FD + "flood(struct.pack('>II', 2**32 - 1, 2**32 - 1))",
    deep_frame=EVERY_FD + "flood(struct.pack('>II', 10**5, 0) + b'['*10**5)",
    closes="import os; os.closerange(0, 4096)",
    huge_result="import torch\ndef scale(x, by=2): return torch.zeros(40 << 20)\nbits = 4.5",
    huge_text="def scale(x, by=2): return 'x'*(100 << 20)\nbits = 4.5",
    huge_error="def scale(x, by=2): raise ValueError('x'*(100 << 20))\nbits = 4.5",
    evil_error="class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    evil_name="E = type('=cmd|x\\n\\x1b[31m<script>', (Exception,), {})\ndef scale(x, by=2): raise E('=1+1\\n<img src=x>|')\nbits = 4.5",
    asserts="raise AssertionError('passed')",
    null="x = '\0'",
    nested="("*100_000,
    dots="import a" + ".b"*70_000,     # Python itself takes minutes for it
    other_encoding="# -*- coding: rot13 -*-\nqrs fpnyr(k): cnff",
    surrogate="x = '\\ud800'\ndef scale(x, by=2): return '\\ud800'\nbits = 4.5",
    leaves_daemon="import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\n    os._exit(0)\nbits = 0",
    leaves_thread="import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()\nbits = 0",
    at_exit="import atexit, time\natexit.register(time.sleep, 1000)\nclass A:\n    def __del__(self): time.sleep(1000)\na = A()\nbits = 0")
ENDLESS = "fork_bomb prints prints_raw endless_late endless recursion deaf sleeps patches_builtins half_frame".split()
EXPECT = dict(scale={}, count=1)    # 0 points for the attack, the whole for the honest answer


def still_there(root): return [o for o in psutil.process_iter(["cmdline"]) if str(root) in " ".join(o.info["cmdline"] or [])]


@pytest.fixture(scope="session")
def graded(tmp_path_factory, worker_id):
    "The class, graded once for all workers: grades, seconds, and what was left behind."
    return pickle.loads((once(tmp_path_factory, worker_id, "class", grade_class)/"graded").read_bytes())


def grade_class(root):
    source, folder = root/"source/toy.ipynb", root/"submitted"
    write(source, new_markdown_cell("## Exercises", id="exercises"), new_code_cell("import torch", id="exercise-setup"),
          *exercise("scale", 1, 3, SCALE, SCALE_CHECK, SCALE_WRONG), *exercise("count", 2, 1, COUNT, COUNT_CHECK, COUNT_WRONG))
    for name, ((scale, _), (count, _)) in HONEST.items(): write(folder/name/"toy.ipynb", *handed_in(scale, count))
    calls, server = [], socket.create_server(("127.0.0.1", 0))
    def listen():
        while True:
            try: calls.append(server.accept())
            except OSError: return
    threading.Thread(target=listen, daemon=True).start()
    names = dict(PORT=server.getsockname()[1], SOURCE=repr(str(source)), CLASS=repr(str(folder)), HOME=repr(str(root)))
    for name, code in ATTACKS.items():
        for k, v in names.items(): code = code.replace(k, str(v)) if k in ("PORT", "SOURCE", "CLASS", "HOME") else code
        write(folder/f"attack_{name}/toy.ipynb", *handed_in(code, GOOD_COUNT))
    odd_files(folder, root)
    (root/"tmp").mkdir()
    tempfile.tempdir, start = str(root/"tmp"), time.monotonic()
    os.environ["GRADER_SECRET"] = "token"
    sys.path.append(str(root))     # stands in the command line of each process that is started
    limits = Limits(seconds=SECONDS, memory=1 << 30)
    grades = grade(folder, source, limits, total=20, progress=False)
    took = time.monotonic() - start
    stalled = {o.student for o in grades.results if re.search("takes longer|too busy", o.message or "")} - {f"attack_{o}" for o in ENDLESS}
    if stalled:   # a busy machine can hold up an answer of milliseconds: such a submission is graded once more
        for o in stalled: shutil.copytree(folder/o, root/"stalled"/o)
        again = grade(root/"stalled", source, limits, total=20, progress=False).results
        grades.results[:] = [o for o in grades.results if o.student not in stalled] + again
    tempfile.tempdir = None
    del os.environ["GRADER_SECRET"]
    sys.path.remove(str(root))
    time.sleep(.2)
    server.close()
    left = still_there(root)
    found = dict(grades=grades, took=took, calls=list(map(str, calls)), left=list(map(str, left)), files=[*(root/"tmp").iterdir()], folder=folder)
    (root/"graded").write_bytes(pickle.dumps(found))


def points(graded, student): return {o.slug: o.points for o in graded["grades"].results if o.student == student}
def message(graded, student, slug="scale"):
    return next(o.message for o in graded["grades"].results if (o.student, o.slug) == (student, slug))


# ---- files that are no honest notebooks ----

def odd_files(folder, root):
    good = handed_in(GOOD, GOOD_COUNT)
    for name in "empty binary latin deep no_cells odd_cells large no_exercise".split(): (folder/f"odd_{name}").mkdir()
    text = (folder/"student00/toy.ipynb").read_text(encoding="utf-8")
    (folder/"odd_empty/toy.ipynb").write_bytes(b"")
    (folder/"odd_binary/toy.ipynb").write_bytes(os.urandom(1000))
    (folder/"odd_latin/toy.ipynb").write_bytes(text.replace("YOUR", "ÜÖ").replace("Do", "Ü").encode("latin-1") + b"\xff")
    (folder/"odd_deep/toy.ipynb").write_bytes(b'{"cells": ' + b"["*10**6)
    (folder/"odd_no_cells/toy.ipynb").write_text('{"nbformat": 3, "worksheets": []}', encoding="utf-8")
    cells = [None, 3, {}, {"cell_type": "code"}, {"cell_type": "code", "source": {"a": 1}, "metadata": [], "id": 7},
             {"cell_type": "code", "source": [1, None], "metadata": {"nbgrader": "x"}}]
    (folder/"odd_odd_cells/toy.ipynb").write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    with open(folder/"odd_large/toy.ipynb", "wb") as f: f.truncate(1 << 34)
    write(folder/"odd_no_exercise/holiday.ipynb", new_code_cell("1 + 1"))
    write(folder/"fair_blank/toy.ipynb", *handed_in("\n"*150_000 + GOOD, GOOD_COUNT))    # takes minutes, where it is searched carelessly
    write(folder/"odd_letters/toy.ipynb", *good, *(new_code_cell("a="*9000 + "1") for _ in range(12)))
    (folder/"odd_link").mkdir()
    (folder/"odd_link/toy.ipynb").symlink_to(folder/"student00/toy.ipynb")
    (folder/"odd_folder_link").symlink_to(folder/"student00")
    (folder/"odd_pipe").mkdir()
    os.mkfifo(folder/"odd_pipe/toy.ipynb")
    (folder/"odd_essay.docx").write_bytes(b"PK")
    (folder/"odd_nothing").mkdir()
    (folder/"odd_nested/inner").mkdir(parents=True)
    write(folder/"fair_flat.ipynb", *good)                                    # <student>.ipynb
    write(folder/"fair_renamed/my homework (2).ipynb", *good)
    for c in (twice := handed_in(GOOD, GOOD_COUNT)): c.metadata["nbgrader"]["grade_id"] += "-copy"
    write(folder/"fair_grade_ids/toy.ipynb", *twice)
    write(folder/"fair_no_ids/toy.ipynb", *(new_code_cell(c.source) for c in good))
    for c in (copies := handed_in()): c.id += "-copy"
    write(folder/"fair_duplicated/toy.ipynb", *handed_in(GOOD, GOOD_COUNT), *copies)
    write(folder/"fair_no_checks/toy.ipynb", good[0], good[2])
    write(folder/"fair_no_name/Untitled7.ipynb", *(new_code_cell(c.source) for c in good))
    write(folder/"fair_helper/Copy of toy.ipynb", new_code_cell("import operator as op\nlarge = load()\n\ndef mul(a, b): return op.mul(a, b)"),
          *handed_in("def scale(x, by=2): return mul(x, by)\nbits = 4.5", GOOD_COUNT))
    setup = new_code_cell("import torch", id="exercise-setup")
    write(folder/"fair_below/toy.ipynb", setup, *handed_in("# see below", GOOD_COUNT), new_code_cell(GOOD))
    write(folder/"fair_swapped/toy.ipynb", setup, *handed_in(GOOD_COUNT, GOOD))
    write(folder/"fair_nbgrader/homework/toy.ipynb", *good)
    (folder/"fair_nbgrader/homework/timestamp.txt").write_text("2027-05-01 15:58:23.948203 UTC", encoding="utf-8")
    write(folder/"odd_deeper/a/b/toy.ipynb", *good)
    write(folder/"unfair_lesson/toy.ipynb", new_code_cell(GOOD), setup, *handed_in(None, GOOD_COUNT))   # the lesson's own function
    write(folder/"fair_jupyter/toy.ipynb", *handed_in("torch.add?\nimport asyncio\nawait asyncio.sleep(0)\n" + GOOD, GOOD_COUNT))
    write(folder/"fair_bom/toy.ipynb", *good)
    (folder/"fair_bom/toy.ipynb").write_bytes(b"\xef\xbb\xbf" + (folder/"fair_bom/toy.ipynb").read_bytes())
    write(folder/"=cmd|' \n<b>/toy.ipynb", *good)
    write(folder/"unfair_check/toy.ipynb", *handed_in("def scale(x, by=2): return x\nbits = 4.5", GOOD_COUNT))


# ---- the tests ----

def test_honest_students_get_exactly_their_points(graded):
    wrong = {k: points(graded, k) for k, (s, c) in HONEST.items() if points(graded, k) != dict(scale=s[1], count=c[1])}
    assert not wrong, {k: (v, message(graded, k), message(graded, k, "count")) for k, v in wrong.items()}
    assert len(HONEST) == 30


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_only_itself(graded, name):
    got = points(graded, f"attack_{name}")
    assert got == dict(scale=0, count=1), (got, message(graded, f"attack_{name}"))


def test_there_are_thirty_hostile_ones(graded):
    assert len(ATTACKS) >= 30 and not [o for o in ATTACKS if not points(graded, f"attack_{o}")]


def test_what_is_said_of_attacks(graded):
    said = {o: message(graded, f"attack_{o}") for o in ATTACKS}
    expected = dict(endless=f"It takes longer than {SECONDS:.3g} s.", segfault="Its process was ended by SIGSEGV.", exits="It ended its process.",
                    reads_secrets="no secret", unmounts="no")
    for name, words in expected.items(): assert words in said[name], said
    odd = {o[0] for o in odd_rows(graded["grades"], {})}   # for a person to look at
    assert {f"attack_{o}" for o in ("endless", "segfault", "exits")} <= odd and not [o for o in odd if o.startswith("student")], odd
    if platform.machine() in CALLS: assert "not permitted" in said["uncounted_files"], said
    assert "unreachable" in said["network"] and "Read-only" in said["writes_package"], said
    for name in ("reads_source", "reads_others", "reads_home"): assert "No such file" in said[name], said
    assert all(o and len(o) <= 300 and o.isprintable() for o in said.values()), said


def test_nothing_is_left_and_nobody_was_called(graded):
    assert not graded["calls"] and not graded["left"] and not graded["files"]


def test_time_is_bounded(graded):
    slow = [o for o in graded["grades"].results if o.seconds > SECONDS + 8]
    assert not slow, slow
    assert graded["took"] < 2*(SECONDS + .5)*len(ATTACKS), graded["took"]


def test_every_odd_file_is_one_line(graded):
    lines = {}
    for path, why in graded["grades"].problems: lines.setdefault(path.relative_to(graded["folder"]).parts[0], []).append(why)
    odd = sorted(o.name for o in graded["folder"].iterdir() if o.name.startswith("odd_"))
    silent = [o for o in odd if len(lines.get(o, [])) != 1 and o not in ("odd_odd_cells", "odd_nested")]
    assert len(odd) >= 14 and not silent, (silent, lines)
    assert lines["odd_link"] == lines["odd_folder_link"] == ["is a link"] and lines["odd_large"] == ["is larger than 20 MiB"]
    assert points(graded, "odd_odd_cells") == dict(scale=0, count=0)
    assert not {o.student for o in graded["grades"].results} & {*odd} - {"odd_odd_cells"}


@pytest.mark.parametrize("name", ["flat", "renamed", "grade_ids", "no_ids", "no_name", "duplicated", "no_checks", "helper", "below", "swapped", "nbgrader", "bom", "jupyter", "blank"])
def test_a_clumsy_file_gets_its_points(graded, name):
    assert points(graded, f"fair_{name}") == dict(scale=3, count=1), message(graded, f"fair_{name}")


def test_a_lesson_is_no_answer(graded): assert message(graded, "unfair_lesson") == "It is not answered."


def test_the_time_that_nbgrader_noted_counts(graded):
    assert {str(o.when) for o in graded["grades"].results if o.student == "fair_nbgrader"} == {"2027-05-01 15:58:23"}


def test_a_changed_check_changes_nothing(graded): assert points(graded, "unfair_check") == dict(scale=0, count=1)


def test_the_misconception_is_named(graded):
    by = {o.student: o.misconception for o in graded["grades"].results if o.slug == "scale"}
    found = {HONEST[k][0][0].splitlines()[0]: by[k] for k in HONEST if by[k]}
    assert found == {"def scale(x, by=2): return x + by": "adds instead of multiplying",
                     "def scale(x, by=2): return x.float()*by": "computes in float32"}


def test_files_for_others_hold_no_formula_and_no_markup(graded):
    grades = graded["grades"]
    for make in (nbgrader_csv, canvas_csv, moodle_csv):
        rows = list(csv.reader(io.StringIO(make(grades))))
        assert len({len(o) for o in rows}) == 1, make
        assert not [o for row in rows for o in row if o[:1] in "=+-@\t\r" and o not in ("", "-")], make
    scores = {o["student_id"]: float(o["score"]) for o in csv.DictReader(io.StringIO(nbgrader_csv(grades)))}
    assert scores["student00"] == 4 and scores["'=cmd|'  <b>"] == 4 and scores["attack_exits"] == 1
    page = report_html(grades, folder=graded["folder"])
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "\x1b" not in page
    table = report_markdown(grades, folder=graded["folder"])
    assert "\x1b" not in table and "<script" not in table
    columns = {o.replace("\\|", "").count("|") for o in table.splitlines() if o.startswith("| attack_") or o.startswith("| student")}
    assert columns == {5}


# ---- where nothing can be isolated ----

def test_no_isolation_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QLoRAError, match="cannot be isolated.*--no-isolation"): Sandbox("")


def test_without_isolation_limits_still_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    attacks = {k: ATTACKS[k] for k in "exits endless segfault memory disk many_files equals leaves_daemon huge_result".split()}
    with Sandbox("import torch", Limits(seconds=SECONDS, memory=1 << 30, disk=40 << 20), isolated=False) as box:
        assert check_answer(box, GOOD, SCALE, SCALE_CHECK) is None
        said = {k: check_answer(box, v, SCALE, SCALE_CHECK) for k, v in attacks.items()}
    assert all(said.values()) and "disk" in said["disk"] and "files" in said["many_files"], said
    time.sleep(.3)
    assert not [*tmp_path.iterdir()]
    assert not still_there(tmp_path)


def test_a_killed_grader_leaves_no_process(tmp_path):
    code = ("import sys, time; from qlora_nb.classroom.sandbox import *; box = Sandbox('')\n"
            "print('ready', flush=True); check_answer(box, 'while True: pass', 'x = 1', '')")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert p.stdout.readline() == "ready\n"
    family, end = [], time.monotonic() + 15      # a busy machine takes its time
    while len(family) < 4 and time.monotonic() < end:    # unshare, the page, and two forks with their watchers
        time.sleep(.1)
        family = psutil.Process(p.pid).children(recursive=True)
    assert len(family) >= 4, family
    p.kill(), p.wait()
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert sum(1 for _ in tmp_path.rglob("*")) <= 1    # an empty folder, which a killed process cannot remove


# ---- the course's own exercises ----

def test_the_exercises_of_a_page_are_graded_as_they_are_checked():
    page = NBS/"1_foundations/03_nf4.ipynb"
    (exercises,) = pages_of(page).values()
    graded = Graded("03_nf4", exercises, Limits(seconds=20))
    try:
        learn(graded)    # each solution passes
        for ex in exercises: assert graded.run(ex, ex.stub), ex.slug
        assert check_answer(graded.box, GOOD, SCALE, SCALE_CHECK) is None
        said = check_answer(graded.box, SEARCH, SCALE, SCALE_CHECK)    # no answer finds a hidden test in its memory
        temporary = "import tempfile\nwith tempfile.NamedTemporaryFile() as f: place = f.name"   # PyTorch's compiler wants one
        assert check_answer(graded.box, temporary, "place = 1", "assert place.startswith('/scratch/'), place") is None
    finally: graded.box.close()
    assert said == "RuntimeError: found is False, control is True"
    assert not [o for o in graded.known if o[1] == "It passes."]
    assert sum(map(len, graded.known.values())) == sum(len(o.wrong) for o in exercises)


def test_all_pages_of_the_course_are_read():
    "Translations ask for the same answers under the same names, so they are left out."
    pages = pages_of(NBS)
    assert len(pages) >= 58 and {"03_nf4", "58_falcon"} <= pages.keys() and all(len(o) >= 3 for o in pages.values())
