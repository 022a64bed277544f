"""Makes objectives by name: a name of `aft_ray.config.objectives.OBJECTIVES`, or the import path of an own class.

Invariant: only the module of the objective that is asked for is imported.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from aft_ray.config.objectives import OBJECTIVES
from aft_ray.objectives.base import Objective


def objective_class(name: str) -> type[Objective]:
    """The class of an objective.

    Args:
        name: one of `OBJECTIVES`, or `module:class` for a class of your own that derives from `Objective`.

    Raises:
        ValueError: the name is not known, or the import path does not lead to a complete objective. The message says
            what is missing.
    """
    if name in OBJECTIVES:
        return _import_class(OBJECTIVES[name].path)
    if ":" in name:
        return _import_class(name)
    raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}; an own one is given as module:class")


def build_objective(name: str, **options: Any) -> Objective:
    """An objective with these options; those that are left out have the defaults of its class.

    Args:
        name: as `objective_class` takes it.

    Raises:
        ValueError: the objective is not known, does not take one of the options, or refuses the value of one.
    """
    kind = objective_class(name)
    known = list(inspect.signature(kind).parameters)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"objective {name!r} has no option {option!r}; {takes}")
    return kind(**options)


def _import_class(path: str) -> type[Objective]:
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"the module of objective {path!r} cannot be imported: {error}") from error
    kind = getattr(module, class_name, None)
    if kind is None:
        raise ValueError(f"objective {path!r} does not exist: the module {module_name} has no {class_name!r}")
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ValueError(f"{path!r} is no objective: it must be a class that derives from aft_ray.objectives.Objective")
    if inspect.isabstract(kind):
        raise ValueError(f"objective {path!r} does not implement {', '.join(sorted(kind.__abstractmethods__))}")
    return kind
