"""Helpers for tests of multiple-choice tasks: files with rows, tasks that read them, and checks of all splits."""

import json
from pathlib import Path
from typing import Any

from aft_ray.config.run import DataConfig
from aft_ray.storage.records import Question, Verdict
from aft_ray.tasks import Task, build_task, load_split


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def task_at(path: Path, task: str, **settings: Any) -> Task:
    return build_task(DataConfig.model_validate({"task": task, "path": str(path), **settings}), 0)


def splits(task: Task) -> dict[str, list[Question]]:
    return {split: load_split(task, split, None, 0) for split in ("train", "validation", "test")}  # type: ignore[arg-type]


def stem(question: Question) -> str:
    return question.text.partition("\n(A) ")[0]


def assert_sound(task: Task, found: dict[str, list[Question]], letters: str) -> None:
    """Each gold answer is the letter of an option, each reference is right, and no two splits share a question."""
    for questions in found.values():
        for question in questions:
            shown = [line[1] for line in question.text.splitlines() if line[:1] == "(" and line[2:3] == ")"]
            assert "".join(shown).endswith(letters)
            assert question.gold in letters
            assert task.same(task.extract(question.reference), question.gold).verdict is Verdict.RIGHT
    stems = {split: {stem(question) for question in questions} for split, questions in found.items()}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert stems[one].isdisjoint(stems[other])
    ids = [question.id for questions in found.values() for question in questions]
    assert len(set(ids)) == len(ids)
