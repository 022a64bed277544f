"""Builds reasoning tasks from the config and loads their splits.

Invariant: importing this package is light. The `datasets` library and the modules of the tasks are imported only when
a task is built or loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module

from aft_ray.config.run import ConfigError, DataConfig, RunConfig
from aft_ray.config.tasks import TaskName
from aft_ray.storage.records import Question, unique_ids
from aft_ray.tasks.base import SPLITS, Split, Task, to_questions

__all__ = ["SPLITS", "Split", "Task", "build_task", "build_tasks", "load_split", "to_questions"]

# The import path of the factory of each built-in task. A factory takes the task's config, the task's name and the run's
# seed.
TaskFactory = Callable[[DataConfig, str, int], Task]
BUILT_IN_TASKS: dict[TaskName, str] = {
    "arithmetic": "aft_ray.tasks.arithmetic.task:ArithmeticTask",
    "gsm8k": "aft_ray.tasks.gsm8k:Gsm8kTask",
    "aqua_rat": "aft_ray.tasks.aqua_rat:AquaRatTask",
    "ecqa": "aft_ray.tasks.ecqa:EcqaTask",
    "mmlu": "aft_ray.tasks.mmlu:MmluTask",
    "custom": "aft_ray.tasks.custom:CustomTask",
}


def build_tasks(config: RunConfig) -> dict[str, Task]:
    """The tasks of a run by name. `Question.task` holds the name of the task that a question belongs to."""
    return {name: build_task(data, config.seed, name) for name, data in config.task_configs.items()}


def build_task(data: DataConfig, seed: int, name: str | None = None) -> Task:
    """The task that `data` describes.

    Args:
        data: The config of the task.
        seed: The seed of the run. It determines a validation split that is drawn from the training split.
        name: The name of the task in the run; by default `data.task`.
    """
    module, _, factory_name = BUILT_IN_TASKS[data.task].partition(":")
    factory: TaskFactory = getattr(import_module(module), factory_name)
    return factory(data, name or data.task, seed)


def load_split(task: Task, split: Split, limit: int | None, seed: int) -> list[Question]:
    """The questions of a split in the order of their source.

    Args:
        limit: The largest number of questions to return; `seed` determines which ones are drawn. None returns all.

    Raises:
        ConfigError: The split cannot be read, has no questions, or has two questions with the same id.
    """
    rows = to_questions(task.load(split))
    if limit is not None and limit < len(rows):
        drawn = random.Random(f"{seed}/{split}").sample(range(len(rows)), limit)
        rows = [rows[index] for index in sorted(drawn)]
    try:
        unique_ids(rows)
    except ValueError as error:
        raise ConfigError(f"the {split} split of {task.name}: {error}") from error
    return rows
