"""Questions to try a served model with, where a task can make some without reading a data set."""

from __future__ import annotations

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.tasks import build_task, load_split

_EXAMPLES = 5


def examples(run: RunConfig, name: str) -> list[str]:
    """A few questions of the task; none where they lie in files, or where there are not that many."""
    data = run.task_configs[name]
    if data.task != "arithmetic":
        return []
    few = data.arithmetic.model_copy(update={"test_size": _EXAMPLES})
    task = build_task(data.model_copy(update={"arithmetic": few}), run.seed, name)
    try:
        return [question.text for question in load_split(task, "test", None, run.seed)]
    except ConfigError:  # so small that there are not that many problems
        return []
