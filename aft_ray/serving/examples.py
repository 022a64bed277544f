"""Example questions for a served model's web page, from tasks that generate questions without reading a data set."""

from __future__ import annotations

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.tasks import build_task, load_split

_COUNT = 5


def example_questions(run: RunConfig, name: str) -> list[str]:
    """Returns a few questions of the task `name`; none if its questions are in files or it has too few of them."""
    data = run.task_configs[name]
    if data.task != "arithmetic":
        return []
    small = data.arithmetic.model_copy(update={"test_size": _COUNT})
    task = build_task(data.model_copy(update={"arithmetic": small}), run.seed, name)
    try:
        return [question.text for question in load_split(task, "test", None, run.seed)]
    except ConfigError:  # the task has too few different problems
        return []
