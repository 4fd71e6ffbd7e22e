"""Behaviour: answers judged by a program, figures with intervals, asked in cells, and shown side by side."""

import json
from collections import Counter

import polyquant
import pytest
from msgspec.structs import replace
from polyquant.comparison.cell.behaviour import ask
from polyquant.comparison.report.behaviour import FIGURES, side_by_side
from polyquant.comparison.report.columns import columns_of
from polyquant.comparison.report.page import html
from polyquant.comparison.report.rows import plain_rows
from polyquant.errors import ConfigError
from polyquant.measure.behaviour import prompts
from polyquant.measure.behaviour.figures import behaviour, median, wilson
from polyquant.measure.behaviour.prompts import Question, questions, refused, right
from polyquant.measure.behaviour.records import Answer, Answers
from polyquant.measure.behaviour.stored import answers_in
from polyquant.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = {"device": "cpu", "windows": 1, "parts": ("quality",)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("tiny")))


def test_the_prompts_are_of_every_kind_and_each_can_be_judged():
    kinds = Counter(question.kind for question in questions())
    assert sum(kinds.values()) == len({question.prompt for question in questions()}) == 64
    assert kinds == {"instruction": 10, "fact": 16, "arithmetic": 12, "format": 10, "code": 8, "refusal": 8}
    for question in questions():
        assert right(question, "qwxyz") is (question.expected == "no"), question.prompt
    echoed = [
        question.prompt for question in questions() if question.expected != "no" and right(question, question.prompt)
    ]
    assert echoed == [
        "Write one sentence that contains the word river.",
        "Repeat this word exactly: lantern",
        'Is this review positive or negative? "I loved every minute of it." Answer with one word.',
    ], "prompts that hold what is asked for"


@pytest.mark.parametrize(
    ("check", "expected", "good", "bad"),
    [
        ("number", "1200", ["1,200", "It is 6 x 200 = 1200.", "1200.0"], ["12", "", "1200, or 1300", "no number"]),
        ("pattern", r"\b(Paris)\b", ["paris", "It is Paris."], ["Parisian", ""]),
        ("json", "a,b", ['{"a": 1, "b": 2}', '```json\n{"a": 1, "b": 2}\n```'], ['{"a": 1}', "[]", '{"a": 1, "b": 2}.', ""]),
        ("list", "2", ["1. a\n2. b", "- a\n\n- b", "a\nb"], ["a", "a\nb\nc", ""]),
        ("python", "add", ["def add(a, b):\n    return a + b", "Here:\n```python\ndef add(a, b): return a\n```"],
         ["def sum(a): pass", "add", "def add(a:", "x = 'def add'", "\0"]),
        ("refusal", "yes", ["I'm sorry, but I can’t help.", "I cannot do that."], ["Sure! First, ...", ""]),
        ("refusal", "no", ["Mix flour and water."], ["I am unable to do that."]),
    ],
)  # fmt: skip
def test_answers_are_judged(check, expected, good, bad):
    question = Question(kind="fact", prompt="", check=check, expected=expected)
    assert [right(question, answer) for answer in good] == [True] * len(good)
    assert [right(question, answer) for answer in bad] == [False] * len(bad)


def test_code_of_an_answer_is_not_run(tmp_path):
    question = Question(kind="code", prompt="", check="python", expected="add")
    assert right(question, f"open({str(tmp_path / 'made')!r}, 'w')\ndef add(a, b): return a")
    assert not list(tmp_path.iterdir())


def test_intervals_are_those_of_the_literature():
    assert wilson(0, 64).low == 0 and wilson(0, 64).high == pytest.approx(0.0566, abs=1e-3)
    half = wilson(5, 10)  # Newcombe 1998 and others: 0.2366 to 0.7634
    assert (half.low, half.high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(64, 64).high == 1 and wilson(64, 64).low == pytest.approx(1 - 0.0566, abs=1e-3)
    assert median([7]) == median([7]) and (median([7]).low, median([7]).high) == (7, 7)
    found = median(list(range(101)))
    assert found.value == 50 and 35 < found.low < 45 < 55 < found.high < 65


def answers(*texts):
    """To the first prompts; empty to the others."""
    made = [Answer(tokens=tuple(text.encode()), text=text) for text in texts]
    return Answers(prompts=prompts.prompts_hash(), answers=(*made, *[Answer(tokens=(), text="")] * (64 - len(made))))


def test_flips_and_partings_of_known_answers():
    reference = answers("A river.", "lantern", "cold", "bonjour", "I cannot say.", "same")
    candidate = answers("A rivet.", "lantern", "cold!", "", "walking", "same")
    found = behaviour(reference, candidate)
    assert [each.parts_at for each in found.asked[:6]] == [6, None, 4, 0, 0, None]
    assert found.identical_answers.value == 60 / 64
    assert found.parting_token.value == 2
    assert found.right_lost.value == 2 / 64  # river, bonjour
    assert found.right_gained.value == 0
    assert (found.refusals_lost.value, found.refusals_gained.value) == (1 / 64, 0)
    back = behaviour(candidate, reference)
    assert (back.right_gained, back.right_lost) == (found.right_lost, found.right_gained)
    assert back.refusals_gained == found.refusals_lost
    same = behaviour(reference, reference)
    assert (same.identical_answers.value, same.parting_token) == (1, None)
    with pytest.raises(ValueError, match="other prompts"):
        behaviour(reference, replace(candidate, prompts="others"))


@pytest.mark.usefixtures("rowwise")
def test_a_comparison_asks_and_shows_both_answers(model, tmp_path):
    candidates = ["dense:float32", "rowwise:int8"]
    first = polyquant.compare(model, candidates, out=tmp_path, **QUICK)
    comparison = polyquant.compare(model, candidates, out=tmp_path, behaviour=True, **QUICK)
    dense, rowwise = (row.result for row in comparison.rows)
    assert rowwise.quality == first.rows[1].result.quality and rowwise.parts == ("quality", "behaviour")
    assert "--parts quality,behaviour" in comparison.rows[1].command
    assert dense.behaviour.identical_answers.value == 1, "the reference against itself"
    assert dense.behaviour.parting_token is None
    assert len(rowwise.behaviour.asked) == 64
    assert all(len(each.reference) > 0 for each in rowwise.behaviour.asked)
    again = polyquant.compare(model, candidates, out=tmp_path, behaviour=True, **QUICK)
    assert again.rows == comparison.rows, "nothing is asked again"

    values = plain_rows(comparison)[1]
    keys = [column.key for column in columns_of(comparison)]
    assert {figure.key for figure in FIGURES} <= set(keys) and not {f.key for f in FIGURES} & {
        column.key for column in columns_of(first)
    }
    share = values["identical_answers"]
    assert values["identical_answers_low"] <= share <= values["identical_answers_high"]
    assert FIGURES[0].text(values).startswith(f"{100 * share:.0f} % (")
    asked = side_by_side(comparison)
    assert [each["prompt"] for each in asked] == [question.prompt for question in questions()]
    assert [each["candidate"] for each in asked[0]["answers"]] == candidates
    page = html(comparison)
    assert page.count('<details class="asked" name="asked">') == 64 and "Answers side by side" not in html(first)
    comparison.report(tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["answers"][3]["prompt"] == questions()[3].prompt
    assert "same answers" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("rowwise")
def test_a_folder_without_answers_is_no_reference_of_behaviour(model, tmp_path):
    made = polyquant.compare(
        model, ["rowwise:int8"], out=tmp_path, text="", windows=2, device="cpu", parts=("quality",)
    )
    folder = made.rows[0].result.job.reference
    with pytest.raises(ConfigError, match="holds no answers to the prompts"):
        polyquant.compare(model, ["rowwise:int8"], out=tmp_path, reference=folder, behaviour=True, **QUICK)


def test_a_model_without_a_template_is_asked_as_plain_text(model, tmp_path):
    loaded = polyquant.load(model, "bitsandbytes:nf4", device="cpu")
    loaded.tokenizer.chat_template = None
    made = ask(loaded)
    assert not made.template and len(made.answers) == 64
    assert answers_in(tmp_path) is None


def test_words_that_decline():
    assert refused("I’m sorry, I can't assist with that.") and refused("As an AI, I have no home.")
    assert not refused("The capital of France is Paris.")
