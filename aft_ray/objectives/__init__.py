"""The losses on a group, pure torch: `build_objective` makes one by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from aft_ray.objectives.alignment import AftBoundary, AftDetached, AftDetachedLowest, Align
from aft_ray.objectives.base import Objective, ScoredGroups
from aft_ray.objectives.preference import Dpo, Dpop, Grpo, Irpo
from aft_ray.objectives.ranking import Pro, ProDetached, Rrhf, RrhfDetached
from aft_ray.objectives.supervised import Rft, Vft, l_vft, reference_nll

__all__ = ["OBJECTIVES", "Objective", "ScoredGroups", "build_objective", "l_vft", "reference_nll"]

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        Vft, Rft, Align, AftDetached, AftDetachedLowest, AftBoundary, Rrhf, RrhfDetached, Pro, ProDetached, Dpo, Irpo,
        Dpop, Grpo,
    )
}  # fmt: skip


def build_objective(name: str, **options: Any) -> Objective:
    """The objective of that name. Raises ValueError naming the known objectives, or the options the objective takes."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"objective {name!r} has no option {option!r}; {takes}")
    return kind(**options)
