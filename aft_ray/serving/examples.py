"""Questions to try a served model with, where a task can make some without reading a data set."""

from __future__ import annotations

import functools

from aft_ray.config import RunConfig
from aft_ray.tasks import build_task, load_split

_EXAMPLES = 5


@functools.lru_cache(maxsize=32)
def _of_task(dumped: str, name: str, seed: int) -> tuple[str, ...]:
    from aft_ray.config import DataConfig

    data = DataConfig.model_validate_json(dumped)
    few = data.arithmetic.model_copy(update={"test_size": _EXAMPLES})
    task = build_task(data.model_copy(update={"arithmetic": few}), seed, name)
    return tuple(question.text for question in load_split(task, "test", None, seed))


def examples(run: RunConfig, name: str) -> list[str]:
    """A few questions of the task; none for a task whose questions lie in files."""
    data = run.task_configs[name]
    return list(_of_task(data.model_dump_json(), name, run.seed)) if data.task == "arithmetic" else []
