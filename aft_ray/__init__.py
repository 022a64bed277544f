"""Alignment Fine-Tuning of language models into better reasoners, on a Ray cluster.

This module exports the public API. Each name is imported from its module when it is first used, so `import aft_ray`
imports none of the libraries that the package depends on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aft_ray.config.run import RunConfig, load_config
    from aft_ray.config.section import ConfigError
    from aft_ray.config.serve import ServeConfig, load_serve_config
    from aft_ray.objectives import Objective, ScoredGroups, build_objective
    from aft_ray.storage.ledger import Ledger
    from aft_ray.storage.records import Candidate, Group, Question, Verdict
    from aft_ray.storage.run_dir import RunDir, RunDirError
    from aft_ray.storage.versions import PublishedVersion, find_run, find_version, read_config
    from aft_ray.tasks import Task, build_task, build_tasks

__version__ = "0.2.0"

__all__ = [
    "Candidate",
    "ConfigError",
    "Group",
    "Ledger",
    "Objective",
    "PublishedVersion",
    "Question",
    "RunConfig",
    "RunDir",
    "RunDirError",
    "ScoredGroups",
    "ServeConfig",
    "Task",
    "Verdict",
    "__version__",
    "build_objective",
    "build_task",
    "build_tasks",
    "find_run",
    "find_version",
    "load_config",
    "load_serve_config",
    "read_config",
]

_MODULES = {
    "aft_ray.config.run": ("RunConfig", "load_config"),
    "aft_ray.config.section": ("ConfigError",),
    "aft_ray.config.serve": ("ServeConfig", "load_serve_config"),
    "aft_ray.objectives": ("Objective", "ScoredGroups", "build_objective"),
    "aft_ray.storage.ledger": ("Ledger",),
    "aft_ray.storage.records": ("Candidate", "Group", "Question", "Verdict"),
    "aft_ray.storage.run_dir": ("RunDir", "RunDirError"),
    "aft_ray.storage.versions": ("PublishedVersion", "find_run", "find_version", "read_config"),
    "aft_ray.tasks": ("Task", "build_task", "build_tasks"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so that this function is called once for each name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
