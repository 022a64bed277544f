"""Reasoning tasks by name. Importing this is light: `datasets` and the tasks themselves are imported when asked for."""

from __future__ import annotations

import random

from aft_ray.config.run import ConfigError, DataConfig, RunConfig
from aft_ray.storage.records import Question, unique_ids
from aft_ray.tasks.base import SPLITS, Split, Task, questions

__all__ = ["SPLITS", "Split", "Task", "build_task", "build_tasks", "load_split", "questions"]


def build_tasks(config: RunConfig) -> dict[str, Task]:
    """The tasks of a run, by the name that their questions carry as `Question.task`."""
    return {name: build_task(data, config.seed, name) for name, data in config.task_configs.items()}


def build_task(data: DataConfig, seed: int, name: str | None = None) -> Task:
    """The task that `data` describes, under a name of its own or its task's.

    `seed`, the run's, fixes a validation split drawn from the training one.
    """
    name = name or data.task
    match data.task:
        case "arithmetic":
            from aft_ray.tasks.arithmetic import ArithmeticTask

            return ArithmeticTask(data, name)
        case "gsm8k":
            from aft_ray.tasks.gsm8k import Gsm8kTask

            return Gsm8kTask(data, name)
        case "aqua_rat":
            from aft_ray.tasks.aqua_rat import AquaRatTask

            return AquaRatTask(data, name)
        case "ecqa":
            from aft_ray.tasks.ecqa import EcqaTask

            return EcqaTask(data, name)
        case "mmlu":
            from aft_ray.tasks.mmlu import MmluTask

            return MmluTask(data, name)
        case "custom":
            from aft_ray.tasks.custom import CustomTask

            return CustomTask(data, seed, name)


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
