"""Write README.md from nbs/index.ipynb, outputs included; nothing but nbconvert is needed.

    python tools/make_readme.py          # write it
    python tools/make_readme.py --check  # say whether it is up to date; exit 1 when it is not
"""
import argparse, difflib, re, sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert.exporters import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit that notebook instead. -->\n\n"
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
FORMS = ["text/markdown", "text/html", "image/svg+xml", "image/png", "text/plain"]  # of an output, the best first
LINK = re.compile(r"(\]\(|\b(?:src|href)=[\"'])(?!https?:|mailto:|data:|#|/)([^)\s\"']+)")


def hidden(cell):
    "Cells with nothing to say in a README: set-up, and the cell that installs the package on Colab."
    return cell.cell_type == "code" and re.search(r"^#\|\s*(hide|eval:\s*false|default_exp)\b", cell.source, re.M)


def rebase(match, raw):
    "A link from nbs/ as seen from the top: `core.ipynb` → `nbs/base/core.ipynb`, `../LICENSE` → `LICENSE`."
    before, target = match.groups()
    target = target[3:] if target.startswith("../") else f"nbs/{target}"
    image = re.search(r"\.(png|svg|jpe?g|gif|webp)$", target)
    return before + (f"{raw}/{target}" if image else target)  # an image shows outside the repository too (PyPI)


def make_readme(path):
    "The README as text. Raises ValueError for a picture among the outputs: it would have no file to live in."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not hidden(c)]
    for c in nb.cells:
        if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.metadata["transient"] = dict(remove_source=True)
        if c.cell_type == "code": c.source = DIRECTIVE.sub("", c.source).strip("\n")
    nb.metadata["language_info"] = dict(name="python")
    exporter = MarkdownExporter(config=Config(NbConvertBase=dict(display_data_priority=FORMS)))
    body, resources = exporter.from_notebook_node(nb)
    if resources["outputs"]: raise ValueError(f"{path} has pictures among its outputs; link to a file instead.")
    raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}"
    body = "".join(o if o.startswith("```") else LINK.sub(lambda m: rebase(m, raw), o) for o in FENCE.split(body))
    body = re.sub(r"[ \t]+$", "", body, flags=re.M)
    return NOTE + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="compare only")
    args, readme = p.parse_args(), ROOT/"README.md"
    new, old = make_readme(ROOT/"nbs"/"index.ipynb"), readme.read_text(encoding="utf-8") if readme.exists() else ""
    if not args.check: readme.write_text(new, encoding="utf-8", newline="\n")
    elif new != old:
        diff = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "from nbs/index.ipynb")
        sys.stderr.writelines(diff)
        sys.exit("README.md differs from what nbs/index.ipynb generates: run `python tools/make_readme.py`.")


if __name__ == "__main__": main()
