"""Grade a class and check a certificate from a terminal."""
import argparse
from pathlib import Path
from .cli import one_line_errors

# %%
def grade_parser() -> argparse.ArgumentParser:
    "The options of `qlora_course grade`."
    p = argparse.ArgumentParser(
        "qlora_course grade", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Grade submissions offline. Each answer runs in a process that sees no network "
                    "and few files; its check runs in another.")
    add = p.add_argument
    add("folder", help="with STUDENT/PAGE.ipynb or STUDENT.ipynb")
    add("--source", default="nbs", help="the notebooks with solutions: a folder, or one of them")
    add("--out", required=True, help="a new folder for the grades, the report and the certificates")
    add("--roster", default=None, help="a CSV with student_id, and perhaps last_name, first_name, "
        "email, canvas_id, sis_user_id, section")
    add("--seconds", type=float, default=20, help="that one exercise may take")
    add("--total", type=float, default=120, help="seconds that one submission may take")
    add("--memory", type=float, default=2, help="GiB that an answer may take beside PyTorch")
    add("--also-read", nargs="*", default=[], help="more files and folders that answers may read")
    add("--no-isolation", action="store_true", help="run answers with your files and your network")
    add("--key", default=None, help="a private key: writes certificates")
    add("--new-key", default=None, help="make a private key in this file, and write certificates")
    add("--course", default="QLoRA, built piece by piece", help="the name on a certificate")
    add("--term", default=None, help="the version on a certificate (None: that of the package)")
    add("--supported-until", default=None, help="a date such as 2027-09-30, on a certificate")
    add("--least", type=float, default=.5, help="share of the points that earns a certificate")
    return p

# %%
def certificates(grades, out, o, roster) -> str:
    "Write them where a key was given, and say so."
    from datetime import date
    from qlora_nb import __version__
    from qlora_nb.apps.certificate import fingerprint, make_key, public_key, read_key, write_certificates
    from qlora_nb.base.errors import QLoRAError
    if o.new_key: make_key(o.new_key)
    key = read_key(o.new_key or o.key)
    try: until = o.supported_until and date.fromisoformat(o.supported_until)
    except ValueError:
        raise QLoRAError(f"'{o.supported_until}' is no date.", "--supported-until",
                         "Write it as 2027-09-30.") from None
    (out/"certificates").mkdir()
    got = write_certificates(grades, out/"certificates", key, o.course, o.term or __version__, until,
                             roster, o.least)
    public = public_key(key)
    return f"{len(got)} certificates, signed by {public} ({fingerprint(public)})"

def grade_class(o) -> str:  # The options
    "Grade, and write everything into a new folder. What to say at the end."
    from qlora_nb.apps.class_report import report_html, report_markdown
    from qlora_nb.apps.gradebook import read_roster, write_gradebooks
    from qlora_nb.apps.grading import grade
    from qlora_nb.apps.sandbox import Limits
    from qlora_nb.base.new_folder import new_folder
    roster = read_roster(o.roster)
    limits = Limits(seconds=o.seconds, memory=int(o.memory*2**30))
    with new_folder(o.out) as out:
        grades = grade(o.folder, o.source, limits, o.total, not o.no_isolation, more=o.also_read)
        write_gradebooks(grades, out, roster)
        (out/"report.md").write_text(report_markdown(grades, roster, o.folder), encoding="utf-8")
        (out/"report.html").write_text(report_html(grades, roster, o.folder), encoding="utf-8")
        signed = [certificates(grades, out, o, roster)] if o.key or o.new_key else []
    students, files = {p.student for p in grades.results}, len(grades.problems)
    return "\n".join([f"{len(students)} students graded in {o.out}", *signed,
                      *([f"{files} files need a look: see report.md"] if files else [])])

def grade_main(argv:list|None=None):  # None: the options that the command was called with
    "Grade a class: `qlora_course grade`."
    o = grade_parser().parse_args(argv)
    with one_line_errors(): print(grade_class(o))

# %%
def verify_parser() -> argparse.ArgumentParser:
    "The options of `qlora_course verify`."
    p = argparse.ArgumentParser("qlora_course verify", description="Check a certificate offline.")
    p.add_argument("file", help="a certificate, .json or .html")
    p.add_argument("--key", default=None, help="the public key that the course publishes")
    return p

def verify_main(argv:list|None=None):  # None: the options that the command was called with
    "Check a certificate: `qlora_course verify`."
    o = verify_parser().parse_args(argv)
    with one_line_errors():
        from qlora_nb.apps.certificate import verify
        data, notes = verify(o.file, o.key)
        print(f"{data['name']}: {data['points']:g} of {data['of']:g} points in {data['course']}, "
              f"version {data['version']}, {data['date']}", *notes, sep="\n")
