"""Write what nbs/course.toml says about the course into its pages: where each stands, what to know first, the next one.
Cells that are plumbing are collapsed, the install cell of the first page is that of all, and pages with cells for a GPU open on one.

    python tools/make_course.py          # write it, after a change of course.toml, of a title or of a page's length
    python tools/make_course.py --check  # say which pages are not up to date; exit 1 when there are any
"""
import argparse, ast, json, os, re, sys, tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from qlora_nb.classroom.exercises import HEAD

NBS = ROOT/"nbs"
TOP, END, TABLE, MAP = "course-top", "course-end", "course-table", "course-map"   # the cells that this tool writes
QUIZ = "quiz"                                                  # the heading of the questions about a part


def course(path=NBS/"course.toml"):
    "The parts of the course, each page with its folder, its title and subtitle, and its minutes of reading."
    parts = tomllib.loads(path.read_text(encoding="utf-8"))["part"]
    for part in parts:
        for p in part["page"]: p |= dict(part=part, path=f"{part['folder']}/{p['name']}.ipynb", **look_at(NBS/part["folder"]/f"{p['name']}.ipynb"))
    return parts


def text_of(cell): return "".join(cell["source"])


def look_at(path):
    """Title, subtitle, reading time: 200 words a minute, and four seconds a line of code that is not hidden.
    Exercises are counted apart, with the minutes that their headings state."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c.get("id") not in (TOP, END, TABLE, MAP)]
    exercises = [int(m[5]) for c in cells if (m := HEAD.match(text_of(c)))]
    cells = [c for c in cells if not re.match(r"exercises$|exercise-setup$|ex-", c.get("id", ""))]
    head = text_of(cells[0])
    prose = [text_of(c) for c in cells if c["cell_type"] == "markdown"]
    code = [text_of(c) for c in cells if c["cell_type"] == "code" and not re.search(r"^#\|\s*(hide|eval: false)\b", text_of(c), re.M)]
    minutes = sum(len(o.split()) for o in prose)/200 + sum(len(o.splitlines()) for o in code)*4/60
    return dict(title=re.search(r"^# (.+)$", head, re.M)[1], subtitle=re.search(r"^> (.+)$", head, re.M)[1], minutes=max(5, 5*round(minutes/5)), exercises=exercises)


def link(page, here, words=None): return f"[{words or page['name']}]({os.path.relpath(page['path'], Path(here).parent).replace(os.sep, '/')})"


def seconds(page, table):
    "What the page took where it was measured, in words."
    found = {kind: rows["pages"][page["name"]][0] for kind, rows in sorted(table.items()) if page["name"] in rows["pages"]}
    def said(s): return f"{max(5, 5*round(s/5))} s" if s < 60 else f"{round(s/30)/2:g} min"
    return " and ".join(f"{said(s)} on {kind}" for kind, s in found.items())


def memory(page, table):
    "What the page's kernel had in memory at its highest, where that was measured; the largest, where on several processors."
    found = [m for rows in table.values() if (m := rows.get("memory", {}).get(page["name"]))]
    return f", and {max(found):g} GB of memory" if found else ""


def top(page, before, after, pages, table):
    "The cell below a page's title."
    here, part = page["path"], page["part"]
    index = os.path.relpath("index.ipynb", Path(here).parent).replace(os.sep, "/")
    lesson = part["folder"][0].isdigit()
    ways = [link(before, here, f"← {before['title']}")] if before else []
    ways += [f"[all parts]({index}#The-course)"] + ([link(after, here, f"{after['title']} →")] if after else [])
    number = f"Part {part['folder'][0]}, {part['title']}" if lesson else f"{part['title']}, no lesson"
    if (NBS/"zh"/f"{page['name']}.ipynb").exists(): ways.append(f"[中文](../zh/{page['name']}.ipynb)")
    lines = [f"**{number}** · " + " · ".join(ways)]
    if is_start(page): return "\n\n".join([*lines, *start_of(page, pages)])
    if page.get("can"): lines += ["After this page you can", "\n".join(f"- {o}" for o in page["can"])]
    first = ", ".join(link(pages[o], here) for o in page["first"])
    facts = [f"**Know first:** {first or 'nothing else'}." if lesson or first else "", f"**Reading:** about {page['minutes']} minutes."]
    if todo := page["exercises"]: facts.append(f"**Exercises:** {len(todo)}, about {sum(todo)} minutes.")
    took = seconds(page, table)
    if took: facts.append(f"**Running:** {took}, of computing on two cores without a GPU{memory(page, table)}.")
    return "\n\n".join([*lines, " ".join(filter(None, facts))])


def start_of(page, pages):
    "Of a part: what a reader can do afterwards, what its pages build on elsewhere, how long they take, and where it is summed up."
    here, part = page["path"], page["part"]
    lessons = [p for p in part["page"] if not is_start(p)]
    first = dict.fromkeys(o for p in lessons for o in p["first"] if pages[o]["part"] is not part and pages[o]["path"][0].isdigit())
    todo = [o for p in lessons for o in p["exercises"]]
    facts = [f"**Know first:** {', '.join(link(pages[o], here) for o in sorted(first)) or 'nothing else'}.",
             f"**Reading:** {len(lessons)} pages, about {sum(p['minutes'] for p in lessons)/60:.0f} hours.",
             f"**Exercises:** {len(todo)}, about {sum(todo)/60:.0f} hours."]
    end = f"What to remember of this part stands at the end of {link(lessons[-1], here)}."
    return [f"After this part you can {part['can']}.", " ".join(facts), end]


def end(page, after):
    "The cell below everything else: what to remember of a part at its end, and the way on."
    part, last = page["part"], page is page["part"]["page"][-1]
    lines = []
    if last and part.get("remember"):
        lines += [f"## What to remember of part {part['folder'][0]}", "\n".join(f"- {o}" for o in part["remember"])]
    if after: lines.append(f"**Next:** {link(after, page['path'], after['title'])}. {after['subtitle']}")
    return "\n\n".join(lines)


CAPTION = """*The pages of this part in their order. An arrow leads to a page from one that it builds on; blue pages need none of this part,
and at the right stands what to know from elsewhere.*""".replace("\n", " ")


def map_pages(part):
    "{page: what to know first} as `part_map` takes it."
    def short(name): return name[:2] if name[0].isdigit() else name
    return {f"{short(p['name'])} {p['title'].replace('`', '')}": " ".join(map(short, p["first"])) for p in part["page"] if not is_start(p)}


def map_of(part):
    "The cell that draws a part's map. It holds the pages itself, since a reader on Colab has no course.toml."
    rows = map_pages(part)
    lines = [f"    {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}," for k, v in rows.items()]
    head = ["#| code-fold: true", "from qlora_nb.base.core import show_figure", "from qlora_nb.base.diagrams import part_map", "pages = {"]
    return "\n".join([*head, *lines, "}", "show_figure(fig := part_map(pages), fig.get_label())"])


def drawn(source):
    "The output of such a cell."
    from qlora_nb.base.core import figure_data
    from qlora_nb.base.diagrams import part_map
    fig = part_map(ast.literal_eval(re.search(r"pages = (\{.+\})", source, re.S)[1]))
    data, metadata = figure_data(fig, fig.get_label())
    data["text/plain"] = [data["text/plain"]]
    return dict(data=dict(sorted(data.items())), metadata=metadata, output_type="display_data")


def put_map(nb, source):
    "The cell with the map stands above the table; it is drawn again when the course has changed, and not otherwise."
    cells, place = nb["cells"], next(i for i, c in enumerate(nb["cells"]) if c.get("id") == TABLE)
    old = next((c for c in cells if c.get("id") == MAP), None)
    if old and text_of(old) == source and old["outputs"]: return
    new = dict(cell_type="code", execution_count=None, id=MAP, metadata={}, outputs=[drawn(source)], source=source.splitlines(True))
    if old: cells[cells.index(old)] = new
    else: cells.insert(place, new)


def pages_of(part, here):
    "The table of a part's pages."
    rows = [f"| {link(p, here)} | {p['title']} | {p['builds']} | {p['against']} | {p['minutes']} |" for p in part["page"] if not is_start(p)]
    return "\n".join([CAPTION, "", "| page | title | what it builds | proven against | minutes |", "|---|---|---|---|---|", *rows])


def is_start(page): return page["name"].endswith("_start")


def parts_table(parts):
    "The table of the index: the parts, and for each what a reader can do afterwards."
    rows = []
    for part in parts:
        if not part["folder"][0].isdigit(): continue
        first, lessons = part["page"][0], [p for p in part["page"] if not is_start(p)]
        hours = sum(p["minutes"] for p in lessons)/60
        todo = [o for p in lessons for o in p["exercises"]]
        rows.append(f"| {part['folder'][0]} | {link(first, 'index.ipynb', part['title'])} | {part['can']} | {len(lessons)} | {hours:.0f} h "
                    f"| {len(todo)}, {sum(todo)/60:.0f} h |")
    others = []
    for part in parts:   # many pages that nobody reads one after the other: a click opens their list
        if part["folder"][0].isdigit(): continue
        told = f"<b>{part['title']}</b> ({part['folder']}/), to {part['can']}: {len(part['page'])} pages"
        listed = ", ".join(link(p, "index.ipynb", p["title"]) for p in part["page"]) + "."
        others += [f"<details><summary>{told}</summary>", listed, "</details>"]
    return "\n".join(["| part | title | afterwards you can | pages | reading | exercises |", "|---|---|---|---|---|---|", *rows]) + "\n\n" + "\n\n".join(others)


def put(nb, key, text, place):
    "The notebook's cell `key` says `text` and stands at `place`; an empty text takes it away."
    cells = nb["cells"] = [c for c in nb["cells"] if c.get("id") != key]
    if text: cells.insert(place, dict(cell_type="markdown", id=key, metadata={}, source=text.splitlines(True)))


def before_quiz(nb):
    "Where the table of a part's pages stands: before the questions about them, if there are some."
    ids = [c.get("id") for c in nb["cells"] if c.get("id") != TABLE]
    return ids.index(QUIZ) if QUIZ in ids else len(ids)


PLUMBING = re.compile(r"^#\|\s*(hide|code-fold|default_exp|echo: false|eval: false)\b", re.M)


def is_plumbing(source):
    "A cell that a lesson can be read without: set-up, hidden checks, code behind a table, and imports alone."
    lines = [o for o in source.splitlines() if o.strip() and not o.startswith("#")]
    return bool(PLUMBING.search(source)) or bool(lines) and all(re.match(r"(from|import) |[\s(]", o) for o in lines)


def fold(nb):
    "Collapse the plumbing in JupyterLab and on Colab, and nothing else; a click opens it."
    for c in nb["cells"]:
        if c["cell_type"] != "code": continue
        meta = {k: v for k, v in c["metadata"].items() if k not in ("jupyter", "cellView")}
        if is_plumbing(text_of(c)): meta |= dict(jupyter=dict(source_hidden=True), cellView="form")
        c["metadata"] = dict(sorted(meta.items()))


def is_install(cell): return cell["cell_type"] == "code" and text_of(cell).startswith("#| eval: false") and "%pip install" in text_of(cell)


def install(nb, first):
    "Every page installs what the first one does."
    for c in filter(is_install, nb["cells"]): c["source"] = next(filter(is_install, first["cells"]))["source"]


def accelerate(nb):
    "Colab gives a GPU to a page with cells that need one, and to no other."
    meta = {k: v for k, v in nb["metadata"].items() if k not in ("accelerator", "colab")}
    needs = any(c["cell_type"] == "code" and re.search(r"^#\|\s*cuda\b", text_of(c), re.M) for c in nb["cells"])
    nb["metadata"] = dict(sorted((meta | (dict(accelerator="GPU", colab=dict(gpuType="T4")) if needs else {})).items()))


def written(parts, table):
    "{path: text} of every notebook as course.toml wants it."
    pages = {p["name"]: p for part in parts for p in part["page"]}
    lessons = [p for p in pages.values() if p["part"]["folder"][0].isdigit()]
    out = {}
    for p in pages.values():
        i = lessons.index(p) if p in lessons else None
        before, after = (lessons[i-1] if i else None, lessons[i+1] if i is not None and i + 1 < len(lessons) else None)
        nb = json.loads((NBS/p["path"]).read_text(encoding="utf-8"))
        put(nb, TOP, top(p, before, after, pages, table), 1)
        if is_start(p):
            put(nb, TABLE, pages_of(p["part"], p["path"]), before_quiz(nb))
            put_map(nb, map_of(p["part"]))
        put(nb, END, end(p, after), len(nb["cells"]))
        out[NBS/p["path"]] = nb
    index = json.loads((NBS/"index.ipynb").read_text(encoding="utf-8"))
    heading = next(i for i, c in enumerate(index["cells"]) if text_of(c).startswith("## The course"))
    put(index, TABLE, parts_table(parts), heading + 1)
    out[NBS/"index.ipynb"] = index
    first = next(iter(out.values()))
    for nb in out.values(): fold(nb), install(nb, first), accelerate(nb)
    return {p: json.dumps(nb, indent=1, ensure_ascii=False) + "\n" for p, nb in out.items()}


def stale():
    "{path: text} of the notebooks that differ from what they should say."
    table = json.loads((ROOT/"tests"/"durations.json").read_text(encoding="utf-8"))
    return {p: new for p, new in written(course(), table).items() if p.read_text(encoding="utf-8") != new}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="compare only")
    check, found = p.parse_args().check, stale()
    if check and found: sys.exit(f"run tools/make_course.py: {', '.join(o.stem for o in found)}")
    for path, new in found.items(): path.write_text(new, encoding="utf-8", newline="\n")


if __name__ == "__main__": main()
