"The workflows of GitHub, read against what they call: commands, options, files, extras, inputs; and publishing, against a repository here."
import os, re, shlex, subprocess

import nbformat, pytest, yaml

from common import ROOT, SETTINGS
from qlora_nb.classroom.course import course_parser, frozen, notebooks
from qlora_nb.classroom.exercises import student_version

FILES = sorted((ROOT/".github/workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", FILES, ids=lambda o: o.name)


def workflow(path): return yaml.safe_load(path.read_text(encoding="utf-8"))
def steps(path): return [(job, s) for job in workflow(path)["jobs"].values() for s in job["steps"]]
def scripts(path): return [s["run"] for _, s in steps(path) if "run" in s]


def commands(script):
    "The words of each line of a script; a shell's variables stand for themselves."
    return [shlex.split(o, comments=True) for o in script.replace("\\\n", " ").splitlines() if o.strip()]


@each_workflow
def test_actions_are_pinned_to_commits(path):
    "And a comment says which release that is; the same action is the same commit in each."
    pins = {}
    for o in FILES:
        for name, at, release in re.findall(r"uses: ([\w/-]+)@(\S+)(?:  # (v[\d.]+))?", o.read_text(encoding="utf-8")):
            assert re.fullmatch("[0-9a-f]{40}", at) and release, (o.name, name)
            assert pins.setdefault(name, at) == at, (o.name, name)
    assert all(s["uses"].split("@")[0] in pins for _, s in steps(path) if "uses" in s)


@each_workflow
def test_each_command_exists(path):
    "The shell reads it; the course's own command has the word and its options; a script is there; an extra is defined."
    seen = []
    for script in scripts(path):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        for name, *args in commands(script):
            seen.append(name)
            if name == "qlora_course": course_parser().parse_args(args)   # SystemExit for an option that there is not
            elif name == "bash": assert (ROOT/args[0]).is_file(), args
            elif name == "pip":
                extra = re.search(r"\.\[(\w+)\]", " ".join(args))[1]
                assert f"{extra}_requirements" in SETTINGS and (ROOT/args[args.index("-c") + 1]).is_file(), args
            else: assert name in ("git", "cp"), name
    assert "qlora_course" not in seen or seen[0] == "pip", "the command is called before it is installed"


def test_a_command_that_there_is_not_is_found():
    for bad in ("build --nowhere x", "bulid", "site --release x"):
        with pytest.raises(SystemExit): course_parser().parse_args(shlex.split(bad))


@each_workflow
def test_what_it_names_is_there(path):
    "Files, inputs, variables, jobs and steps."
    text, whole = path.read_text(encoding="utf-8"), workflow(path)
    on = whole[True]   # YAML takes `on` for a truth value
    for o in re.findall(r"hashFiles\('([^']+)'\)", text) + re.findall(r"cache-dependency-path: (\S+)", text): assert (ROOT/o).is_file(), o
    inputs = (on.get("workflow_dispatch") or {}).get("inputs", {})
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(inputs)
    for job in whole["jobs"].values():
        assert job.get("needs") in [None, *whole["jobs"]] and "timeout-minutes" in job or "needs" in job
        for o in re.findall(r"steps\.(\w+)\.outputs", str(job)): assert o in [s.get("id") for s in job["steps"]], o
        given = {*job.get("env", {}), "RUNNER_TEMP", "GITHUB_SHA"}
        for s in job["steps"]: assert {*re.findall(r"\$\{?([A-Z_]+)", s.get("run", ""))} <= given | {*s.get("env", {})}, s
        for o in re.findall(r"matrix\.(\w+)", str(job)): assert o in job["strategy"]["matrix"]
    assert not re.search(r"\$\{\{ *(inputs|github\.event)", "\n".join(scripts(path))), "text of others goes through a variable, not into the shell's code"
    pythons = re.findall(r"3\.\d+", " ".join(str(s["with"]["python-version"]) for _, s in steps(path) if "setup-python" in s.get("uses", ""))
                         or str(whole["jobs"]))
    assert all(tuple(map(int, o.split("."))) >= tuple(map(int, SETTINGS["min_python"].split("."))) for o in pythons), pythons


def test_ci_is_not_cut_off_before_its_check_is():
    limit = int(re.search(r"CI_LIMIT:-(\d+)", (ROOT/".ci/run").read_text(encoding="utf-8"))[1])
    job, = workflow(ROOT/".github/workflows/ci.yml")["jobs"].values()
    assert job["timeout-minutes"]*60 > limit + 300


# ---- publishing ----

def git(*args, at): return subprocess.run(["git", *args], cwd=at, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path):
    "A checkout with the script and the workflows, and the repository that it came from."
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    git("init", "-q", "--bare", "origin.git", at=tmp_path)
    git("init", "-q", "-b", SETTINGS["branch"], "here", at=tmp_path)
    (tmp_path/"here/tools").mkdir()
    (tmp_path/"here/tools/publish.sh").write_bytes((ROOT/"tools/publish.sh").read_bytes())
    (tmp_path/"here/.gitignore").write_text("build/\n", encoding="utf-8")
    git("add", ".", at=tmp_path/"here"), git(*who, "commit", "-qm", "first", at=tmp_path/"here")
    git("remote", "add", "origin", str(tmp_path/"origin.git"), at=tmp_path/"here")
    git("push", "-q", "origin", SETTINGS["branch"], at=tmp_path/"here")
    return tmp_path/"here"


STUB = """#!/bin/sh
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/student/build" "$2/slides" && echo "{}" > "$2/student/index.ipynb" && echo "{}" > "$2/student/build/a b.ipynb" && echo $TIME > "$2/student/new.txt"
"""


def run_workflow(name, checkout, tmp_path, **env):
    "The scripts of a workflow's first job, except for what it installs, with a command that writes a small kit."
    (tmp_path/"bin").mkdir(exist_ok=True)
    (tmp_path/"bin/qlora_course").write_text(STUB, encoding="utf-8")
    (tmp_path/"bin/qlora_course").chmod(0o755)
    temp = tmp_path/f"temp{env.get('TIME', '')}"
    temp.mkdir()
    env = {**os.environ, "PATH": f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}", "RUNNER_TEMP": str(temp), "GITHUB_SHA": "0123456789abcdef", **env}
    for script in scripts(ROOT/".github/workflows"/name):
        if not script.startswith("pip"): subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=checkout, env=env, check=True, capture_output=True)


def held(checkout, branch):
    origin = checkout.parent/"origin.git"
    return git("ls-tree", "-r", "--name-only", branch, at=origin).split("\n")[:-1], git("log", "--format=%s", branch, at=origin).split("\n")[:-1]


def test_the_students_notebooks_are_published(checkout, tmp_path):
    "One commit, the kit's files at the top, whatever .gitignore says; again over it; and the checkout is as it was."
    for time in "12":
        run_workflow("pages.yml", checkout, tmp_path, TIME=time)
        assert held(checkout, "student") == (["build/a b.ipynb", "index.ipynb", "new.txt"], ["Student notebooks of 0123456"])
        assert git("show", "student:new.txt", at=checkout.parent/"origin.git") == f"{time}\n"
    assert git("status", "--porcelain", at=checkout).split() == ["??", "_site/"] and git("branch", "--format=%(refname:short)", at=checkout) == f"{SETTINGS['branch']}\n"


def test_a_term_is_published_once(checkout, tmp_path):
    run_workflow("term.yml", checkout, tmp_path, TAG="2027-spring", UNTIL="2027-09-30", TIME="1")
    assert held(checkout, "student-2027-spring")[1] == ["Term 2027-spring"]
    assert git("tag", at=checkout.parent/"origin.git") == "2027-spring\n"
    with pytest.raises(subprocess.CalledProcessError): run_workflow("term.yml", checkout, tmp_path, TAG="2027-spring", UNTIL="2027-09-30", TIME="2")


def test_badges_open_what_is_published():
    "Every badge, of a page, a translation or a README, leads to the branch that a workflow pushes, and to a file that lies there."
    source, pages = notebooks(ROOT)
    there = {o.relative_to(source).as_posix() for o in [source/"index.ipynb", *pages, *source.glob("zh/*.ipynb")]}   # as build_course writes them
    branch = re.search(r'kit/student" (\w+) ', (ROOT/".github/workflows/pages.yml").read_text(encoding="utf-8"))[1]
    files = [*source.rglob("*.ipynb"), *ROOT.glob("*.md")]
    found = [(o, *m) for o in files if ".ipynb_checkpoints" not in o.parts
             for m in re.findall(r"colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/([\w-]+)/([^)\"\s\\]+)", o.read_text(encoding="utf-8"))]
    assert len(found) > len(there) and not [o for o in found if o[1] != branch or o[2] not in there]
    term = re.search(r'kit/student" "(\S+)" ', (ROOT/".github/workflows/term.yml").read_text(encoding="utf-8"))[1]
    nb = frozen(student_version(nbformat.read(source/"1_foundations/03_nf4.ipynb", as_version=4)), "2027-spring")
    assert f"/blob/{term.replace('$TAG', '2027-spring')}/1_foundations/03_nf4.ipynb" in nb.cells[0].source
