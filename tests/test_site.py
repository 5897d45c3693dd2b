"The site and the slides: all links lead somewhere, nothing comes from another server, and a browser walks through."
import html, json, os, re, shutil, subprocess, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import forks
from browser import CHROMIUM
from common import MODULES, NBS, PAGES, ROOT, module_name, once
from qlora_nb.classroom.site import ICON, NEEDED, build_site
from qlora_nb.classroom.slides import build_slides
from qlora_nb.classroom.adoption_sheet import adoption_sheet
from qlora_nb.classroom.site_pages import course, settings
from qlora_nb.base.errors import QLoRAError

gone = [o for o in [*NEEDED, "sphinx_revealjs"] if find_spec(o) is None]
pytestmark = pytest.mark.skipif(bool(gone), reason=f"not installed: {gone}")
NAMES = [p.relative_to(NBS).with_suffix(".html").as_posix() for p in [NBS/"index.ipynb", *PAGES, *sorted(NBS.glob("zh/*.ipynb"))]]
LESSONS = [o for o in dict.fromkeys(NAMES) if o[0].isdigit()]
AXE = ["index.html", "1_foundations/03_nf4.html", "2_training/20_mask_viewer.html", "3_memory/38_gpus.html",
       "classroom/glossary.html", "api/training.data.html"]


def build_forked(out):
    """`build_site`, with Sphinx in a fork that has imported the libraries; `test_a_dead_link_fails_the_build` starts it as it is.
    Two processes would do some of the work twice, and the collector looks again and again through trees that stay."""
    def sphinx(call, env, **kw):
        return forks.run("import gc, sys; gc.disable(); from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))", *call[3:], env=env, timeout=900)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("qlora_nb.classroom.site.subprocess", SimpleNamespace(run=sphinx))
        build_site(out, jobs=1)


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id): return once(tmp_path_factory, worker_id, "site", build_forked)


@pytest.fixture(scope="session")
def slides(tmp_path_factory, worker_id): return once(tmp_path_factory, worker_id, "slides", build_slides)


# ---- the files ----

def addresses(text):
    "What a page's tags name in `href` and `src`."
    return [html.unescape(o) for o in re.findall(r"""<[^>]*?\s(?:href|src)="([^"]*)\"""", text)]


def broken(folder):
    "Links of the pages in `folder` that lead to no file or to no element."
    pages = {o: o.read_text(encoding="utf-8") for o in folder.rglob("*.html") if "_static" not in o.parts}   # a theme's template lies there
    ids = {o: set(map(html.unescape, re.findall(r'\b(?:id|name)="([^"]+)"', t))) for o, t in pages.items()}
    out, n = [], 0
    for page, text in pages.items():
        for link in set(addresses(text)):
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            there = (page.parent/unquote(url.path)).resolve() if url.path else page
            n += 1
            anchor = unquote(url.fragment)
            if not there.is_file(): out.append((page.name, link))
            elif anchor and there in ids and not anchor.startswith("/") and anchor not in ids[there]: out.append((page.name, link))
    return out, n


def fetched_from_elsewhere(folder):
    "Files of other servers that a browser would load for the pages and style sheets in `folder`."
    out = []
    for o in folder.rglob("*.html"):
        text = o.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|iframe|source|video)\b[^>]*>", text)
        tags += re.findall(r"<link\b[^>]*rel=\"(?:stylesheet|preload|icon|prefetch)[^>]*>", text)
        out += [(o.name, t) for t in tags if re.search(r"(?:src|href)=\"(?:https?:)?//", t)]
    for o in folder.rglob("*.css"):
        out += [(o.name, u) for u in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)]*)|@import\s+[\"'](https?:[^\"']*)", o.read_text(encoding="utf-8"))]
    return out


def test_broken_links_are_found(tmp_path):
    (tmp_path/"a.html").write_text('<a href="b.html#x">1</a><a href="b.html#y">2</a><a href="c.html">3</a><a href="https://x.org/d">4</a>', encoding="utf-8")
    (tmp_path/"b.html").write_text('<p id="x"></p><img alt="" src="https://x.org/a.png"><link rel="stylesheet" href="//x.org/a.css">', encoding="utf-8")
    (tmp_path/"s.css").write_text("@import 'https://x.org/f.css'; a {background: url(https://x.org/b.png)}", encoding="utf-8")
    assert sorted(broken(tmp_path)[0]) == [("a.html", "b.html#y"), ("a.html", "c.html")]
    assert len(fetched_from_elsewhere(tmp_path)) == 4


def test_all_pages_are_there_and_all_links_resolve(site):
    missing = [o for o in [*NAMES, *(f"api/{module_name(m)}.html" for m in MODULES)] if not (site/o).is_file()]
    assert not missing
    bad, n = broken(site)
    assert not bad, bad[:20]
    assert n > 50*len(NAMES), f"only {n} links were looked at"


def test_nothing_comes_from_elsewhere(site, slides):
    assert not fetched_from_elsewhere(site)
    assert not fetched_from_elsewhere(slides)


def test_pages_bring_what_they_use(site):
    "The icons that the pages name and few others; the index of the search on the page of results alone."
    text = (site/"_static"/"scripts"/"fontawesome.js").read_text(encoding="utf-8")
    kept = [m[1] for m in ICON.finditer(text)]
    assert {"bars", "github", "magnifying-glass", "moon", "rocket"} <= set(kept) and len(kept) < 100, kept
    assert [o.name for o in site.rglob("*.html") if "searchindex.js" in o.read_text(encoding="utf-8")] == ["search.html"]


def test_next_leads_through_the_course(site):
    here, seen = "index.html", []
    while here in ["index.html", *LESSONS]:
        seen.append(here)
        found = re.search(r'<a class="right-next"[^>]*?href="([^"]+)"', (site/here).read_text(encoding="utf-8"))
        here = os.path.normpath(Path(here).parent/found[1])
    assert seen == ["index.html", *(f"{p['folder']}/{o['name']}.html" for p in course(ROOT) for o in p["page"] if p["folder"][0].isdigit())]


def test_pages_are_fit_to_be_read(site):
    "No directive, no solution, no picture without words, no `% 2` taken for a magic; the badge leads to the notebook."
    for o in NAMES:
        text = (site/o).read_text(encoding="utf-8")
        main = text[text.index("<main"):]
        words = html.unescape(re.sub(r"<[^>]+>", "", main))
        assert not re.search(r"^#\| ?[a-z]", words, re.M), o
        assert not re.search(r'<span class="k">\d', main), f"{o}: a number is coloured as a magic's name"
        if o in LESSONS: assert not re.search(r"### (BEGIN|END) (SOLUTION|HIDDEN)|### WRONG", words), o
        for tag in re.findall(r"<img\b[^>]*>", main): assert re.search(r'alt="[^"]{3}', tag), (o, tag)
        assert f"/blob/student/{o.removesuffix('.html')}.ipynb" in main, f"{o} has no badge"


def test_reference_has_docments(site):
    text = re.sub(r"<[^>]+>", "", (site/"api"/"training.data.html").read_text(encoding="utf-8"))
    assert "load_rows" in text
    source = (ROOT/"qlora_nb"/"classroom"/"site.py").read_text(encoding="utf-8")
    said = re.search(r"jobs:int=2\) -> Path:\s+# (.+)", source)[1]
    assert said in re.sub(r"<[^>]+>", "", (site/"api"/"classroom.site.html").read_text(encoding="utf-8"))


def checkout_of(folder, *texts):
    "A checkout with one part of pages that say `texts`."
    shutil.copytree(ROOT/"docs", folder/"docs")
    shutil.copytree(NBS/"images", folder/"nbs"/"images")
    shutil.copy(ROOT/"settings.ini", folder)
    names = [f"{i:02}_page" for i in range(len(texts))]
    (folder/"nbs"/"course.toml").write_text('[[part]]\nfolder = "1_a"\ntitle = "A"\n' + "".join(f'[[part.page]]\nname = "{o}"\n' for o in names), encoding="utf-8")
    (folder/"nbs"/"1_a").mkdir()
    for name, text in {"index": "# Index", **{f"1_a/{o}": t for o, t in zip(names, texts)}}.items():
        cells = [dict(cell_type="markdown", id="a", metadata={}, source=text)]
        (folder/"nbs"/f"{name}.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding="utf-8")
    return folder


def test_a_dead_link_fails_the_build(tmp_path):
    source = checkout_of(tmp_path/"source", "# One\n\n## Two words\n\n[a](01_page.ipynb#no-such-heading)", "# Other")
    with pytest.raises(QLoRAError, match="no-such-heading"): build_site(tmp_path/"site", source, jobs=1)
    assert not (tmp_path/"site").exists()


# ---- in a browser ----

class Quiet(SimpleHTTPRequestHandler):
    "Serves the site and, below /slides, the decks, which lie in a folder beside it; nothing is copied, as workers share both."
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True   # one connection for many files
    def log_message(self, *args): pass
    def end_headers(self):
        self.send_header("Cache-Control", "max-age=3600")   # scripts and style sheets are read once for all pages
        super().end_headers()
    def translate_path(self, path):
        usual = self.directory
        if path.startswith("/slides/"): self.directory = str(Path(usual).parent)
        try: return super().translate_path(path)
        finally: self.directory = usual


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address): pass   # a browser that goes on closes its connections


@pytest.fixture(scope="session")
def address(site, slides):
    "A server of the site and, below /slides, the decks."
    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def page(chromium, address):
    "A page of a browser that notes what goes wrong, and every request to another server."
    with chromium() as page:
        page.wrong = []
        page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else page.wrong.append(r.url))
        page.on("requestfailed", lambda r: None if "ABORTED" in r.failure else page.wrong.append(f"{r.url}: {r.failure}"))   # by going on
        yield page


WIDER = """() => { const w = document.documentElement.clientWidth;
  return document.documentElement.scrollWidth <= w ? [] : [...document.querySelectorAll('main *')]
    .filter(e => e.getBoundingClientRect().right > w + 1).slice(0, 5).map(e => e.outerHTML.slice(0, 120)).concat(['wider']) }"""


BROKEN = """() => [...document.querySelectorAll('main td')].filter(e => { const r = document.createRange(); r.selectNodeContents(e);
  return new Set([...r.getClientRects()].map(o => Math.round(o.bottom/6))).size > e.innerText.trim().split(/[\\s\u00a0-]+/).length + 2 })
  .slice(0, 5).map(e => 'a word in pieces: ' + e.innerText.slice(0, 60))"""


# The menu slides in and out when the width changes, and what is looked at before it is there fits by chance. The sheet is there before
# the page: one that comes later has the style of each word made again.
STILL = """{ const s = new CSSStyleSheet(); s.replaceSync('*, ::before, ::after {transition: none !important; animation: none !important}');
  document.adoptedStyleSheets = [s] }"""


def test_what_is_wrong_is_noticed(page, address):
    bad = '<!DOCTYPE html><main><pre style="width:3000px">x</pre><table><td style="overflow-wrap:anywhere;max-width:1px">pieces</table></main><img src="http://127.0.0.2:9/a.png"><script>no()</script>'
    page.route(f"{address}/bad.html", lambda r: r.fulfill(body=bad, content_type="text/html"))   # the site itself is shared
    page.goto(f"{address}/bad.html")
    assert any("127.0.0.2" in o for o in page.wrong) and any("no is not defined" in o for o in page.wrong)
    assert page.evaluate(WIDER) and page.evaluate(BROKEN)


def test_a_walk_through_the_pages(page, address):
    "No page is wider than the screen, on a desk or in a hand, and no table cuts words; no error; no request to another server."
    found, widths = {}, [1200, 390]
    page.add_init_script(STILL)
    for o in [*NAMES, "api/training.data.html", "api/training.html", "search.html", "genindex.html"]:
        page.wrong.clear()
        page.goto(f"{address}/{o}", wait_until="load")
        widths.sort(key=lambda w: w != page.viewport_size["width"])   # the width that it was laid out for comes first
        for width in widths:
            if width != page.viewport_size["width"]: page.set_viewport_size(dict(width=width, height=900))
            if bad := page.evaluate(WIDER) + page.evaluate(BROKEN): page.wrong.append(f"{width}: {bad}")
        if page.wrong: found[o] = [*page.wrong]
    assert not found, json.dumps(found, indent=1)[:4000]


def test_search_finds_a_page(page, address):
    page.goto(f"{address}/search.html?q=codebook")
    page.wait_for_selector("#search-results li a")
    assert page.locator("#search-results li a").count() > 3
    assert not page.wrong


def test_formulas_are_typeset(page, address):
    page.goto(f"{address}/1_foundations/05_lora.html")
    page.wait_for_selector("mjx-container")
    assert "$" not in page.locator("mjx-container").first.inner_text() and not page.wrong


# Of words in code that have the same classes and lie in the same, the first: the others have its colours, and are most of a page.
FEWER = """() => { const known = new Map([[document.body, '']]), seen = new Set();
  const path = e => { if (!known.has(e)) known.set(e, `${path(e.parentElement)}>${e.tagName}.${e.className}.${e.style.cssText}`); return known.get(e) };
  for (const e of [...document.querySelectorAll('pre span')].filter(e => !seen.has(path(e)) ? void seen.add(path(e)) : true)) e.replaceWith(...e.childNodes) }"""


def serious(page):
    "What axe finds that hinders people, with the place."
    from axe_playwright_python.sync_playwright import Axe
    page.evaluate(FEWER)
    found = Axe().run(page).response["violations"]
    return [(v["id"], n["html"][:160], n["any"][:1]) for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]]


needs_axe = pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="needs pip install axe-playwright-python")


@needs_axe
def test_axe_sees_pale_code(page):
    "Once for all words that are as pale, and not for those of another colour."
    words = '<span class="k">if</span> <span class="k">for</span> <span class="n">x</span> <span class="k" style="color:#000">in</span>'
    page.set_content(f'<html lang="en"><title>t</title><style>.k {{color: #ddd}}</style><main><h1>t</h1><pre>{words}</pre><pre>{words}</pre></main>')
    assert [o[:2] for o in serious(page)] == [("color-contrast", '<span class="k">if</span>')]


@needs_axe
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe(page, address, theme):
    "Axe finds no serious violation in pages, in either theme."
    page.emulate_media(color_scheme=theme)
    found = {}
    for o in AXE:
        page.goto(f"{address}/{o}")
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        if bad := serious(page): found[o] = bad
    assert not found, json.dumps(found, indent=1)[:6000]


CUT = """() => { const out = []; for (const s of document.querySelectorAll('section')) s.style.display = 'block';
  for (const p of document.querySelectorAll('section')) { p.hidden = false; p.removeAttribute('aria-hidden') }
  for (const p of document.querySelectorAll('.code pre')) if (p.scrollWidth > p.clientWidth) out.push(p.innerText.slice(0, 200));
  return out }"""


def test_decks(page, address, slides):
    "Every lesson has a deck; a deck opens, can be gone through, and cuts no code at 1280 x 720."
    names = [Path(o).stem for o in LESSONS]
    assert sorted(o.stem for o in slides.glob("*.html")) == sorted(["index", *names])
    page.set_viewport_size(dict(width=1280, height=720))
    for name in names[::5]:   # every fifth in the browser
        page.goto(f"{address}/slides/{name}.html")
        page.wait_for_selector(".reveal.ready")
        total = page.evaluate("Reveal.getTotalSlides()")
        assert total > 2, (name, total)
        page.keyboard.press("Space")
        assert page.evaluate("Reveal.getSlidePastCount()") == 1
        assert not page.wrong, (name, page.wrong)
        assert not (cut := page.evaluate(CUT)), (name, cut)


def test_the_adoption_sheet_is_two_pages_of_paper(tmp_path):
    "As a browser prints it."
    if CHROMIUM is None: pytest.skip("there is no Chromium: apt-get install chromium")
    guide = nbformat.read(ROOT/"nbs/classroom/teaching.ipynb", 4)
    (tmp_path/"sheet.html").write_text(adoption_sheet(guide, settings(ROOT)), encoding="utf-8")
    subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path/'profile'}", f"--print-to-pdf={tmp_path/'sheet.pdf'}",
                    (tmp_path/"sheet.html").as_uri()], check=True, timeout=60, capture_output=True)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path/"sheet.pdf").read_bytes())) == 2
