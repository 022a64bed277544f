"""Estimates of a run before it starts: `plan` computes memory, placement, time and cost from the config and a
description of the nodes; `simulation` runs the scheduling code in virtual time.

Invariants: nothing here starts Ray or loads weights. `plan` is pure arithmetic without torch, and every number of it
has its formula.
"""

from aft_ray.planning.plan.plan import RunPlan as RunPlan
from aft_ray.planning.plan.plan import plan as plan
