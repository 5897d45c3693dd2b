"""Copy the outputs of flagged cells from nbs/ to qlora_nb/outputs.json, where a kernel finds them (nbs/base/cells.ipynb).

    python tools/store_outputs.py          # write it, after a flagged cell or its output has changed
    python tools/store_outputs.py --check  # say whether it is up to date; exit 1 when it is not
"""
import argparse, json, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from qlora_nb.base.cells import NEEDS, cell_key, directives

STORE = ROOT/"qlora_nb"/"outputs.json"
WIDGET = "application/vnd.jupyter.widget-view+json"  # shows nothing without its kernel


def flags_of(source): return {k: v for k, v in directives(source).items() if k in NEEDS}


def storable(output):
    "What can be shown again of an output: no progress bar of a run that is over, no widget, no number of a cell."
    if output.get("name") == "stderr": return None
    o = {k: v for k, v in output.items() if k != "execution_count"}
    if WIDGET not in o.get("data", {}): return o
    forms = {k: v for k, v in o["data"].items() if k != WIDGET}
    return {**o, "data": forms} if forms.keys() - {"text/plain"} else None  # the plain text only names the widget


def collect(paths):
    "{key: outputs} of all flagged cells that have outputs. Raises ValueError where one source has two outputs."
    store = {}
    for path in sorted(paths):
        for c in nbformat.read(path, as_version=4).cells:
            if c.cell_type != "code" or not flags_of(c.source): continue
            outputs = [o for o in map(storable, c.outputs) if o]
            if outputs and store.setdefault(cell_key(c.source), outputs) != outputs:
                raise ValueError(f"{path.name}: another cell has the same source and other outputs:\n{c.source}")
    return store


def make_store(): return json.dumps(collect(o for o in (ROOT/"nbs").rglob("*.ipynb") if o.parent.name != "zh"), indent=1, ensure_ascii=False) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="compare only")
    new = make_store()
    if not p.parse_args().check: STORE.write_text(new, encoding="utf-8", newline="\n")
    elif not STORE.exists() or STORE.read_text(encoding="utf-8") != new:
        sys.exit("qlora_nb/outputs.json is not what the notebooks hold: run `python tools/store_outputs.py`.")


if __name__ == "__main__": main()
