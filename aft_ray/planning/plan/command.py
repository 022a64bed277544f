"""`aft-ray plan`: reads a config, a node and assumptions, prints the plan, and refuses what cannot fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.planning.plan.assumptions import assume
from aft_ray.planning.plan.hardware import ClusterShape, load_node
from aft_ray.planning.plan.plan import fewest_nodes, plan
from aft_ray.planning.plan.report import as_json, rendered


def plan_run(
    config: RunConfig,
    nodes: int | None,
    node: str | None,
    assumptions: Sequence[str],
    price_per_gpu_hour: float | None,
    output: Path | None,
    console: Console,
) -> None:
    """Prints the plan, then raises ConfigError with the first thing that does not fit, if one does not.

    nodes: none: as few as the config's split needs. node: a preset or a YAML file; none: h100-80gb for a config with
    GPUs, cpu without.
    """
    on_gpus = config.training.gpus_per_worker or config.sampling.gpus_per_sampler
    kind = load_node(node or ("h100-80gb" if on_gpus else "cpu"))
    cluster = ClusterShape(kind, nodes) if nodes else fewest_nodes(config, ClusterShape(kind, 1))
    made = plan(config, cluster, assume(assumptions), price_per_gpu_hour)
    console.print(rendered(made))
    if output:
        output.write_text(json.dumps(as_json(made), indent=1))
    if made.problems:
        raise ConfigError(made.problems[0])
