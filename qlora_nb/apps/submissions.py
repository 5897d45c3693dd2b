"""Notebooks that students hand in, read without trust: whatever a file is, it costs one line of the report."""
import json, os, re, stat
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from ..base.errors import QLoRAError
from .sandbox import defined

# %%
MOST_FILE, MOST_ANSWER = 20 << 20, 200_000   # bytes, letters

class Unreadable(Exception): "Why a file cannot be graded, in a few words."

def plain_file(path) -> bytes:
    "The bytes of a regular file of a sane size. It follows no link and waits for no pipe."
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as f:
        info = os.fstat(f.fileno())
        if not stat.S_ISREG(info.st_mode): raise Unreadable("is no regular file")
        if info.st_size > MOST_FILE: raise Unreadable(f"is larger than {MOST_FILE >> 20} MiB")
        return f.read(MOST_FILE + 1)

# %%
def code_of(cell) -> str|None:
    "The code of a cell, where it is one."
    if not isinstance(cell, dict) or cell.get("cell_type") != "code": return None
    source = cell.get("source")
    if isinstance(source, list): source = "".join(o for o in source if isinstance(o, str))
    return source if isinstance(source, str) else None

def mark_of(cell, *names):
    "A value inside the metadata of a cell, as far as there is one."
    for o in names: cell = cell.get(o) if isinstance(cell, dict) else None
    return cell if isinstance(cell, str) else None

def read_cells(path) -> list:  # Of (id, grade id, code)
    "The code cells of a notebook. Raises `Unreadable`."
    try: nb = json.loads(plain_file(path).decode("utf-8-sig"))
    except OSError as e:
        raise Unreadable("is a link" if os.path.islink(path) else f"cannot be read ({e.strerror})")
    except UnicodeDecodeError: raise Unreadable("is not text in UTF-8")
    except (ValueError, RecursionError): raise Unreadable("is no notebook")
    if not isinstance(nb, dict) or not isinstance(cells := nb.get("cells"), list):
        raise Unreadable("is no notebook of format 4")
    return [(mark_of(c, "id"), mark_of(c, "metadata", "nbgrader", "grade_id"), code)
            for c in cells if (code := code_of(c)) is not None]

# %%
def names_in(code) -> set:
    "What a cell defines; nothing where it is no Python."
    try: return {*defined(code)[0]}
    except (SyntaxError, ValueError, RecursionError, MemoryError): return set()

def find_answer(cells:list, ex) -> str|None:  # `ex`: an `Exercise`
    "The code that answers an exercise: by grade id, by cell id, or by what it defines."
    found = [code for i, grade, code in cells if grade == ex.slug or i == f"ex-{ex.slug}-answer"]
    if not found:
        wanted = names_in(ex.solution)
        found = [code for *_, code in cells if len(code) <= MOST_ANSWER and wanted
                 and wanted <= names_in(code) and "assert" not in code]
    changed = [o for o in found if o.strip() and o.strip() != ex.stub.strip()]
    if not changed: return None
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", changed[-1], flags=re.M)   # magics

# %%
@dataclass
class Submission:
    "A notebook that can be graded."
    student:str
    page:str
    path:Path
    when:datetime
    answers:dict   # {slug: code or None}

# %%
def listed(folder:Path) -> tuple:  # Of [(student, path)], [(path, why not)]
    "What lies in FOLDER/<student>/<page>.ipynb and in FOLDER/<student>.ipynb."
    files, problems = [], []
    def look(path, student, depth):
        if path.name.startswith("."): return
        if path.is_symlink(): problems.append((path, "is a link"))
        elif path.is_dir() and depth == 0:
            try: inside = sorted(path.iterdir())
            except OSError as e: return problems.append((path, f"cannot be read ({e.strerror})"))
            if not inside: problems.append((path, "is empty"))
            for o in inside: look(o, path.name, 1)
        elif path.is_dir(): problems.append((path, "is a folder inside a student's folder"))
        elif path.suffix == ".ipynb": files.append((student or path.stem, path))
        else: problems.append((path, "is no notebook"))
    try: inside = sorted(folder.iterdir())
    except OSError as e: raise QLoRAError(f"the folder cannot be read ({e.strerror}).", str(folder))
    for o in inside: look(o, None, 0)
    return files, problems

# %%
def page_for(path:Path, cells:list, pages:dict) -> str|None:  # {name: exercises}
    "The page that a notebook is of: by its name, or by most of its exercises."
    if path.stem in pages: return path.stem
    marks = {o for c in cells for o in c[:2] if o}
    def shared(name): return sum(o.slug in marks or f"ex-{o.slug}-answer" in marks for o in pages[name])
    best = max(pages, key=shared, default=None)
    return best if best and shared(best) else None

def read_submissions(folder:str|Path,
                     pages:dict       # {name: list of `Exercise`}
                    ) -> tuple:       # [Submission], [(path, why)]
    "All that can be graded in a folder, and a line for each thing that cannot."
    files, problems = listed(Path(folder).expanduser())
    found = {}
    for student, path in files:
        try:
            cells = read_cells(path)
            page = page_for(path, cells, pages)
            if page is None: raise Unreadable("holds no exercise of the course")
            if any(len(code) > MOST_ANSWER for *_, code in cells): raise Unreadable(
                f"has a cell of more than {MOST_ANSWER:,} letters")
        except Unreadable as e: problems.append((path, str(e))); continue
        when = datetime.fromtimestamp(path.lstat().st_mtime)
        one = Submission(student, page, path, when, {o.slug: find_answer(cells, o) for o in pages[page]})
        other = found.get((student, page))
        if other:
            first, second = sorted((one, other), key=lambda o: (o.path.stem == page, o.when))
            problems.append((first.path, f"is not graded: {second.path.name} is there too"))
            one = second
        elif path.stem != page and path.parent != Path(folder):
            problems.append((path, f"is graded as {page}, whose exercises it holds"))
        found[student, page] = one
    return [*found.values()], problems
