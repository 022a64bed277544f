"""AQuA-RAT from files: both formats of the training file, the splits, and errors that name the row."""

from pathlib import Path

import pytest
from choice_rows import assert_sound, splits, stem, task_at, write_jsonl

from aft_ray.config.run import ConfigError
from aft_ray.tasks import load_split, to_questions


def row(number: int, name: str = "crates", correct: str = "C") -> dict:
    options = [f"{letter}){number + offset}" for offset, letter in enumerate("ABCDE")]
    return {
        "question": f"Two more than {number} {name}?",
        "options": options,
        "rationale": f"{number} + 2 = {number + 2}\nAnswer {correct}",
        "correct": correct,
    }


def tsv(number: int) -> str:
    options = "\\n".join(f"({letter}) {number + offset}" for offset, letter in enumerate("ABCDE"))
    return f"Two more than {number} crates?\\nOptions:\\n{options}\t(C)\t{number} + 2\\n= {number + 2}\n"


def write(path: Path, train: int, held: int = 3) -> None:
    write_jsonl(path / "dev.json", [row(i, "jars") for i in range(held)])
    write_jsonl(path / "test.json", [row(i, "bags") for i in range(held)])
    write_jsonl(path / "train.json", [row(i) for i in range(train)])


def test_a_question_of_the_tsv_file(tmp_path):
    write(tmp_path, 0)
    (tmp_path / "train.json").unlink()
    (tmp_path / "aqua_train.tsv").write_text(tsv(7) + tsv(8))
    first, second = load_split(task_at(tmp_path, "aqua_rat"), "train", None, 0)
    assert first.text == "Two more than 7 crates?\n(A) 7\n(B) 8\n(C) 9\n(D) 10\n(E) 11"
    assert first.reference == "7 + 2\n= 9\n#### C"
    assert (first.id, first.gold, first.task) == ("aqua_rat-train-000000", "C", "aqua_rat")
    assert second.id == "aqua_rat-train-000001"


def test_both_formats_give_the_same_question(tmp_path):
    write(tmp_path, 9)
    (of_json,) = [q for q in load_split(task_at(tmp_path, "aqua_rat"), "train", None, 0) if "than 7 " in q.text]
    (tmp_path / "train.json").unlink()
    (tmp_path / "aqua_train.tsv").write_text(tsv(7))
    (of_tsv,) = load_split(task_at(tmp_path, "aqua_rat"), "train", None, 0)
    assert (of_json.text, of_json.gold) == (of_tsv.text, of_tsv.gold)


def test_training_leaves_out_what_is_tested_what_repeats_and_what_has_two_right_answers(tmp_path):
    write(tmp_path, 4)
    copied = row(1, "BAGS ") | {"options": [f"{letter}) {letter}" for letter in "ABCDE"]}
    twice = row(9) | {"options": ["A)9", "B)10", "C)11", "D)11", "E)12"]}
    write_jsonl(tmp_path / "train.json", [copied, row(5), row(2, "jars"), row(5), twice, row(6)])
    found = splits(task_at(tmp_path, "aqua_rat"))
    assert [q.id for q in found["train"]] == ["aqua_rat-train-000001", "aqua_rat-train-000005"]
    assert [len(found[split]) for split in ("validation", "test")] == [3, 3]


def test_no_row_is_moved_from_few_training_rows_and_enough_make_the_papers_splits(tmp_path):
    write(tmp_path, 5000 + 397 + 1251 - 1)
    few = splits(task_at(tmp_path, "aqua_rat"))
    assert {split: len(found) for split, found in few.items()} == {"train": 6647, "validation": 3, "test": 3}
    write(tmp_path, 5000 + 397 + 1251)
    task = task_at(tmp_path, "aqua_rat")
    enough = splits(task)
    assert {split: len(found) for split, found in enough.items()} == {"train": 5000, "validation": 400, "test": 1254}
    assert_sound(task, enough, "ABCDE")
    assert enough == splits(task_at(tmp_path, "aqua_rat"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(1, correct="F"), r"row 2 of .*dev\.json gives 'F' as its answer, which is none of A, B, C, D, E; mend"),
        (row(1) | {"options": ["A)1", "C)2"]}, r"row 2 of .*dev\.json has options lettered A, C, not A, B, C, D, E"),
        (row(1) | {"options": "A)1 B)2"}, r"row 2 of .*dev\.json has no list of texts in the column 'options'"),
        (row(1) | {"question": " "}, r"row 2 of .*dev\.json has no text of the question"),
        ({"question": "q"}, r"row 2 of .*dev\.json has options lettered nothing"),
        ({"question": "q", "options": row(1)["options"]}, r"row 2 of .*dev\.json has no column 'correct'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, wrong, message):
    write(tmp_path, 1)
    write_jsonl(tmp_path / "dev.json", [row(0), wrong])
    with pytest.raises(ConfigError, match=message) as error:
        task_at(tmp_path, "aqua_rat").load("validation")
    assert "\n" not in str(error.value)


def test_a_torn_line_and_a_missing_file_are_named(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "train.json").unlink()
    with pytest.raises(ConfigError, match=r"no file .*train\.json; data files in .*: dev\.json, test\.json"):
        task_at(tmp_path, "aqua_rat").load("train")
    (tmp_path / "aqua_train.tsv").write_text(tsv(1) + "only a question\n")
    with pytest.raises(ConfigError, match=r"aqua_train\.tsv, line 2 has 1 columns, not the 3 of question, correct"):
        task_at(tmp_path, "aqua_rat").load("train")


def test_the_real_files(aqua_rat_path):
    task = task_at(aqua_rat_path, "aqua_rat")
    found = splits(task)
    # 2,728 rows, less 586 repeated stems, 3 stems of dev and test, and 9 with the right option twice.
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2130, "validation": 254, "test": 254}
    assert_sound(task, found, "ABCDE")
    assert len({stem(question) for question in found["train"]}) == 2130
    assert not [question for question in found["train"] if "\\n" in question.text + question.reference]
    assert to_questions(task.load("test")) == found["test"]
