"How Sphinx makes the site out of the pages that qlora_nb.classroom.site writes for it."
import gc, re, sys
from functools import cache
from importlib import import_module
from pathlib import Path

from sphinx.domains.python import PythonDomain
from sphinx.highlighting import PygmentsBridge
from sphinx.search.en import SearchEnglish

sys.modules.setdefault("rfc3987_syntax", None)   # no schema here has addresses, and jsonschema compiles 38 grammars for them
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from qlora_nb.classroom.site import docments_of
from qlora_nb.classroom.site_pages import settings

cfg = settings(ROOT)
project, author, copyright = cfg["lib_name"], cfg["author"], cfg["copyright"]
version = release = cfg["version"]
extensions = ["myst_nb", "sphinx_external_toc", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["**.ipynb_checkpoints"]
external_toc_path = "_toc.yml"

# Pages: outputs as they are committed, nothing runs, no widget asks a server for its code
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_render_markdown_format = "gfm"         # outputs in Markdown have tables
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
toc_object_entries_show_parents = "hide"
mathjax_path = "mathjax/tex-chtml.js"   # beside the pages; build_site puts it there

# Reference. The modules are imported here, before Sphinx divides into processes, and not in each of these again.
for o in sorted((ROOT/"qlora_nb").rglob("[a-z]*.py")): import_module(".".join(o.relative_to(ROOT).with_suffix("").parts))
autodoc_inherit_docstrings = False      # torch's docstrings are torch's
autodoc_typehints = "signature"

# Look
html_theme = "sphinx_book_theme"
html_title = cfg["title"]
html_context = dict(default_mode="auto")
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_copy_source = html_show_sourcelink = False
html_theme_options = dict(
    repository_url=cfg["git_url"], repository_branch="student", path_to_docs="", use_repository_button=True,
    use_download_button=False, use_fullscreen_button=False, show_toc_level=2,
    collapse_navbar=True, max_navbar_depth=2,   # the menu of the part that one is in: half the time of a build otherwise
    launch_buttons=dict(colab_url="https://colab.research.google.com"))


# A build makes millions of objects and drops few: to look through them takes a fifth of its time, and copies them in each process
gc.collect(), gc.freeze(), gc.set_threshold(100_000)

# What would be computed again for each page, and for each block of code: a third of the time in which pages are written
SearchEnglish.stem = cache(SearchEnglish.stem)
new_formatter, formatters = PygmentsBridge.get_formatter, {}
new_lexer, MAGIC = PygmentsBridge.get_lexer, re.compile(r"^\s*[%!]|\?\s*$", re.M)


def get_formatter(self, **how):
    "A formatter with its style sheet, made once for all blocks that are shown alike."
    key = self, repr(how)
    if key not in formatters: formatters[key] = new_formatter(self, **how)
    return formatters[key]


def get_lexer(self, source, lang, *how, **more):
    "IPython's lexer tries its thirty magics at each word, and takes the rest of a division for one: what has none is Python."
    return new_lexer(self, source, "python" if lang == "ipython3" and not MAGIC.search(source) else lang, *how, **more)


PygmentsBridge.get_formatter, PygmentsBridge.get_lexer = get_formatter, get_lexer


def of_one_document(app, doctree):
    "A reference is parsed as a document in the page's, whose nodes would take all that Sphinx knows into the file of each page."
    for o in doctree.findall():
        if o.document is not doctree: o.document = doctree


def found_once(app, env):
    "Once all is read: for a type in a signature, the names of all objects would be gone through at each place."
    PythonDomain.find_obj = cache(PythonDomain.find_obj)


def page_language(app, pagename, templatename, context, doctree):
    if pagename.startswith("zh/"): context["language"] = "zh-Hans"


def setup(app):
    # numbers chapters, where asked to, and does not say that pages can be read side by side; we ask for no numbers
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    app.connect("autodoc-process-docstring", docments_of)
    app.connect("html-page-context", page_language)
    app.connect("doctree-read", of_one_document)
    app.connect("env-updated", found_once)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
