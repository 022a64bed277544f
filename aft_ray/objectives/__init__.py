"""The losses on groups of candidates, in pure torch. `build_objective(name, **options)` makes one.

`base` has what an objective is given and what it returns; `supervised`, `alignment`, `ranking` and `preference` have
one family of losses each; `beta` has the rules that set the boundary of `aft_boundary` without a search.
"""

from aft_ray.objectives.base import Objective, ScoredGroups
from aft_ray.objectives.registry import build_objective, objective_class
from aft_ray.objectives.supervised import l_vft, reference_nll

__all__ = ["Objective", "ScoredGroups", "build_objective", "l_vft", "objective_class", "reference_nll"]
