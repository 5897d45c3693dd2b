"Exams: every seed gives questions that are clear, other ones than the next, and no solution in the students' file."
import nbformat
import pytest

from qlora_nb.classroom.exam import exam_notebook, write_exam
from qlora_nb.classroom.exam_questions import QUESTIONS
from qlora_nb.classroom.exercises import doubts, exercises_of
from qlora_nb.base.errors import QLoRAError


@pytest.mark.parametrize("seed", range(12))
def test_each_seed_is_clear(seed):
    for ex in exercises_of("exam.ipynb", exam_notebook(seed)): assert not doubts(ex), (ex.slug, doubts(ex))


def test_seeds_differ_and_repeat():
    drawn = [tuple(o.check for o in exercises_of("exam.ipynb", exam_notebook(i))) for i in range(6)]
    assert len(set(drawn)) == 6 and drawn[0] == tuple(o.check for o in exercises_of("exam.ipynb", exam_notebook(0)))
    for i in range(len(QUESTIONS)): assert len({o[i] for o in drawn}) > 2, QUESTIONS[i].__name__


def test_a_question_does_not_depend_on_the_others():
    "An exam of fewer questions asks the same ones, so that one can be taken out."
    whole = {o.slug: o.check for o in exercises_of("exam.ipynb", exam_notebook("x"))}
    part = exercises_of("exam.ipynb", exam_notebook("x", 4))
    assert len(part) == 4 and all(whole[o.slug] == o.check for o in part)


def test_files(tmp_path):
    exam, solutions = write_exam("2027", tmp_path)
    given = exam.read_text(encoding="utf-8")
    for ex in exercises_of("exam.ipynb", exam_notebook("2027")):
        body = ex.solution.split("### BEGIN SOLUTION\n")[1].split("### END SOLUTION")[0].strip()
        assert body not in given, ex.slug
        assert not [o for o in ex.wrong if o in given and o not in ex.check], ex.slug
    assert "SOLUTION" not in given and "HIDDEN" not in given
    nbformat.validate(nbformat.read(exam, 4)), nbformat.validate(nbformat.read(solutions, 4))
    with pytest.raises(QLoRAError, match="an exam of this seed is there already"): write_exam("2027", tmp_path)
    for n in (0, -1, 99):
        with pytest.raises(QLoRAError, match="an exam of"): exam_notebook(1, n)


@pytest.mark.parametrize("seed", ["../up", "a/b", "x"*300])
def test_the_class_is_not_told_the_seed(tmp_path, seed):
    exam, solutions = write_exam(seed, tmp_path/"out", 1)
    assert seed not in exam.read_text(encoding="utf-8") and exam.name == solutions.name and seed in solutions.read_text(encoding="utf-8")
    assert {*tmp_path.iterdir()} == {tmp_path/"out"} and exam.parent.parent == tmp_path/"out"


def test_an_empty_seed_is_refused(tmp_path):
    with pytest.raises(QLoRAError, match="an empty seed"): write_exam("", tmp_path)
