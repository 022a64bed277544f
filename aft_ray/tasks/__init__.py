"""Reasoning tasks by name. Importing this is light: `datasets` and the tasks themselves are imported when asked for."""

from __future__ import annotations

import random

from aft_ray.config import ConfigError, DataConfig
from aft_ray.records import Question, unique_ids
from aft_ray.tasks.base import SPLITS, Split, Task, questions

__all__ = ["SPLITS", "Split", "Task", "build_task", "load_split", "questions"]


def build_task(data: DataConfig, seed: int) -> Task:
    """The task that `data` describes. `seed`, the run's, fixes a validation split drawn from the training one."""
    if data.task == "arithmetic":
        from aft_ray.tasks.arithmetic import ArithmeticTask

        return ArithmeticTask(data)
    if data.task == "gsm8k":
        from aft_ray.tasks.gsm8k import Gsm8kTask

        return Gsm8kTask(data)
    from aft_ray.tasks.custom import CustomTask

    return CustomTask(data, seed)


def load_split(task: Task, split: Split, limit: int | None, seed: int) -> list[Question]:
    """The questions of a split in their order; with a `limit`, that many of them, drawn by `seed`.

    Raises ConfigError when the split cannot be read or is empty, or an id occurs twice.
    """
    rows = questions(task.load(split))
    if limit is not None and limit < len(rows):
        drawn = random.Random(f"{seed}/{split}").sample(range(len(rows)), limit)
        rows = [rows[index] for index in sorted(drawn)]
    try:
        unique_ids(rows)
    except ValueError as error:
        raise ConfigError(f"the {split} split of {task.name}: {error}") from error
    return rows
