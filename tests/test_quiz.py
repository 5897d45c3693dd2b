"The quizzes of the parts: what their cells define, what a stored page shows, and what choosing does."
import re
from html.parser import HTMLParser

import nbformat, pytest

from common import LESSONS, read
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.quiz import Question, Quiz, quiz_html, quiz_widget
from run_notebook import WIDGET, without_widgets

PARTS = [o for o in LESSONS if o.stem.endswith("_start")]
each_part = pytest.mark.parametrize("path", PARTS, ids=lambda o: o.stem)


def quiz_cells(path): return [c for c in read(path).cells if c.id.startswith("quiz")]


def questions_of(path):
    "What the cells of a page define, run as they stand."
    names = {}
    for c in quiz_cells(path):
        if c.cell_type == "code" and c.id != "quiz-show": exec(c.source, names)
    return names["questions"]


@each_part
def test_each_part_has_its_questions(path):
    questions = questions_of(path)
    assert 8 <= len(questions) <= 10 and all(isinstance(o, Question) for o in questions)
    assert len({q.ask for q in questions}) == len(questions)
    for q in questions:
        options = q.options()
        assert len({answer for answer, *_ in options}) == len(options) == len(q.wrong) + 1 >= 4, q.ask
        assert [ok for _, ok, _ in options].count(True) == 1 and q.ask.endswith("?"), q.ask
        for answer, _, why in options: assert len(why.split()) >= 8 and why.endswith("."), (q.ask, answer, why)


@each_part
def test_nothing_gives_an_answer_away(path):
    "Neither its place nor its length. (A reason is seen after the choice.)"
    questions = questions_of(path)
    places = [[ok for _, ok, _ in q.options()].index(True) for q in questions]
    assert len(set(places)) >= 3 and max(map(places.count, places)) <= len(places)/2, places
    lengths = [(len(q.right[0]), [*map(len, q.wrong)]) for q in questions]
    assert sum(right > max(wrong) for right, wrong in lengths) <= len(questions)/2, lengths
    assert sum(right < min(wrong) for right, wrong in lengths) <= len(questions)/2, lengths
    for right, wrong in lengths: assert .75*min(wrong) <= right <= 1.25*max(wrong), (right, wrong)


class Tags(HTMLParser):
    "The tags of a text, each closed in its turn."
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.said = [], [], []
        self.feed(text), self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        assert not attrs, (tag, attrs)
        self.open.append(tag), self.seen.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
    def handle_data(self, data): self.said.append(data)


@each_part
def test_a_stored_page_shows_the_list(path):
    "As HTML alone: no widget, which has no kernel there, no script and no address; every word of every question."
    questions = questions_of(path)
    output, = next(c for c in quiz_cells(path) if c.id == "quiz-show").outputs
    assert output.data.keys() == {"text/html", "text/plain"} and output.data["text/plain"] == f"A quiz of {len(questions)} questions."
    html = output.data["text/html"]
    assert html == quiz_html(questions), "the stored list is not what the cells say: run the page with --save"
    assert "http" not in html
    tags = Tags(html)
    assert set(tags.seen) == {"ol", "li", "p", "b", "details", "summary"} and tags.seen.count("li") == len(questions)
    for q in questions:
        assert q.ask in tags.said
        for answer, ok, why in q.options(): assert answer in tags.said and f"{'Right' if ok else 'No'}. {why}" in tags.said


def test_tags_notices():
    for wrong in ("<ol><li></ol></li>", "<p>", "<p src='x'></p>"):
        with pytest.raises((AssertionError, IndexError)): Tags(wrong)
    assert Tags("<p>a &lt; b</p>").said == ["a < b"]


@each_part
def test_where_it_stands(path):
    "Below the table of pages and before the way on, its code collapsed."
    ids, cells = [c.id for c in read(path).cells], quiz_cells(path)
    n = len(cells) - 3
    assert ids[ids.index("course-table") + 1:] == ["quiz", "quiz-import", *(f"quiz-{i + 1}" for i in range(n)), "quiz-show", "course-end"]
    assert cells[0].source.startswith("## Check yourself\n") and cells[-1].source == "Quiz(questions)"
    for c in cells[1:-1]: assert c.metadata.get("cellView") == "form" and c.metadata.jupyter.source_hidden, c.id
    assert all(c.source.startswith("#| code-fold\n") for c in cells[2:-1])
    for c in cells[1:]: assert len(lines := c.source.splitlines()) <= 15 and max(map(len, lines)) <= 100, c.id


# ---- counting, and the radio buttons ----

def by_kind(q):
    "(the right answer, the wrong ones)"
    return q.right[0], [*q.wrong]


def test_only_the_first_try_counts():
    quiz = Quiz(questions_of(PARTS[0]))
    n = len(quiz.questions)
    assert quiz.score() == f"0 of {n} answered, 0 of {n} right at the first try."
    right, wrong = by_kind(quiz.questions[0])
    assert quiz.answer(0, wrong[0]) == (False, quiz.questions[0].wrong[wrong[0]])
    assert quiz.answer(0, right) == (True, quiz.questions[0].right[1])
    assert quiz.score() == f"1 of {n} answered, 0 of {n} right at the first try."
    right, wrong = by_kind(quiz.questions[3])
    quiz.answer(3, right), quiz.answer(3, wrong[0])
    assert quiz.score() == f"2 of {n} answered, 1 of {n} right at the first try."
    with pytest.raises(KeyError): quiz.answer(0, "no option")


@each_part
def test_a_walk_by_radio_button(path):
    "Every option of every question, wrong ones first in every other question; the text follows each choice."
    quiz = Quiz(questions_of(path))
    n = len(quiz.questions)
    *groups, score = quiz_widget(quiz).children
    assert len(groups) == n
    for i, (q, group) in enumerate(zip(quiz.questions, groups)):
        name, choose, says = group.children
        right, wrong = by_kind(q)
        assert choose.value is None and says.value == "" and sorted(choose.options) == sorted([right, *wrong])
        assert choose.description == f"Answer {i + 1}" and f"{i + 1} of {n}. " in name.value
        for answer in [right, *wrong] if i % 2 == 0 else [*wrong, right]:
            choose.value = answer
            reason = Tags(re.sub(r" role='status'", "", says.value)).said
            assert reason == [f"✓ Right. {q.right[1]}" if answer == right else f"✗ No. {q.wrong[answer]}"]
        assert f"{i + 1} of {n} answered, {i//2 + 1} of {n} right at the first try." in score.value
    assert all("http" not in w.value for g in groups for w in (g.children[0], g.children[2]))


def test_two_forms_of_one_quiz():
    quiz = Quiz(questions_of(PARTS[0]))
    shown = quiz._repr_mimebundle_()
    assert shown["text/html"] == quiz_html(quiz.questions) and shown[WIDGET]["model_id"] == quiz.widget.model_id


def test_what_is_saved_of_a_widget():
    "Its other form, where it has one; a widget without one goes, and everything else stays."
    view, cell = {WIDGET: {"model_id": "x"}}, nbformat.v4.new_code_cell
    out = lambda data: nbformat.v4.new_output("display_data", data)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("a"), cell("b", outputs=[
        out(view | {"text/html": "<p></p>", "text/plain": "p"}), out(view | {"text/plain": "VBox()"}), out({"text/html": "<p></p>"}),
        nbformat.v4.new_output("stream", text="c")])])
    without_widgets(nb)
    assert [o.data.keys() for o in nb.cells[1].outputs[:2]] == [{"text/html", "text/plain"}, {"text/html"}]
    assert nb.cells[1].outputs[2].text == "c"


def test_a_question_without_a_reason_is_refused():
    for right, wrong in ((("a", ""), {"b": "x", "c": "y"}), (("a", "z"), {"b": "x", "c": ""}), (("a", "z"), {"b": "x"}),
                         (("a", "z"), {"a": "x", "c": "y"})):
        with pytest.raises(QLoRAError, match="a reason for each"): Question("Why?", right, wrong)
    assert "&lt;b&gt;" in quiz_html([Question("<b>?", ("<i>", "r"), {"1": "x", "2": "y"})])
