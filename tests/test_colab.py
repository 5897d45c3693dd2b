"The install cell must replace nothing that Colab ships: a library that is already loaded would need a restart."
import os, re, shlex, subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from common import PAGES, SETTINGS, install_cells, read

SHIPPED = Path(__file__).parent/"colab-2026-08.txt"
PLATFORM = "--python-version 3.13 --python-platform x86_64-unknown-linux-gnu".split()
UNREACHABLE = re.compile("failed to fetch|error sending request|dns error|request failed|timed out", re.I)
NAMES = {"PIP_CERT": "SSL_CERT_FILE", "PIP_INDEX_URL": "UV_DEFAULT_INDEX"}  # uv does not read pip's settings


def by_name(lines):
    "{canonical name: Requirement} of requirement lines; comments and blank lines do not count."
    reqs = [Requirement(o) for o in (line.split("#")[0].strip() for line in lines) if o]
    return {canonicalize_name(r.name): r for r in reqs}


def cell_requirements():
    "What the install cell asks pip for, apart from this package itself, which comes with --no-deps."
    cell, = install_cells(read(PAGES[0]))
    lines = [shlex.split(o) for o in re.findall(r"%pip install (.*)", cell)]
    ours = [o for o in lines if any(a.startswith("git+") for a in o)]
    assert ours[0] == ["-q", "--no-deps", ours[0][-1]], "the package itself must be installed alone and with --no-deps"
    assert ours[1:] == [["-q", ours[0][-1]]], "elsewhere it must be installed with what it needs"
    return by_name(a for o in lines if o not in ours for a in o if not a.startswith("-"))


shipped = by_name(SHIPPED.read_text(encoding="utf-8").splitlines())
pinned = {k: r for k, r in shipped.items() if r.specifier}
wanted = by_name(shlex.split(SETTINGS["requirements"]))


def resolve(reqs, folder):
    "Ask uv for a set that holds `reqs` and all that Colab ships; None where there is none, else {name: version}."
    (folder/"in.txt").write_text("\n".join(map(str, [*reqs, *pinned.values()])), encoding="utf-8")
    env = os.environ | {uv: os.environ[pip] for pip, uv in NAMES.items() if pip in os.environ}
    cmd = [find_uv_bin(), "pip", "compile", "in.txt", "-c", SHIPPED, *PLATFORM, "--no-header", "--no-annotate"]
    r = subprocess.run(cmd, cwd=folder, capture_output=True, text=True, env=env | {"UV_PYTHON_DOWNLOADS": "never"})
    if r.returncode == 0: return {k: str(o.specifier)[2:] for k, o in by_name(r.stdout.splitlines()).items()}
    if "No solution found" in r.stderr: return None
    if UNREACHABLE.search(r.stderr): pytest.skip("the package index cannot be reached, so nothing can be resolved")
    pytest.fail(f"uv stopped with {r.returncode}:\n{r.stderr}", pytrace=False)


def test_install_cell_replaces_nothing(tmp_path):
    cell = cell_requirements()
    assert all(re.fullmatch(r"==[\d.]+", str(r.specifier)) for r in cell.values()), "the install cell is not pinned"
    assert not cell.keys() & shipped.keys(), "the install cell names a package that Colab ships"
    got = resolve([*cell.values(), *wanted.values()], tmp_path)
    assert got, "the install cell does not resolve beside what Colab ships"
    assert {k: f"=={got[k]}" for k in [*pinned, *cell]} == {k: str(r.specifier) for k, r in (pinned | cell).items()}


def test_gate_can_fail(tmp_path):
    newer = cell_requirements() | by_name(["trl==1.16.0"])  # needs a newer pyarrow than the one that Colab has loaded
    assert resolve(newer.values(), tmp_path) is None


def test_nothing_is_left_out():
    missing = wanted.keys() - shipped.keys() - cell_requirements().keys()
    assert not missing, f"neither Colab nor the install cell brings {sorted(missing)}, and --no-deps will not either"
