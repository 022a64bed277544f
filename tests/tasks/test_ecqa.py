"""ECQA from files: both sets of columns, the splits, and errors that name the row."""

import pytest
from choice_rows import assert_sound, splits, task_at, write_jsonl

from aft_ray.config.run import ConfigError
from aft_ray.tasks import load_split

CHOICES = ["a mug", "the moon", "a shoe", "a cloud", "a key"]


def row(question: str, **columns) -> dict:
    return {"question": question, "choices": CHOICES, "answer": "A", "explanation": f"{question} A mug."} | columns


def hub_row(question: str, **columns) -> dict:
    choices = {f"q_op{number}": choice for number, choice in enumerate(CHOICES, 1)}
    return {"q_text": question, **choices, "q_ans": "a shoe ", "taskB": "Shoes are worn."} | columns


def write(path, train, validation=(), test=()) -> None:
    for name, rows in (("train", train), ("val", validation or [row("v?")]), ("test", test or [row("t?")])):
        write_jsonl(path / f"{name}.jsonl", list(rows))


def test_an_explanation_is_the_reference_and_is_not_needed_outside_of_training(tmp_path):
    plain = {"question": "v?", "choices": CHOICES, "answer": "E"}
    write(tmp_path, [row("What holds tea?")], [plain])
    found = splits(task_at(tmp_path, "ecqa"))
    assert [(q.id, q.reference, q.gold) for q in found["train"]] == [
        ("ecqa-train-000000", "What holds tea? A mug.\n#### A", "A")
    ]
    assert found["validation"][0].reference == "#### E"


def test_the_hubs_columns(tmp_path):
    write(tmp_path, [hub_row("What has laces?")])
    (question,) = load_split(task_at(tmp_path, "ecqa"), "train", None, 0)
    assert question.text == "What has laces?\n(A) a mug\n(B) the moon\n(C) a shoe\n(D) a cloud\n(E) a key"
    assert (question.reference, question.gold) == ("Shoes are worn.\n#### C", "C")


def test_no_question_is_in_two_splits_and_none_is_trained_that_has_two_right_answers(tmp_path):
    twice = row("Where is tea?", choices=["a mug", "a pot", "a mug", "a sack", "a hat"])
    write(
        tmp_path,
        [row("One?"), row("two"), twice, row("THREE ?"), row("Four?")],
        [row("Two?"), row("Three?")],
        [row("Three?"), row("Three?")],
    )
    found = splits(task_at(tmp_path, "ecqa"))
    assert {split: [q.id[-1] for q in questions] for split, questions in found.items()} == {
        "train": ["0", "4"],
        "validation": ["0"],
        "test": ["0", "1"],
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row("q?", explanation=None), r"row 2 of .*train\.jsonl has an empty column 'explanation'"),
        (row("q?", answer="G"), r"row 2 of .*train\.jsonl gives 'G' as its answer"),
        (row("q?", answer=None), r"row 2 of .*train\.jsonl has an empty column 'answer'"),
        (row("q?", choices=["one"]), r"row 2 of .*train\.jsonl has 1 options, not 2 to 5"),
        (row("q?", choices=list("abcdef")), r"row 2 of .*train\.jsonl has 6 options, not 2 to 5"),
        (hub_row("q?", q_ans="a comet"), r"row 2 of .*train\.jsonl gives the answer 'a comet', which is none of its"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, wrong, message):
    write(tmp_path, [row("fine?"), wrong])
    with pytest.raises(ConfigError, match=message) as error:
        task_at(tmp_path, "ecqa").load("train")
    assert "\n" not in str(error.value)


def test_the_real_files(ecqa_path):
    task = task_at(ecqa_path, "ecqa")
    found = splits(task)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 7050, "validation": 1079, "test": 2194}
    assert_sound(task, found, "ABCDE")
