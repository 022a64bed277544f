"""What a run needs before it starts: memory, placement, time and cost, from its config and a description of the nodes.

Invariant: pure arithmetic. Nothing here starts Ray, loads weights or imports torch, and every number has its formula.
"""

from aft_ray.planning.plan.plan import RunPlan as RunPlan
from aft_ray.planning.plan.plan import plan as plan
