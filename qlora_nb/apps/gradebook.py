"""Points as CSV files that nbgrader's readers, Canvas and Moodle take, with no cell that a spreadsheet would run."""
import csv, io
from pathlib import Path
from ..base.errors import QLoRAError

# %%
def harmless(cell):
    "Text that no spreadsheet takes for a formula; numbers stay as they are."
    if not isinstance(cell, str): return cell
    cell = "".join(o if o.isprintable() else " " for o in cell)
    cell = cell.encode("utf-8", "replace").decode()
    return f"'{cell}" if cell.lstrip()[:1] in tuple("=+-@＝＋－＠") else cell

def to_csv(rows:list) -> str:
    "Rows as CSV, every text made harmless."
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[harmless(o) for o in row] for row in rows])
    return out.getvalue()

# %%
COLUMNS = "student_id last_name first_name email canvas_id sis_user_id section".split()

def read_roster(path:str|Path|None) -> dict:  # {student_id: {column: text}}
    "Who is in the class: a CSV with a column `student_id`, and those of `COLUMNS` that are there."
    if path is None: return {}
    try: text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise QLoRAError(f"the roster cannot be read ({e}).", str(path), "Save it as CSV in UTF-8.")
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or "student_id" not in rows[0]:
        raise QLoRAError("the roster has no column 'student_id'.", str(path),
                         f"Its first line names the columns, such as {','.join(COLUMNS)}.")
    return {o["student_id"]: {k: (o.get(k) or "").strip() for k in COLUMNS} for o in rows}

def person(student, roster) -> dict:
    "What the roster says of a student, or nothing but the id."
    return roster.get(student) or dict.fromkeys(COLUMNS, "") | dict(student_id=student)

def full_name(who) -> str:
    return " ".join(o for o in (who["first_name"], who["last_name"]) if o) or who["student_id"]

# %%
def points_of(grades) -> dict:  # {student: {page: (points, when)}}
    "The sum of each student's points on each page that was handed in."
    sums = {}
    for o in grades.results:
        points, _ = sums.setdefault(o.student, {}).get(o.page, (0, None))
        sums[o.student][o.page] = points + o.points, o.when
    return sums

def most_of(grades) -> dict: return {k: sum(o.points for o in v) for k, v in grades.pages.items()}

def class_of(grades, roster) -> list: return sorted({*points_of(grades), *roster})

# %%
NBGRADER = ("assignment duedate timestamp student_id last_name first_name email raw_score "
            "late_submission_penalty score max_score").split()

def nbgrader_csv(grades, roster:dict={}) -> str:
    "As `nbgrader export` writes it: a row for each page and student, 0 for what is missing."
    sums, rows = points_of(grades), [NBGRADER]
    for page, most in most_of(grades).items():
        for student in class_of(grades, roster):
            who, (points, when) = person(student, roster), sums.get(student, {}).get(page, (0, ""))
            rows.append([page, "", str(when), student, who["last_name"], who["first_name"],
                         who["email"], float(points), 0., float(points), float(most)])
    return to_csv(rows)

# %%
def canvas_csv(grades, roster:dict={}) -> str:
    "As Canvas imports it: five columns that say who, a row of possible points, one column a page."
    sums, most = points_of(grades), most_of(grades)
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *most],
            ["    Points Possible", "", "", "", "", *most.values()]]
    for student in class_of(grades, roster):
        who = person(student, roster)
        name = ", ".join(o for o in (who["last_name"], who["first_name"]) if o) or student
        rows.append([name, who["canvas_id"], who["sis_user_id"], student, who["section"],
                     *(sums.get(student, {}).get(page, ("",))[0] for page in most)])
    return to_csv(rows)

# %%
def moodle_csv(grades, roster:dict={}) -> str:
    "As Moodle imports it: a column to know the student by, one column a page."
    sums, most = points_of(grades), most_of(grades)
    rows = [["Username", "First name", "Last name", "Email address", *most]]
    for student in class_of(grades, roster):
        who = person(student, roster)
        rows.append([student, who["first_name"], who["last_name"], who["email"],
                     *(sums.get(student, {}).get(page, ("",))[0] for page in most)])
    return to_csv(rows)

# %%
def write_gradebooks(grades, out:Path, roster:dict={}):
    "The three files, in a folder that is there."
    for name, make in dict(nbgrader=nbgrader_csv, canvas=canvas_csv, moodle=moodle_csv).items():
        (Path(out)/f"{name}.csv").write_text(make(grades, roster), encoding="utf-8")
