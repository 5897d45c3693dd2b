"""What a class has understood: how many passed each exercise, and which mistake stopped the others."""
import html
from collections import Counter
from pathlib import Path
from .gradebook import full_name, harmless, most_of, person, points_of

# %%
def exercise_rows(grades) -> list:
    "For each exercise: page, title, points, how many answered, how many passed, what stopped the rest."
    rows = []
    for page, exercises in grades.pages.items():
        for ex in exercises:
            mine = [o for o in grades.results if (o.page, o.slug) == (page, ex.slug)]
            failed = [o for o in mine if o.message and o.message != "It is not answered."]
            why = Counter(o.misconception or o.message for o in failed).most_common(3)
            answered = len(failed) + sum(o.message is None for o in mine)
            rows.append([page, ex.title, f"{ex.points:g}", f"{answered} of {len(mine)}",
                         f"{answered - len(failed)}", "; ".join(f"{n} × {o}" for o, n in why)])
    return rows

# %%
def student_rows(grades, roster) -> list:
    "For each student and page: points, and the first message of each exercise that failed."
    sums, most, rows = points_of(grades), most_of(grades), []
    for student in sorted({*sums, *roster}):
        for page in most:
            points = sums.get(student, {}).get(page)
            said = [f"{o.slug}: {o.message}" for o in grades.results
                    if (o.student, o.page) == (student, page) and o.message]
            rows.append([full_name(person(student, roster)), page,
                         f"{points[0]:g} of {most[page]:g}" if points else "not handed in",
                         "; ".join(said)])
    return rows

# %%
def tables(grades, roster:dict={}, folder=None) -> list:  # Of (heading, columns, rows)
    "The three tables of a report."
    def place(path):
        try: return str(Path(path).relative_to(Path(folder).expanduser()))
        except (TypeError, ValueError): return str(path)
    return [("Exercises", ["page", "exercise", "points", "answered", "passed", "what stopped the others"],
             exercise_rows(grades)),
            ("Students", ["student", "page", "points", "what failed"], student_rows(grades, roster)),
            ("Files that need a look", ["file", "why"], [[place(o), why] for o, why in grades.problems])]

# %%
def one_line(text) -> str:
    "Text of others as one line without letters that are not shown."
    text = "".join(o if o.isprintable() else " " for o in str(text))
    return text.encode("utf-8", "replace").decode()

def in_markdown(text) -> str:
    "Text of others inside a Markdown table: nothing in it is a link, HTML or a new column."
    text = html.escape(one_line(text), quote=False)
    return "".join(f"\\{o}" if o in "\\`*_[]|#!" else o for o in text)

def report_markdown(grades, roster:dict={}, folder=None) -> str:
    "The report as Markdown."
    out = ["# Class report"]
    for heading, columns, rows in tables(grades, roster, folder):
        if not rows: continue
        out += ["", f"## {heading}", "", f"| {' | '.join(columns)} |", "|---"*len(columns) + "|"]
        out += [f"| {' | '.join(map(in_markdown, row))} |" for row in rows]
    return "\n".join(out) + "\n"

# %%
STYLE = """<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;
max-width:70em;padding:0 1em}table{border-collapse:collapse;width:100%}
th,td{border-bottom:1px solid #8886;padding:.3em .6em;text-align:left;vertical-align:top}</style>"""

def report_html(grades, roster:dict={}, folder=None) -> str:
    "The report as one HTML file that loads nothing."
    def row(cells, kind): return "<tr>" + "".join(f"<{kind}>{html.escape(one_line(o))}</{kind[:2]}>"
                                                  for o in cells) + "</tr>"
    out = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>Class report</title>'
           '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
           'style-src \'unsafe-inline\'">', STYLE, "<h1>Class report</h1>"]
    for heading, columns, rows in tables(grades, roster, folder):
        if not rows: continue
        head = row(columns, 'th scope="col"')
        body = "".join(row(o, "td") for o in rows)
        out.append(f"<h2>{heading}</h2><table><thead>{head}</thead><tbody>{body}</tbody></table>")
    return "\n".join(out) + "</html>\n"
