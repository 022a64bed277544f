"""The command `aft-ray plan`: prints the plan of a config on a kind of node, and refuses a run that does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.planning.plan.assumptions import parse_assumptions
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
    """Prints the plan of a run.

    Args:
        config: The run.
        nodes: The number of nodes; None means as few as the config's split needs.
        node: The name of a preset or the path of a YAML file; None means h100-80gb for a config with GPUs, else cpu.
        assumptions: Assumptions as `name=value`.
        price_per_gpu_hour: The price of a GPU-hour, in any currency.
        output: A file for the plan as JSON.
        console: Where to print.

    Raises:
        ConfigError: The run does not fit, with the first reason. The plan is printed before.
    """
    on_gpus = config.training.gpus_per_worker or config.sampling.gpus_per_sampler
    node_type = load_node(node or ("h100-80gb" if on_gpus else "cpu"))
    cluster = ClusterShape(node_type, nodes) if nodes else fewest_nodes(config, node_type)
    run_plan = plan(config, cluster, parse_assumptions(assumptions), price_per_gpu_hour)
    console.print(rendered(run_plan))
    if output:
        output.write_text(json.dumps(as_json(run_plan), indent=1))
    if run_plan.problems:
        raise ConfigError(run_plan.problems[0])
