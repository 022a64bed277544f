"""The common part of multiple-choice tasks: how options are written, letters read and duplicates found."""

import pytest
from choice_rows import task_at, write_jsonl

from aft_ray.storage.records import Verdict
from aft_ray.tasks import load_split
from aft_ray.tasks.choices import ChoiceProblem, without_duplicates


@pytest.fixture
def task(tmp_path):
    row = {"question": "Which is wet?", "choices": ["sand", "rain", "salt", "wood", "tin"], "answer": "B"}
    write_jsonl(tmp_path / "test.jsonl", [row])
    return task_at(tmp_path, "ecqa")


def test_each_option_is_on_its_own_line_after_its_letter(task):
    (question,) = load_split(task, "test", None, 0)
    assert task.prompt(question) == (
        "Question: Which is wet?\n(A) sand\n(B) rain\n(C) salt\n(D) wood\n(E) tin\nAnswer:"
    )
    assert (question.reference, question.gold) == ("#### B", "B")


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("Rain is wet.\n#### B", "B", Verdict.RIGHT),
        ("Not A, I think.\n#### (b) rain", "B", Verdict.RIGHT),
        ("#### A\nno, wait\n#### B\nQuestion: next", "B", Verdict.RIGHT),  # the last marker, its line alone
        ("I first said the answer is B.\n#### C", "C", Verdict.WRONG),  # the marker comes before any wording
        ("Water falls, so the answer is (B).", "B", Verdict.RIGHT),
        ("The answer is (B).\n#### rain, of course", "B", Verdict.RIGHT),
        ("#### rain", "rain", Verdict.UNDECIDED),  # perhaps the wording of the right option
        ("A dog is not wet.", None, Verdict.WRONG),
        ("", None, Verdict.WRONG),
    ],
)
def test_a_letter_is_read_by_the_marker_else_from_the_words(task, text, answer, verdict):
    assert task.extract(text) == answer
    assert task.same(task.extract(text), "B").verdict is verdict


def test_an_answer_that_names_two_options_is_not_wrong(task):
    assert task.same(task.extract("#### A or B"), "B").verdict is Verdict.UNDECIDED


def test_a_marker_from_the_config(tmp_path, task):
    own = task_at(tmp_path, "ecqa", answer_marker="Choice:", prompt="{question}\nThink.")
    (question,) = load_split(own, "test", None, 0)
    assert question.reference == "Choice: B"
    assert own.prompt(question).endswith("(E) tin\nThink.")
    assert own.extract("Choice: D") == "D"


def problem(identity, stem, options=("1", "2"), gold="A"):
    return ChoiceProblem(identity, stem, options, gold)


def test_copied_questions_are_found_whatever_their_spaces_and_case():
    kept = [problem("t0", "What is 2 + 2?")]
    found = without_duplicates(
        [
            problem("a", "what is 2+2 ?"),
            problem("b", "Why?"),
            problem("c", "why"),
            problem("d", "?"),
            problem("e", "!"),
        ],
        kept,
    )
    assert [p.id for p in found] == ["b", "d", "e"]


def test_a_right_option_that_is_listed_twice_is_ambiguous_and_a_wrong_one_is_not():
    assert problem("a", "?", ("six", " Six", "ten"), "B").is_ambiguous
    assert not problem("a", "?", ("six", "six", "ten"), "C").is_ambiguous
