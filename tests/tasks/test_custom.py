"""The user's own data is read by its columns and split without overlap; mistakes in it give one clear sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks import Task, build_task, load_split


def task(path: Path, prompt: str | None = None, seed: int = 0, **columns: Any) -> Task:
    custom = {"train": "train.jsonl"} | columns
    return build_task(DataConfig.model_validate({"task": "custom", "path": str(path), "custom": custom}), seed)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def rows(size: int) -> list[dict[str, Any]]:
    return [{"question": f"what is {i} + 1? π", "answer": f"so #### {i + 1}"} for i in range(size)]


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_reads_files(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, rows(40))
    write(tmp_path / "v.jsonl", rows(3))
    found = load_split(task(tmp_path, train=name, validation="v.jsonl"), "train", None, 0)
    assert found[7] == Question("custom-train-000007", "what is 7 + 1? π", "so #### 8", "8", "custom")
    assert len(found) == 40


def test_named_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"q": f"q{i}", "r": "because", "g": i, "key": f"k{i}"} for i in range(3)])
    names = {"question": "q", "reference": "r", "gold": "g", "id": "key"}
    found = load_split(task(tmp_path, test="train.jsonl", **names), "test", None, 0)
    assert [(q.id, q.text, q.reference, q.gold) for q in found] == [
        (f"k{i}", f"q{i}", "because", f"{i}") for i in range(3)
    ]


def test_validation_is_drawn_from_train_without_overlap(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(100))
    drawn = task(tmp_path)
    train, validation = load_split(drawn, "train", None, 0), load_split(drawn, "validation", None, 0)
    assert (len(train), len(validation)) == (95, 5)
    assert {q.id for q in train} | {q.id for q in validation} == {f"custom-train-{i:06d}" for i in range(100)}
    assert load_split(task(tmp_path, seed=1), "validation", None, 0) != validation
    assert load_split(task(tmp_path), "validation", None, 0) == validation


def test_at_least_one_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(2))
    assert len(load_split(task(tmp_path), "validation", None, 0)) == 1
    write(tmp_path / "train.jsonl", rows(1))
    with pytest.raises(ConfigError, match="1 rows, too few"):
        load_split(task(tmp_path), "train", None, 0)


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n\n{"question": \n', {}, r"train\.jsonl, line 3 is not valid JSON"),
        ("[1]\n", {}, r"line 1 is a JSON list"),
        ('{"frage": "a", "answer": "#### 1"}\n' * 2, {}, r"no column 'question'.*it has answer, frage"),
        ('{"question": null, "answer": "#### 1"}\n' * 2, {}, "empty column 'question'"),
        ('{"question": "a", "answer": "1"}\n' * 2, {}, "row 1 of train.jsonl has no gold answer"),
        ("", {"validation": "train.jsonl"}, "data.custom.train=train.jsonl has no questions"),
        ("", {"train": "other.jsonl"}, r"no file .*other\.jsonl; data files in .*: train\.jsonl"),
        ("", {"train": "train.csv"}, "no file"),
    ],
)
def test_mistakes_are_one_clear_sentence(tmp_path: Path, lines: str, columns: dict[str, Any], message: str) -> None:
    (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=message) as caught:
        load_split(task(tmp_path, **columns), "train", None, 0)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind_and_torn_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question,answer\n")
    with pytest.raises(ConfigError, match="none of the files that can be read"):
        load_split(task(tmp_path, train="train.csv"), "train", None, 0)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        load_split(task(tmp_path, train="train.parquet"), "train", None, 0)
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot read"):
        load_split(task(tmp_path), "train", None, 0)


def test_no_test_split_and_no_directory(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(10))
    with pytest.raises(ConfigError, match=r"name it with data\.custom\.test"):
        load_split(task(tmp_path), "test", None, 0)
    with pytest.raises(ConfigError, match="is not a directory"):
        load_split(task(tmp_path / "nowhere"), "train", None, 0)


def test_repeated_ids(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row | {"key": "same"} for row in rows(2)])
    with pytest.raises(ConfigError, match="'same'"):
        load_split(task(tmp_path, id="key", validation="train.jsonl"), "train", None, 0)


def test_importing_tasks_is_light() -> None:
    program = "import sys, aft_ray.tasks; print({'datasets', 'torch', 'transformers', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
