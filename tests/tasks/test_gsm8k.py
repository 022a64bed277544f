"""GSM8K has the paper's splits, and its references and prompts are as documented."""

import json
from pathlib import Path

import pytest

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Verdict
from aft_ray.tasks import build_task, load_split


def test_the_papers_splits(gsm8k_path: Path) -> None:
    task = build_task(DataConfig(task="gsm8k", path=str(gsm8k_path)), 0)
    splits = {split: load_split(task, split, None, 0) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 7473, "validation": 400, "test": 919}
    assert len({q.text for q in splits["validation"]} | {q.text for q in splits["test"]}) == 1319
    other_seed = build_task(DataConfig(task="gsm8k", path=str(gsm8k_path)), 1)
    assert load_split(other_seed, "validation", None, 1) == splits["validation"]


def test_every_reference_verifies_and_has_no_calculator_marks(gsm8k_path: Path) -> None:
    task = build_task(DataConfig(task="gsm8k", path=str(gsm8k_path), answer_marker="The answer is"), 0)
    for split in ("train", "validation", "test"):
        for question in load_split(task, split, None, 0):  # type: ignore[arg-type]
            assert "<<" not in question.reference
            assert "####" not in question.reference
            assert task.same(task.extract(question.reference), question.gold).verdict is Verdict.RIGHT


def test_the_default_prompt_and_one_from_the_config(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 1)
    plain = build_task(DataConfig(task="gsm8k", path=str(tmp_path)), 0)
    question = load_split(plain, "train", None, 0)[0]
    assert question.reference == "two and two is 4\n#### 4"
    assert question.id == "gsm8k-train-000000"
    assert plain.prompt(question) == "Question: how many? 0\nAnswer:"
    own = build_task(DataConfig(task="gsm8k", path=str(tmp_path), prompt="{question} Think!"), 0)
    assert own.prompt(question) == "how many? 0 Think!"


def test_too_small_a_test_file(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", 400)
    with pytest.raises(ConfigError, match="400 of them are validation"):
        build_task(DataConfig(task="gsm8k", path=str(tmp_path)), 0).load("test")


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*train\.jsonl"):
        build_task(DataConfig(task="gsm8k", path=str(tmp_path / "nowhere")), 0).load("train")


def test_a_row_without_an_answer(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "q", "answer": "no marker"}))
    with pytest.raises(ConfigError, match="row 1 of gsm8k's train split has no answer"):
        build_task(DataConfig(task="gsm8k", path=str(tmp_path)), 0).load("train")


def write(path: Path, rows: int) -> None:
    row = {"answer": "two and two is <<2+2=4>>4\n#### 4"}
    path.write_text("".join(json.dumps(row | {"question": f"how many? {i}"}) + "\n" for i in range(rows)))
