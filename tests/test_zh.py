"The Chinese pages and README.zh.md say what the English ones say today, in Chinese."
import json, re, shutil, subprocess, sys

import pytest
from common import ROOT, SETTINGS
from common import read as notebook
from test_frame import heading_anchors, text

sys.path.insert(0, str(ROOT/"tools"))
from make_zh import EXPORTS, HASHES, WRONG, Chinese, digest, is_code, paragraphs, read, text_of

ZH = Chinese()
PAGES = ZH.pages()
each_page = pytest.mark.parametrize("name", PAGES)
FIRST = "01_why 02_number_formats 03_nf4 04_double_quantization 05_lora 06_lora_model 07_qlora 08_loading 09_adapters 58_falcon 87_falcon_claims".split()


def translated(name):
    "(paragraph in English, in Chinese) of a page, or of the README."
    if name == "README": yield from zip(paragraphs(text("README.md")), paragraphs(HASHES.sub("", text("README.zh.md"))), strict=True)
    else:
        cells = {c["id"]: c for c in read(ZH.folder/f"{name}.ipynb")["cells"]}
        for c in read(ZH.english(name))["cells"]:
            if c["cell_type"] != "markdown": continue
            yield from zip(paragraphs(text_of(c)), paragraphs(text_of(cells[c["id"]])), strict=True)


def test_the_pages_that_were_promised_are_there(): assert not set(FIRST) - set(PAGES)


@each_page
def test_code_and_outputs_are_those_of_the_english_page(name):
    english = [c for c in read(ZH.english(name))["cells"] if not WRONG.match(c["id"])]
    code = [c | dict(source=EXPORTS.sub("", text_of(c)).splitlines(True)) for c in english if c["cell_type"] == "code"]
    code = [c for c in code if "#| default_exp" not in text_of(c)]
    cells = read(ZH.folder/f"{name}.ipynb")["cells"]
    assert [c for c in cells if c["cell_type"] == "code"] == code
    assert [c["id"] for c in cells] == [c["id"] for c in english if c["cell_type"] == "markdown" or c["id"] in {o["id"] for o in code}]


def test_every_paragraph_is_translated_and_fresh():
    files, problems = ZH.made()
    assert not problems, "\n".join(problems)
    stale = [o.name for o, new in files.items() if o.read_text(encoding="utf-8") != new]
    assert not stale, f"run tools/make_zh.py: {stale}"


def chinese_share(p):
    "Chinese characters among all letters of a paragraph's prose: no code, no formula, no address, no tag, no name in brackets."
    p = re.sub(r"\[[^]]*（英文）( →)?\]\([^)]*\)|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|https?:\S+|</?(?:details|summary)>", " ", p)
    han, words = len(re.findall(r"[\u4e00-\u9fff]", p)), len(re.findall(r"[A-Za-z]{2,}", p))
    return han/max(1, han + words), words


@pytest.mark.parametrize("name", [*PAGES, "README"])
def test_the_prose_is_chinese(name):
    for p, zh in translated(name):
        if is_code(p) or p.startswith(("$$", "|", "[![", "<!--", "[English]")): continue
        share, words = chinese_share(zh)
        assert share > .6 or words < 4, f"{share:.0%} Chinese: {zh}"
        assert not re.search(r"\b(the|is|and|of|which|that) \w+ (the|is|a|of|to|in)\b", re.sub(r"`[^`]*`|\$[^$]*\$", "", zh)), zh


@pytest.mark.parametrize("name", [*PAGES, "README"])
def test_code_formulas_and_numbers_are_kept(name):
    "The same inline code, formulas and fences; in tables the same numbers, row by row."
    for p, zh in translated(name):
        if p.startswith(("**Part ", "<!--")): continue
        if is_code(p) or p.startswith("$$"): assert zh == p
        for kept in (r"(?<!`)`[^`\n]+`(?!`)", r"(?<!\$)\$[^$\n]+\$(?!\$)"):
            assert set(re.findall(kept, p)) == set(re.findall(kept, zh)), (kept, p, zh)
        if p.startswith("|"):
            numbers = lambda o: [sorted(re.findall(r"\d[\d,.]*\d|\d", row)) for row in re.sub(r"\]\(.*?\)", "]", o).splitlines()]
            assert numbers(p) == numbers(zh), zh


@pytest.mark.parametrize("name", [*PAGES, "README"])
def test_bold_closes(name):
    "Before a closing `**`, full-width punctuation needs a space or punctuation after: otherwise Markdown shows the stars."
    for _, zh in translated(name):
        for m in re.finditer(r"\*\*[^*\n]+?\*\*(?=(.))", zh): assert not (m[0][-3] in "：。，；！？、）”" and re.match(r"\w", m[1])), m[0]
        assert zh.count("**") % 2 == 0 or "`" in zh, zh


@pytest.mark.parametrize("path", [*(ZH.folder/f"{o}.ipynb" for o in PAGES), ROOT/"README.zh.md"], ids=lambda o: o.name)
def test_links_lead_somewhere_and_to_chinese_where_there_is_some(path):
    prose = "\n".join(text_of(c) for c in read(path)["cells"] if c["cell_type"] == "markdown") if path.suffix == ".ipynb" else text(path.name)
    for words, target, anchor in re.findall(r"\[([^]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(?:#([^)\s]*))?\)", prose):
        there = (path.parent/target).resolve()
        assert there.exists(), f"{path.name} links to {target}"
        if there.suffix == ".ipynb" and words != "English": assert there.parent == ZH.folder or there.stem not in PAGES, f"{path.name} links to {target}"
        if anchor and there.suffix == ".ipynb": assert anchor in heading_anchors(notebook(there)), f"{path.name} links to {target}#{anchor}"
        if anchor and there.suffix == ".md": assert f"## {anchor}\n" in there.read_text(encoding="utf-8")


@each_page
def test_the_two_languages_point_at_each_other(name):
    folder = ZH.english(name).parent.name
    assert f"[中文](../zh/{name}.ipynb)" in ZH.english(name).read_text(encoding="utf-8")
    chinese = (ZH.folder/f"{name}.ipynb").read_text(encoding="utf-8")
    assert f"[English](../{folder}/{name}.ipynb)" in chinese and f"/student/zh/{name}.ipynb)" in chinese and f"/student/{folder}/" not in chinese


# ---- the tool itself: it must be able to fail ----

@pytest.fixture
def copy(tmp_path):
    "The two languages of one page, and of the README, as files of their own."
    for o in ["nbs/1_foundations/00_start.ipynb", "nbs/1_foundations/03_nf4.ipynb", "nbs/zh/03_nf4.ipynb", "README.md", "README.zh.md", "nbs/index.ipynb",
              *(f"nbs/1_foundations/{o}.ipynb" for o in ("02_number_formats", "04_double_quantization"))]:
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/o, tmp_path/o)
    (tmp_path/"tools").mkdir()
    shutil.copy(ROOT/"tools"/"make_zh.py", tmp_path/"tools")
    return tmp_path


def run(root, *args): return subprocess.run([sys.executable, root/"tools"/"make_zh.py", *map(str, args)], capture_output=True, text=True, encoding="utf-8")


def change(path, change_cell):
    nb = read(path)
    for c in nb["cells"]: change_cell(c)
    path.write_text(json.dumps(nb), encoding="utf-8")


def test_a_changed_paragraph_is_stale_until_it_is_taken(copy):
    assert run(copy).returncode == 0
    english, chinese = copy/"nbs"/"1_foundations"/"03_nf4.ipynb", copy/"nbs"/"zh"/"03_nf4.ipynb"
    before = chinese.read_text(encoding="utf-8")
    def reword(c):
        if c["id"] == "ab54ea1c": c["source"] = [text_of(c).replace("Every weight except the outlier", "All weights but one")]
    change(english, reword)
    for _ in range(2):                                          # running the tool again does not make it fresh
        r = run(copy)
        assert r.returncode == 1 and r.stderr.startswith("03_nf4: ab54ea1c: stale: 'All weights but one has"), r
        assert chinese.read_text(encoding="utf-8") == before
    cell = next(c for c in read(chinese)["cells"] if c["id"] == "ab54ea1c")
    (copy/"new.json").write_text(json.dumps({"ab54ea1c": text_of(cell).replace("除了这个离群值", "除了一个离群值")}), encoding="utf-8")
    assert run(copy, "--take", copy/"new.json", "03_nf4").returncode == 0
    assert "除了一个离群值" in chinese.read_text(encoding="utf-8") and run(copy).returncode == 0


def test_a_new_paragraph_is_missing_and_the_others_stay(copy):
    def add(c):
        if c["id"] == "ab54ea1c": c["source"] = ["A new one.\n\n", *c["source"]]
    change(copy/"nbs"/"1_foundations"/"03_nf4.ipynb", add)
    r, chinese = run(copy), copy/"nbs"/"zh"/"03_nf4.ipynb"
    assert r.returncode == 1 and r.stderr.strip() == "03_nf4: ab54ea1c: missing: 'A new one.'"
    assert next(paragraphs(text_of(c)) for c in read(chinese)["cells"] if c["id"] == "ab54ea1c")[0] == "A new one."
    (copy/"new.json").write_text(json.dumps({"ab54ea1c": "只有一段。"}), encoding="utf-8")
    r = run(copy, "--take", copy/"new.json", "03_nf4")
    assert r.returncode != 0 and "2 paragraphs are 1 in the translation" in r.stderr


def test_changed_code_is_copied_and_a_changed_readme_is_stale(copy):
    def twice(c):
        if c["id"] == "172a87ac": c["source"] = ["1 + 1"]
    change(copy/"nbs"/"1_foundations"/"03_nf4.ipynb", twice)
    readme = copy/"README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("## Two commands", "## Three commands").replace("import tempfile", "import os"), encoding="utf-8")
    r = run(copy)
    assert r.returncode == 1 and r.stderr.strip() == "README: stale: '## Three commands'"
    assert next(text_of(c) for c in read(copy/"nbs"/"zh"/"03_nf4.ipynb")["cells"] if c["id"] == "172a87ac") == "1 + 1"
    assert "import os\n" in (copy/"README.zh.md").read_text(encoding="utf-8")


def test_paragraphs():
    assert paragraphs("a\nb\n\n```\nx\n\ny\n```\n\n\n| t |\n|---|") == ["a\nb", "```\nx\n\ny\n```", "| t |\n|---|"]
    assert len(digest("a")) == 12 and digest("a") != digest("a ")


def test_a_fork_needs_no_translator(copy):
    "What tools/make_links.py changes, the address, is copied."
    old, new = f"{SETTINGS['user']}/", "someone/"
    for path in [copy/"README.md", *(copy/"nbs"/"1_foundations").glob("*.ipynb")]:
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert run(copy).returncode == 0
    for path in (copy/"README.zh.md", copy/"nbs"/"zh"/"03_nf4.ipynb"):
        made = path.read_text(encoding="utf-8")
        assert new in made and old not in made
