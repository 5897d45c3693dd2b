"""Explorers and the chat as a reader meets them: a real browser, JupyterLab and Notebook 6 with ipywidgets 7, the keyboard alone.

Without Chromium or Playwright these tests are skipped."""
import hashlib, os, shutil, subprocess, sys, sysconfig
from contextlib import contextmanager
from pathlib import Path

import nbformat, pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook

from browser import serving
from common import ROOT

EXPLORER = """
import torch
from qlora_nb.base.explorer import choice, explore, number
from qlora_nb.foundations.lora import draw_lora
rng = torch.Generator().manual_seed(0)
updates = {"mlp.up_proj": torch.randn(64, 32, generator=rng), "self_attn.q_proj": torch.randn(32, 32, generator=rng)}
def draw(**how):
    if how["lora_alpha"] == 13: raise RuntimeError("it broke")
    return draw_lora(updates, **how)
seen = explore(draw, "Two updates.", r=number("r", 1, 32, 1, 8), lora_alpha=number("lora_alpha", 1, 64, 1, 16),
               target=choice("target_modules", "mlp", "all-linear"))
"""
CHAT = """
from qlora_nb.apps import chat
from qlora_nb.base.model_files import load_tokenizer, tiny_model
tok = load_tokenizer()
chat.stream = lambda *a, **k: (o for o in ("forty", "-two"))
chat.Chat(tiny_model("llama", vocab_size=len(tok)), tok)
"""
MOVED = ".widget-output img, .jupyter-widgets-output-area img"   # the figure below the controls


def write(folder):
    cells = [new_code_cell(o.strip()) for o in (EXPLORER, CHAT)]
    spec = dict(name="python3", display_name="Python 3")
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=spec)), folder/"page.ipynb")


def homes(folder):
    "Jupyter's folders, so that nothing of the reader's own is read or written; and where this package is."
    names = "JUPYTER_CONFIG_DIR JUPYTER_RUNTIME_DIR JUPYTER_DATA_DIR JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR IPYTHONDIR"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {o: str(folder/o) for o in names.split()} | dict(PYTHONPATH=path, MPLCONFIGDIR=os.environ.get("MPLCONFIGDIR", ""))


LAB = ("lab --no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --ServerApp.root_dir=. "
       "--IdentityProvider.token={token} --LabApp.expose_app_in_browser=True "
       "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")


@contextmanager
def lab_page(chromium, folder):
    "The page in JupyterLab, all its cells run."
    write(folder)
    command = [str(Path(sys.executable).parent/"jupyter-lab"), *LAB.split()[1:]]
    with serving(*command, cwd=folder, env=homes(folder)) as (url, token), chromium() as page:
        page.goto(f"{url}/lab/tree/page.ipynb?token={token}", timeout=240_000)
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel", timeout=240_000)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.get_by_label("message", exact=True).wait_for(timeout=240_000)   # the chat, the last cell
        yield page


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    with lab_page(chromium, tmp_path_factory.mktemp("lab")) as page: yield page


def source(page): return page.locator(MOVED).get_attribute("src")


def press(page, key, times=1):
    "Press a key, and wait for the figure that it leads to."
    before = source(page) if page.locator(MOVED).count() else None
    for _ in range(times): page.keyboard.press(key)
    page.wait_for_function("([path, old]) => { const i = document.querySelector(path); return i && i.src != old }",
                           arg=[MOVED, before], timeout=120_000)
    return source(page)


def type_into(page, name, text):
    "Replace what stands in a box, key by key; it is taken over when the box is left."
    page.get_by_label(name, exact=True).focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(text)


# ---- what is asked of both front ends ----

def a_slider_moved_by_keyboard(page):
    assert page.locator(MOVED).count() == 0          # only the static figure, until something is moved
    slider = page.locator("[role=slider], .ui-slider-handle").first
    slider.focus()
    first = press(page, "ArrowRight")
    assert page.get_by_label("r", exact=True).input_value() == "9"
    assert page.locator(MOVED).get_attribute("alt").startswith("Adapters of rank 9, alpha 16, on mlp: ")
    assert page.evaluate("document.activeElement.matches('[role=slider], .ui-slider-handle')")   # and can be moved on
    assert press(page, "ArrowRight") != first and page.get_by_label("r", exact=True).input_value() == "10"


def controls_by_name(page):
    type_into(page, "lora_alpha", "64")
    press(page, "Tab")
    page.get_by_role("button", name="all-linear").focus()
    press(page, "Space")
    assert page.get_by_title("target_modules: all-linear").count() == 1


def an_error_in_one_sentence(page):
    type_into(page, "lora_alpha", "13")
    page.keyboard.press("Tab")
    said = page.get_by_text("There is no figure for").last
    said.wait_for(timeout=120_000)
    assert said.inner_text().strip().endswith("RuntimeError: it broke") and page.locator(MOVED).count() == 0
    assert "Traceback" not in page.inner_text("body") and "draw_lora(updates" not in said.inner_text()
    type_into(page, "lora_alpha", "16")
    page.keyboard.press("Tab")
    page.wait_for_selector(MOVED, timeout=120_000)     # and it goes on
    assert page.get_by_text("There is no figure for").count() == 0


def the_chat_keeps_the_focus(page):
    for n, question in enumerate(("Hello", "And now?"), 1):
        type_into(page, "message", question)
        page.get_by_role("button", name="Send").focus()
        page.keyboard.press("Enter")
        said = page.get_by_role("log", name="answers").filter(has_text=question)   # what a screen reader reads: the whole answer, once
        said.wait_for(state="attached", timeout=120_000)
        assert "forty-two" in said.text_content() and said.get_attribute("aria-live") == "polite"
        assert page.inner_text("body").count("forty-two") > n   # the bubbles so far, and what is read
        assert page.evaluate("document.activeElement.textContent") == "Send"


def nothing_went_wrong(page):
    assert not page.watch.abroad, f"asked of other machines: {page.watch.abroad}"
    assert not page.watch.errors, page.watch.errors
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr'], .output_stderr, .output_error").count() == 0


ASKED = [a_slider_moved_by_keyboard, controls_by_name, an_error_in_one_sentence, the_chat_keeps_the_focus, nothing_went_wrong]


def test_in_lab(lab):
    for asked in ASKED: asked(lab)   # one test, as each goes on from where the one before left the page


# ---- Notebook 6 with ipywidgets 7, as on Colab and on many servers of universities ----

# widgetsnbextension 3.6.10 cannot make an Output widget ("_deserialize_state is not a function"), whatever it is to show.
OLD = ("notebook==6.5.7 ipywidgets==7.7.1 widgetsnbextension==3.6.6 ipython==7.34.0 ipykernel==6.29.5 jupyter-client==7.4.9 "
       "traitlets==5.9.0 pyzmq==24.0.1 setuptools<81").split()


@pytest.fixture(scope="module")
def old_jupyter():
    """A virtual environment with these versions, made once and kept: what they are besides comes from the one that runs the tests."""
    from platformdirs import user_cache_path
    from uv import find_uv_bin
    key = hashlib.sha256(" ".join([*OLD, sys.version, sys.prefix]).encode()).hexdigest()[:12]
    home = user_cache_path("qlora_nb")/f"notebook6-{key}"
    home.parent.mkdir(parents=True, exist_ok=True)
    bin = "Scripts" if sys.platform == "win32" else "bin"
    with FileLock(f"{home}.lock"):
        if (home/"complete").exists(): return home/bin
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        r = subprocess.run([find_uv_bin(), "pip", "install", "-q", "--python", home/bin/"python", *OLD], capture_output=True, text=True)
        if r.returncode: pytest.skip(f"Notebook 6 cannot be installed here: {r.stderr.strip().splitlines()[-1]}")
        site = next(home.rglob("site-packages"))
        (site/"the_rest.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")   # behind its own
        (home/"complete").touch()
    return home/bin


CLASSIC = ("notebook --no-browser --allow-root --NotebookApp.ip=127.0.0.1 --NotebookApp.port={port} --NotebookApp.notebook_dir=. "
           "--NotebookApp.token={token}")


@pytest.fixture(scope="module")
def classic(chromium, old_jupyter, tmp_path_factory):
    "The page in Notebook 6, all its cells run."
    folder = tmp_path_factory.mktemp("classic")
    write(folder)
    command = [str(old_jupyter/"jupyter-notebook"), *CLASSIC.split()[1:]]
    with serving(*command, cwd=folder, env=homes(folder)) as (url, token), chromium() as page:
        page.goto(f"{url}/notebooks/page.ipynb?token={token}", timeout=240_000)
        ready = "window.Jupyter?.notebook?._fully_loaded && Jupyter.notebook.kernel?.info_reply?.status"
        page.wait_for_function(ready, timeout=240_000)
        page.evaluate("Jupyter.notebook.execute_all_cells()")
        page.get_by_label("message", exact=True).wait_for(timeout=240_000)
        yield page


def test_versions(old_jupyter):
    code = "import IPython, ipywidgets, notebook; print(IPython.__version__, ipywidgets.__version__, notebook.__version__)"
    r = subprocess.run([old_jupyter/"python", "-c", code], capture_output=True, text=True, check=True)
    assert r.stdout.split() == ["7.34.0", "7.7.1", "6.5.7"]


def test_in_notebook_6(classic):
    for asked in ASKED: asked(classic)
