"""Keep the Chinese pages in nbs/zh/ and README.zh.md beside the English ones.

    python tools/make_zh.py                        # copy code and outputs again, list what has to be translated; exit 1 when there is any
    python tools/make_zh.py --take FILE.json PAGE  # take translations, {cell id: markdown}, of 03_nf4, say, or of README

A Chinese page has the cells of its English page under the same ids. Code and outputs are copies, without what exports a module.
Wrong answers of exercises are left out.
Prose is a translation, and the metadata of its cell keep a hash of each English paragraph: where that has another hash now,
the translation is stale. What tools/make_course.py writes is translated by rule, but for its lists.
README.zh.md is the translation of README.md, one cell as it were, with its hashes in a comment at the end.
"""
import argparse, hashlib, json, os, re, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = dict(Foundations="基础", Training="训练", Memory="内存", Using="使用", Evaluation="评估", Beyond="进阶", Speed="速度")
KINDS = {"Code": "编程", "Predict": "预测", "Find the bug": "找错"}
WRONG = re.compile(r"ex-.+-wrong$")                         # ids of cells with wrong answers, which only test the checks
EXPORTS = re.compile(r"^#\|\s*exports?\b.*\n?", re.M)
LINK = re.compile(r"\]\((?!https?:|mailto:|#|/|attachment:)([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"^(!\[[^]]*\])(\(\S+\))$")              # its address, which a fork changes, is copied
HASHES = re.compile(r"\n<!-- source_hashes:(.*?)-->\n", re.S)


def paragraphs(text):
    "What stands between blank lines; a fence is one. Exercises without a check are left out: they are being replaced."
    out, fence = [[]], False
    for line in text.splitlines():
        if line.startswith("```"): fence = not fence
        if line.strip() or fence: out[-1].append(line)
        else: out.append([])
    return [p for p in map("\n".join, filter(None, out)) if not p.startswith("**Exercise.**")]


def digest(p): return hashlib.sha256(IMAGE.sub(r"\1", p).encode()).hexdigest()[:12]
def text_of(cell): return "".join(cell["source"])
def read(path): return json.loads(path.read_text(encoding="utf-8"))
def relative(path, folder): return Path(os.path.relpath(path, folder)).as_posix()
def is_code(p): return p.startswith("```") or all(o.startswith("    ") for o in p.splitlines())


def headings(path):
    "A notebook's headings, as links name them."
    cells = [c for c in read(path)["cells"] if c["cell_type"] == "markdown"]
    return ["#" + o.replace(" ", "-") for c in cells for o in re.findall(r"^#+ (.+)$", text_of(c), re.M)]


class Chinese:
    "The Chinese side of the course whose files are under `root`."
    def __init__(self, root=ROOT): self.root, self.folder = root, root/"nbs"/"zh"
    def pages(self): return sorted(o.stem for o in self.folder.glob("*.ipynb"))
    def english(self, name): return next(o for o in (self.root/"nbs").glob(f"*/{name}.ipynb") if o.parent != self.folder)

    def relink(self, text, here, there):
        "Links of folder `here` as they are from `there`; to the Chinese page where there is one."
        def to(m):
            target, place = Path(os.path.normpath(here/m[1])), m[2] or ""
            if target == self.root/"nbs"/"index.ipynb": target, place = self.root/"README.zh.md", "#课程"
            elif target.suffix == ".ipynb" and (self.folder/target.name).exists():
                target = self.folder/target.name
                place = dict(zip(headings(self.english(target.stem)), headings(target))).get(place, place)
            return f"]({relative(target, there)}{place})"
        return LINK.sub(to, text)

    def head(self, link):
        "Title and subtitle of the page behind a link: in Chinese where it is translated, or opens a part."
        name = Path(link).stem
        path = self.folder/f"{name}.ipynb"
        title, subtitle = re.match(r"# (.+)\n\n> (.+)", text_of(read(path if path.exists() else self.english(name))["cells"][0])).groups()
        if part := re.fullmatch(r"Part (\d): (.+)", title): title = f"第 {part[1]} 部分：{PARTS[part[2]]}"
        return (title, subtitle) if path.exists() else (f"{title}（英文）", "")

    def by_rule(self, p, name):
        "The Chinese of a paragraph that a tool wrote in English, its links already turned; None for any other."
        if p.startswith("[![Open in Colab]"): return re.sub(r"/student/\w+/(\w+\.ipynb)", r"/student/zh/\1", p)
        if p == "After this page you can": return "学完本页，你能够"
        if p == "## Exercises": return "## 练习"
        if p == "Run the next cell first. The exercises need nothing else from this page, and each stands alone.":
            return "先运行下一个单元格。练习不需要本页的其他代码，各题也互不依赖。"
        if (m := re.fullmatch(r"\*(.+) · (★+) · (\d+) minutes\*", p)) and m[1] in KINDS: return f"*{KINDS[m[1]]} · {m[2]} · {m[3]} 分钟*"
        if m := re.fullmatch(r"## What to remember of part (\d)", p): return f"## 第 {m[1]} 部分要点"
        if m := re.match(r"\*\*Next:\*\* \[.+?\]\((.+?)\)", p): return "**下一页**：[{}]({link})。{}".format(*self.head(m[1]), link=m[1])
        if m := re.match(r"\*\*Part (\d), (\w+)\*\* · ", p):
            ways = re.sub(r" · \[中文\]\(.+?\)", "", p[m.end():]).replace("[all parts]", "[全部内容]")
            ways = re.sub(r"\[← .+?\]\((.+?)\)", lambda o: f"[← {self.head(o[1])[0]}]({o[1]})", ways)
            ways = re.sub(r"\[[^]]+ →\]\((.+?)\)", lambda o: f"[{self.head(o[1])[0]} →]({o[1]})", ways)
            note = "本页译自英文页：代码和输出相同，导出模块的标记（`#| export`、`#| exports`）只在英文页里；练习的检查给出的提示仍是英文。"
            return f"**第 {m[1]} 部分，{PARTS[m[2]]}** · {ways} · [English]({relative(self.english(name), self.folder)})  \n{note}"
        if p.startswith(("**Know first:**", "**Reading:**")):
            p = re.sub(r"\*\*Know first:\*\* (.+?)\. (?=\*\*)", lambda o: f"**预备知识**：{o[1].replace('nothing else', '无').replace(', ', '、')}。", p)
            p = re.sub(r"\*\*Reading:\*\* about (\d+) minutes\. ?", r"**阅读**：约 \1 分钟。", p)
            p = re.sub(r"\*\*Exercises:\*\* (\d+), about (\d+) minutes\. ?", r"**练习**：\1 道，约 \2 分钟。", p)
            cores = r", of computing on two cores without a GPU(?:, and ([\d.]+) GB of memory)?\."
            p = re.sub(cores, lambda o: "（两个 CPU 核的计算时间，不用 GPU）" + (f"，内存最多 {o[1]} GB" if o[1] else "") + "。", p)
            p = re.sub(r"([\d.]+) (s|min) on ([\w-]+)", lambda o: f"在 {o[3]} 上 {o[1]} {dict(s='秒', min='分钟')[o[2]]}", p).replace(" and ", "，")
            return p.replace("**Running:** ", "**运行**：")

    def readme_rule(self, p, name):
        if p.startswith("<!-- Made from"): return "<!-- 译自 README.md；代码由 tools/make_zh.py 照抄。 -->"
        return p if is_code(p) or p.startswith("[![Open in Colab]") else None

    def renewed(self, english, old, hashes, rule, name, here, there):
        "(text, hashes, problems): what still belongs to its English paragraph is kept, the rest is named."
        source, had = paragraphs(english), paragraphs(old)
        known, text, kept, problems = dict(zip(hashes, had)), [], [], []
        for i, p in enumerate(source):
            h, made = digest(p), rule(self.relink(p, here, there), name)
            if made is None and h not in known:
                stale = len(hashes) == len(had) == len(source) and hashes[i] != "-"
                problems.append(f"{'stale' if stale else 'missing'}: {p.splitlines()[0][:60]!r}")
                made, h = (had[i], hashes[i]) if stale else (p, "-")
            made = made or self.relink(known[h], there, there)
            text.append(IMAGE.sub(r"\1", made) + image[2] if (image := IMAGE.match(p)) else made)
            kept.append(h)
        return "\n\n".join(text), kept, problems

    def taken(self, english, text, rule, name, here, there):
        "(text, hashes) of a fresh translation of all paragraphs, or of all that no rule translates."
        source, new = paragraphs(english), paragraphs(self.relink(text, here, there))
        if len(new) < len(source): source = [p for p in source if rule(self.relink(p, here, there), name) is None]
        if len(new) != len(source): raise ValueError(f"{len(source)} paragraphs are {len(new)} in the translation: {english[:60]!r}")
        return "\n\n".join(new), [digest(p) for p in source]

    def page(self, name, take={}):
        "(notebook, problems) of a Chinese page as it should be."
        source, path = self.english(name), self.folder/f"{name}.ipynb"
        nb, old = read(source), {c["id"]: c for c in read(path)["cells"]} if path.exists() else {}
        cells, problems, there = [], [], (self.by_rule, name, source.parent, self.folder)
        if unknown := take.keys() - {c["id"] for c in nb["cells"]}: raise ValueError(f"{name} has no cells {sorted(unknown)}")
        for c in nb["cells"]:
            text = text_of(c)
            if WRONG.match(c["id"]) or c["cell_type"] == "code" and "#| default_exp" in text: continue
            if c["cell_type"] == "code": text = EXPORTS.sub("", text)
            if c["cell_type"] == "markdown":
                was = old.get(c["id"], dict(source=[], metadata={}))
                have = self.taken(text, take[c["id"]], *there) if c["id"] in take else (text_of(was), was["metadata"].get("source_hashes", []))
                text, hashes, found = self.renewed(text, *have, *there)
                problems += [f"{name}: {c['id']}: {o}" for o in found]
                c["metadata"] = c["metadata"] | dict(source_hashes=hashes)
            if text.strip(): cells.append(c | dict(source=text.splitlines(True)))
        return json.dumps(nb | dict(cells=cells), indent=1, ensure_ascii=False) + "\n", problems

    def readme(self, take={}):
        "(text, problems) of README.zh.md as it should be."
        english, path = (self.root/"README.md").read_text(encoding="utf-8"), self.root/"README.zh.md"
        old, there = path.read_text(encoding="utf-8") if path.exists() else "", (self.readme_rule, "README", self.root, self.root)
        had = HASHES.search(old)
        have = HASHES.sub("", old), had[1].split() if had else []
        if take: have = self.taken(english, take["README"], *there)
        text, hashes, found = self.renewed(english, *have, *there)
        return f"{text}\n\n<!-- source_hashes:\n{chr(10).join(hashes)}\n-->\n", [f"README: {o}" for o in found]

    def made(self, name=None, take={}):
        "{path: text} of all Chinese files as they should be, and the problems. `take` are translations of `name`."
        files, problems = {}, []
        for o in [*sorted({*self.pages(), name} - {None, "README"}), "README"]:
            path = self.root/"README.zh.md" if o == "README" else self.folder/f"{o}.ipynb"
            new = take if o == name else {}
            files[path], found = self.readme(new) if o == "README" else self.page(o, new)
            problems += found
        return files, problems


def write(files):
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--take", nargs=2, metavar=("FILE", "PAGE"), help="a JSON file of translations, and whose they are")
    take = p.parse_args().take
    chinese = Chinese()
    if take: write(chinese.made(take[1], read(Path(take[0])))[0])
    files, problems = chinese.made()                        # again: links and titles of other pages know the new one now
    write(files)
    if problems: sys.exit("\n".join(problems))


if __name__ == "__main__": main()
