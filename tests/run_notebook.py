"""Run a notebook top to bottom in a fresh Jupyter kernel, honouring nbdev's `#|` directives.

    python tests/run_notebook.py nbs/base/core.ipynb                  # run it; a failing cell is shown with its error
    python tests/run_notebook.py nbs/base/core.ipynb --save           # and keep the outputs, cleaned, in the file
    python tests/run_notebook.py nbs/7_speed/73_kernels.ipynb --flags cuda  # run the cells marked `#| cuda` too
    python tests/run_notebook.py nbs/7_speed/79_offload.ipynb --all         # every cell, as a reader's Run All would
"""
import argparse, os, re, sys, tempfile
from configparser import ConfigParser
from pathlib import Path
from queue import Empty
from time import monotonic

sys.modules.setdefault("rfc3987_syntax", None)   # jsonschema would compile 38 grammars at import, for addresses that no notebook's schema has
import nbformat
from nbclient import NotebookClient

from qlora_nb.base.cells import directives

ROOT = Path(__file__).parent.parent
cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT/"settings.ini", encoding="utf-8")
FLAGS = set(cfg["DEFAULT"]["tst_flags"].split())
WIDGET = "application/vnd.jupyter.widget-view+json"
# A reader without the Hub is the default reader; thread pools of several libraries would fight over two cores.
QUIET = dict(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", PYTHONHASHSEED="0")


def skipped(cell, flags=()):
    "Is this cell left out of a run with `flags`?"
    d = directives(cell.source)
    return cell.cell_type == "code" and (d.get("eval") == "false" or any(o in FLAGS and o not in flags for o in d))


def widget_errors(nb):
    "Errors raised inside widget callbacks: they end in an Output widget, and no cell fails."
    models = nb.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    return [o for m in models.values() if m.get("model_name") == "OutputModel"
            for o in m["state"].get("outputs", []) if o.get("output_type") == "error"]


WIDGET = "application/vnd.jupyter.widget-view+json"


def without_widgets(nb):
    "Widgets out of the outputs: without their kernel they show their names at best. What stands beside them in another form stays."
    for c in (c for c in nb.cells if c.cell_type == "code"):
        views = [o for o in c.outputs if WIDGET in o.get("data", {})]
        for o in views: del o.data[WIDGET]
        c.outputs = [o for o in c.outputs if o not in views or o.data.keys() - {"text/plain"}]
    nb.metadata.pop("widgets", None)


class Client(NotebookClient):
    """nbclient, looking for a reply twenty times a second instead of once.

    For each output inside an Output widget, nbclient sends a message on the very socket where it awaits the cell's reply,
    and this can swallow ZeroMQ's wake-up call: the reply lies there unread until the time limit of the cell."""
    async def async_start_new_kernel_client(self):
        kc = await super().async_start_new_kernel_client()
        get_msg = kc.shell_channel.get_msg
        async def get_soon(timeout=None):
            end = float("inf") if timeout is None else monotonic() + timeout
            while True:
                try: return await get_msg(timeout=max(0, min(.05, end - monotonic())))
                except Empty:
                    if monotonic() >= end: raise
        kc.shell_channel.get_msg = get_soon
        return kc


def hide_paths(nb):
    "Paths of this machine, as warnings print them, out of the outputs: a reader has others."
    home = [Path(sys.prefix), Path(tempfile.gettempdir()), ROOT]
    for o in (o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "stream"):
        o.text = re.sub(r"\S*/(?:site|dist)-packages/", "", o.text)
        for p in home: o.text = o.text.replace(f"{p}/", "")


def run(path, flags=(), save=False, timeout=900, everything=False, **how):
    """Run `path`; raises nbclient's CellExecutionError, with the cell's source, when a cell fails.

    `everything` runs all cells, as a reader's Run All does, and leaves it to the page to guard those that need more.
    `how` goes to nbclient."""
    nb = nbformat.read(path, as_version=4)
    cells = [c for c in nb.cells if everything or not skipped(c, flags)]
    run_nb = nbformat.v4.new_notebook(cells=cells, metadata=nb.metadata)
    run_nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")
    env = {**os.environ, **QUIET, "QLORA_NB_RUN": " ".join(flags)}  # a cell that was asked for runs, or fails
    if "hub" in flags: env.pop("HF_HUB_OFFLINE")
    client = Client(run_nb, timeout=timeout, startup_timeout=timeout, kernel_name="python3", coalesce_streams=True,
                    resources={"metadata": {"path": str(Path(path).parent)}}, **how)
    client.execute(env=env)
    if errs := widget_errors(run_nb):
        raise RuntimeError(f"{path}: an error inside a widget callback: {errs[0]['ename']}: {errs[0]['evalue']}")
    without_widgets(run_nb)
    if save:
        hide_paths(run_nb)
        nbformat.write(nb, path)
        from nbdev.clean import nbdev_clean
        nbdev_clean.__wrapped__(str(path))
    return run_nb


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebook"), p.add_argument("--save", action="store_true")
    p.add_argument("--flags", default="", help=f"run cells with these flags too: {' '.join(sorted(FLAGS))}")
    p.add_argument("--all", action="store_true", help="run every cell, as a reader's Run All does")
    a = p.parse_args()
    if a.all and a.save: p.error("--all would store what a cell says where it cannot run")
    run(a.notebook, set(a.flags.split()), a.save, everything=a.all)
    print(f"{a.notebook}: ok", file=sys.stderr)
