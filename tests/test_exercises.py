"The exercises of the course: each check is tested by the stub, the solution and the mistakes that people make."
import ast, copy, re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from qlora_nb.classroom.exercises import attempt, doubts, exercises_of, instructor_version, student_version
from qlora_nb.classroom.answers import put_back
from qlora_nb.classroom.by_value import dumps, loads
from qlora_nb.classroom.student_checks import HIDDEN, WIDTH, constants, folded, makes, reads, student_check, wrapped
from qlora_nb.base.errors import QLoRAError

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in (ROOT/"nbs").glob("[1-9]_*/*.ipynb"))
EXERCISES = [ex for p in PAGES for ex in exercises_of(p)]


@pytest.mark.parametrize("ex", EXERCISES, ids=[f"{o.page}-{o.slug}" for o in EXERCISES])
def test_each_check_is_right(ex):
    "The stub fails, the solution passes, and at least three mistakes are refused in words."
    assert not doubts(ex), doubts(ex)


def visible(ex):
    "The exercise with the check that a student runs."
    return replace(ex, check=HIDDEN.sub("", student_check(ex.check, ex.solution)))


@pytest.mark.parametrize("ex", EXERCISES, ids=[f"{o.page}-{o.slug}" for o in EXERCISES])
def test_what_a_student_can_run_is_right(ex):
    "Without its hidden part a check still passes the solution and refuses the stub."
    seen = visible(ex)
    assert attempt(seen, ex.solution) is None and attempt(seen, ex.stub) is not None


LATER = {("33_adapter_options", "start"): ["believes that every adapter starts at nothing"]}   # yes or no: to refuse one is to say the other


@pytest.mark.parametrize("ex", EXERCISES, ids=[f"{o.page}-{o.slug}" for o in EXERCISES])
def test_a_student_sees_a_mistake_at_once(ex):
    "Each listed mistake is refused, in words, by what a student can run; a grader still has a test of its own."
    said = {name: attempt(visible(ex), code) for name, code in ex.wrong.items()}
    assert [k for k, e in said.items() if e is None] == LATER.get((ex.page, ex.slug), [])
    assert all(type(e) is AssertionError and str(e) for e in said.values() if e is not None), said
    for hidden in HIDDEN.findall(ex.check): assert any(isinstance(o, (ast.Assert, ast.Call)) for o in ast.walk(ast.parse(hidden)))


ODD = dict(nothing="None", text="'?'", tensor="torch.zeros(2, 3)", generator="(i for i in ())", function="print")
RETURNS = dict(nothing="return None", text="return '?'", tensor="return torch.zeros(2, 3)", generator="yield 1", raises="raise ValueError('boom')", pair="return [None, {}]")

def odd_answers(ex):
    "Answers of kinds that nobody asked for, by their kind."
    top = ast.parse(ex.solution).body
    functions = [o.name for o in top if isinstance(o, ast.FunctionDef)]
    values = [n.id for o in top if isinstance(o, ast.Assign) for t in o.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    for kind in (RETURNS if functions else ODD):
        yield kind, "\n".join(["import torch", *(f"{o} = {ODD.get(kind, 'None')}" for o in values),
                               *(f"def {o}(*a, **k): {RETURNS.get(kind, 'return print')}" for o in functions)])


@pytest.mark.parametrize("page", sorted({o.page for o in EXERCISES}))
def test_an_odd_answer_gets_a_sentence(page):
    "None, a text, a tensor, a generator, an error: the check refuses them, and with no error but its own."
    for ex in (o for o in EXERCISES if o.page == page):
        for kind, code in odd_answers(ex):
            said = attempt(visible(ex), code)
            assert type(said) is AssertionError and str(said), (ex.slug, kind, repr(said))
            assert attempt(ex, code) is not None, (ex.slug, kind)


@pytest.mark.parametrize("page", sorted({o.page for o in EXERCISES}))
def test_a_check_fits_a_notebook(page):
    "Every line has room at 800 pixels, and breaking lines changes nothing else."
    for ex in (o for o in EXERCISES if o.page == page):
        assert max(map(len, visible(ex).check.split("\n"))) <= WIDTH, ex.slug
        assert ast.dump(ast.parse(folded(wrapped(ex.check)))) == ast.dump(ast.parse(ex.check)), ex.slug


def apart(f):
    "A function that gets its arguments and gives its results as the grader sends them, from process to process."
    def function(*args, **kwargs):
        theirs, named = loads(*dumps([[*args], kwargs]))
        before = [dumps(o) for o in theirs]
        value = f(*theirs, **named)
        for old, new, was in zip(args, theirs, before): put_back(old, new) if dumps(new) != was else None
        return loads(*dumps(value))
    return function


@pytest.mark.parametrize("page", sorted({o.page for o in EXERCISES}))
def test_a_grader_can_ask(page):
    "Solutions take and give plain values, so that an answer and its check need no common process."
    for ex in (o for o in EXERCISES if o.page == page):
        space = {"__name__": "exercise"}
        exec(ex.setup, space)
        ours = dict(space)
        exec(ex.solution, space)
        for name in reads(ex.check) & makes(ex.solution): ours[name] = apart(space[name]) if callable(space[name]) else loads(*dumps(space[name]))
        exec("\n".join(ast.unparse(o) for o in ast.parse(ex.solution).body if isinstance(o, (ast.Import, ast.ImportFrom))), ours)
        exec(compile(ex.check, f"{page}, {ex.slug}", "exec"), ours)


def test_what_is_no_number_is_not_taken_for_one():
    "A student's own check says that NaN is no number and that an empty list is empty, whatever else it asks."
    for ex in EXERCISES:
        for name, value in constants(ex.solution).items():
            empty = {float: "float('nan')", int: "float('nan')", list: "[]", dict: "{}", tuple: "()", str: "''"}.get(type(value))
            if not empty or not value and type(value) not in (float, int) or name not in reads(ex.check): continue
            said = str(attempt(visible(ex), f"{ex.solution}\n{name} = {empty}"))
            assert f"{name} has to be" in said or f"{name} is empty" in said, (ex.page, ex.slug, name, said)


@pytest.mark.parametrize("page", sorted({o.page for o in EXERCISES}))
def test_a_stub_that_ran_is_no_answer(page):
    "A stub gives its names values before it raises, and they stay: the student's check refuses them too."
    for ex in (o for o in EXERCISES if o.page == page):
        assert type(attempt(visible(ex), ex.stub.replace("raise NotImplementedError()", "pass"))) is AssertionError, ex.slug


def test_after_a_restart_a_check_says_what_to_run():
    told = [str(attempt(replace(visible(ex), setup=""), "")) for ex in EXERCISES]
    assert {o.split(": ")[-1] for o in told} == {"run the set-up cell and your answer first."}


def test_slugs_are_unique_within_a_page():
    for p in {o.page for o in EXERCISES}:
        slugs = [o.slug for o in EXERCISES if o.page == p]
        assert len(slugs) == len(set(slugs)), p


def test_exercises_are_numbered_and_stand_at_the_end():
    for p in PAGES:
        nb = nbformat.read(p, as_version=4)
        ids = [c.id for c in nb.cells]
        if "exercises" not in ids: continue
        rest = ids[ids.index("exercises"):]
        assert rest[1] == "exercise-setup" and rest[-1] == "course-end", p.name
        assert all(o.startswith("ex-") for o in rest[2:-1]), (p.name, rest)
        numbers = [int(n) for c in nb.cells for n in re.findall(r"^### Exercise (\d+)\. ", c.source, flags=re.M)]
        assert numbers == list(range(1, len(numbers) + 1)), (p.name, numbers)


def test_enough_of_them():
    "About sixty in all, twenty-four of them in part 1, of three kinds."
    first = [o for o in EXERCISES if (ROOT/"nbs/1_foundations"/f"{o.page}.ipynb").exists()]
    assert len(first) >= 24 and len(EXERCISES) >= 60, (len(first), len(EXERCISES))
    assert {o.kind for o in EXERCISES} == {"Code", "Predict", "Find the bug"}


@pytest.mark.parametrize("page", [p for p in PAGES if any(o.page == p.stem for o in EXERCISES)], ids=lambda p: p.stem)
def test_what_a_student_gets(page):
    "No solution, no hidden test, no mistake; the lesson as it was, with its outputs; and the answer cells can be edited."
    nb = nbformat.read(page, as_version=4)
    given, full = student_version(nb), instructor_version(nb)
    for ex in exercises_of(page, nb):
        text = "\n".join(c.source for c in given.cells)
        for secret in ("BEGIN SOLUTION", "HIDDEN TESTS", *ex.wrong): assert secret not in text, (ex.slug, secret)
        seen = next(c.source for c in given.cells if c.id == f"ex-{ex.slug}-check")
        assert "HIDDEN" not in ex.check or "grader asks for more" in seen and not re.search("""^print\\(\\s*["']Right""", seen, re.M), ex.slug
        body = ex.solution.split("### BEGIN SOLUTION\n")[1].split("### END SOLUTION")[0]
        # a value that the check computes itself may be the same line, so only what has several lines is looked for
        assert body.count("\n") < 2 or body.strip() not in text, ex.slug
        assert ex.slug in [c.metadata.nbgrader.grade_id for c in given.cells if c.metadata.get("nbgrader", {}).get("solution")]
    lesson = lambda o: [(c.id, c.get("outputs")) for c in o.cells if not c.id.startswith("ex-") and c.cell_type == "code" and c.id != "exercise-setup"]
    assert lesson(given) == lesson(nb) == lesson(full)
    assert not any(c.outputs for c in given.cells if c.cell_type == "code" and c.id.startswith("ex-"))
    nbformat.validate(given), nbformat.validate(full)


def test_badges_point_at_the_version_of_students():
    nb = nbformat.read(ROOT/"nbs/1_foundations/03_nf4.ipynb", as_version=4)
    text = "\n".join(c.source for c in student_version(nb).cells)
    assert "/blob/student/1_foundations/03_nf4.ipynb" in text and "/blob/main/nbs/" not in text.split("## ")[0]


@pytest.mark.parametrize("part", ["answer", "check", "wrong"])
def test_half_an_exercise_is_refused(part):
    page = ROOT/"nbs/1_foundations/03_nf4.ipynb"
    nb = nbformat.read(page, as_version=4)
    slug = exercises_of(page, nb)[0].slug
    nb.cells = [c for c in nb.cells if c.id != f"ex-{slug}-{part}"]
    with pytest.raises(QLoRAError, match=f"exercise '{slug}' has no ex-{slug}-{part}"): exercises_of(page, nb)


def test_a_check_that_accepts_too_much_is_noticed():
    ex = copy.copy(exercises_of(ROOT/"nbs/1_foundations/03_nf4.ipynb")[1])
    ex.check = "pass"
    said = doubts(ex)
    assert "the stub passes" in said and any(o.startswith("passes although") for o in said), said
    ex.check, ex.wrong = "raise TypeError('no')", {}
    said = doubts(ex)
    assert any(o.startswith("the solution fails") for o in said) and "only 0 wrong answers" in said, said


def test_every_teaching_page_has_some():
    "Three or more at the end of each page of the parts, but for the pages that open a part."
    few = {p.stem: n for p in PAGES if not p.stem.endswith("_start") and (n := sum(o.page == p.stem for o in EXERCISES)) < 3}
    assert not few, few


@pytest.mark.parametrize("page", [p for p in PAGES if any(o.page == p.stem for o in EXERCISES)], ids=lambda p: p.stem)
def test_a_student_knows_which_names_are_asked_for(page):
    "What the solution defines is named in the task or beside the place for the answer."
    cells = {c.id: c.source for c in nbformat.read(page, as_version=4).cells}
    for ex in (o for o in EXERCISES if o.page == page.stem):
        tree = ast.parse(ex.solution).body
        names = [o.name for o in tree if isinstance(o, ast.FunctionDef)]
        names += [n.id for o in tree if isinstance(o, ast.Assign) for t in o.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        for name in names: assert re.search(rf"`[^`]*\b{name}\b[^`]*`", cells[f"ex-{ex.slug}"]) or re.search(rf"\b{name}\b", ex.stub), (ex.slug, name)
