"""MMLU has four choices, can be limited to subjects, and has no training split."""

import pytest
from choice_rows import task_at, write_jsonl

from aft_ray.config.run import ConfigError
from aft_ray.tasks import load_split

CHOICES = ["north", "south", "east", "west"]


def row(subject: str, answer: object = 2) -> dict:
    return {
        "question": f"Where does the sun rise in {subject}?",
        "subject": subject,
        "choices": CHOICES,
        "answer": answer,
    }


@pytest.fixture
def path(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [row("astronomy"), row("virology", "C"), row("astronomy", 0)])
    return tmp_path


def test_answers_are_numbers_or_letters(path):
    found = load_split(task_at(path, "mmlu"), "test", None, 0)
    assert [(q.id, q.gold, q.reference) for q in found] == [
        ("mmlu-test-000000", "C", "#### C"),
        ("mmlu-test-000001", "C", "#### C"),
        ("mmlu-test-000002", "A", "#### A"),
    ]
    assert found[0].text.endswith("?\n(A) north\n(B) south\n(C) east\n(D) west")


def test_subjects_are_chosen_by_name_and_keep_their_ids(path):
    found = load_split(task_at(path, "mmlu", mmlu={"subjects": "astronomy"}), "test", None, 0)
    assert [q.id for q in found] == ["mmlu-test-000000", "mmlu-test-000002"]
    with pytest.raises(ConfigError, match=r"names 'astronmy', which is no subject of .*did you mean astronomy\?"):
        task_at(path, "mmlu", mmlu={"subjects": ["astronmy"]}).load("test")


def test_it_cannot_be_trained_on(path):
    with pytest.raises(ConfigError, match="evaluation only and has no training split"):
        task_at(path, "mmlu").load("train")


@pytest.mark.parametrize("answer", [4, -1, "Z", None])
def test_a_wrong_answer_is_named(path, answer):
    write_jsonl(path / "validation.jsonl", [row("law", answer)])
    with pytest.raises(ConfigError, match=r"row 1 of .*validation\.jsonl"):
        task_at(path, "mmlu").load("validation")
