"""What a change touches: the pages and the test files to run again.

A file is touched when it changed or when a file that it imports is touched.
A file that is not Python touches those that name it."""
import json, re, subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL = {"pytest.ini", "constraints.txt", "tests/conftest.py"}  # what every test depends on
RUNNER = "tests/run_notebook.py"                             # every page depends on it
HOUSE = {"tests/test_frame.py", "tests/test_zh.py"}          # look at every file or page of the project, in a few seconds


def git(*args): return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)


def changed_files(ref=""):
    "(where this branch left `ref`, or else main, and the files that differ from there, untracked ones included)"
    asked = [git("merge-base", "HEAD", o).stdout.strip() for o in ([ref] if ref else ["main", "HEAD"])]
    base = next(filter(None, asked), None)
    if base is None: raise ValueError(f"git knows no commit {ref or 'here'!r}: --changed=REF compares with a commit.")
    names = git("diff", "--name-only", base).stdout + git("ls-files", "--others", "--exclude-standard").stdout
    return git("describe", "--always", base).stdout.strip(), sorted(set(names.splitlines()))


def code(path):
    "The code of a Python file or of a notebook."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb": return text
    return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")


def sources(root=ROOT):
    "{path in the project: code} of modules, tools, tests and pages; the Chinese pages hold no code of their own."
    files = [o for p in ("qlora_nb/**/*.py", "tools/*.py", "tests/*.py", "nbs/**/*.ipynb") for o in sorted(root.glob(p)) if o.parent.name != "zh"]
    return {o.relative_to(root).as_posix(): code(o) for o in files}


def imported(path, text, front={}):
    "Files of the project that `text` imports, also in a function, in a string that a test runs, or by the front door, {name: module}."
    ours = set(re.findall(r"\bqlora_nb\.(\w+\.\w+)", text))
    for part, names in re.findall(r"^\s*from qlora_nb((?:\.\w+)?) import ([^#\n]+)", text, re.M):
        ours.update(f"{part[1:]}.{o}" if part else front.get(o, o) for o in re.findall(r"(\w+)(?: as \w+)?", names))
    if path.startswith("qlora_nb/"):
        for dots, o in re.findall(r"^\s*from (\.\.?)([\w.]+) import", text, re.M):
            ours.add(o if dots == ".." else f"{path.split('/')[1]}.{o}")
    yield from (f"qlora_nb/{o.replace('.', '/')}.py" for o in ours)
    if "qlora_nb" in text: yield "qlora_nb/__init__.py"
    if not path.startswith("tests/"): return
    for o in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M): yield from (f"tests/{o}.py", f"tools/{o}.py")


@cache
def needed(path, text, front):
    "The files that `imported` yields; the same text is asked about again and again."
    return frozenset(imported(path, text, dict(front)))


def names(text, file):
    "Does `text` name `file`, as `read(\"data.json\")` or `stored_results(\"data\")` do?"
    file = Path(file)
    return file.name in text or file.suffix == ".json" and bool(re.search(rf"[\"']{re.escape(file.stem)}[\"']", text))


def touched(changed, texts):
    "Those of `texts`, {path: code}, that a change of the files `changed` touches."
    if ALL & set(changed): return set(texts)
    found = {o for o in changed if o in texts}
    found |= {p for p, t in texts.items() for o in changed if o not in texts and names(t, o)}
    if changed: found |= HOUSE & set(texts)
    front = tuple(re.findall(r'(\w+)="(\w+\.\w+)"', texts.get("qlora_nb/__init__.py", "")))
    needs = {p: needed(p, t, front) - {p} | ({RUNNER} if p.endswith(".ipynb") else set()) for p, t in texts.items()}
    while more := {p for p, n in needs.items() if p not in found and n & found}: found |= more
    return found
