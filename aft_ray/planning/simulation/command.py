"""`aft-ray simulate`: simulates a run, or several that differ in one config key, and prints and draws the results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from aft_ray.config.keys import describe_keys
from aft_ray.config.loader import apply_override, parse_section
from aft_ray.config.run import ConfigError, RunConfig, load_config
from aft_ray.planning.simulation.assumptions import SimulationAssumptions


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of the command."""

    config: Path
    overrides: list[str]
    assume: list[str]
    like: str | None
    mtbf_hours: float | None
    rounds: int | None
    seed: int
    staleness: str | None
    compare: str | None
    plot: Path | None
    json_file: Path | None


def simulate_all(request: Request, console: Console) -> None:
    """Simulates the run, or each of the runs to compare, and shows the results. Raises ConfigError."""
    if request.assume == ["help"]:
        console.print("\n".join(describe_keys(SimulationAssumptions)), markup=False, highlight=False)
        return
    from aft_ray.planning.simulation.report import comparison_of, draw, figures_of, rounds_of, totals_of
    from aft_ray.planning.simulation.simulate import simulate

    variants = _variants(request)
    if request.plot and len(variants) > 1:
        raise ConfigError("--plot draws one run; leave --staleness and --compare out")
    configs = {label: _config(request, override) for label, override in variants.items()}
    assumed = _assumptions(request)
    simulated = {label: simulate(config, assumed, request.seed) for label, config in configs.items()}
    if len(simulated) > 1:
        console.print(comparison_of(simulated))
    for one in simulated.values() if len(simulated) == 1 else ():
        console.print(rounds_of(one))
        console.print("\n".join(totals_of(one)), markup=False, highlight=False)
        if request.plot:
            draw(one, request.plot)
    if request.json_file:
        figures = {label: figures_of(one) for label, one in simulated.items()}
        text = {"assumed": assumed.model_dump(), "simulated": figures}
        request.json_file.write_text(json.dumps(text, indent=1) + "\n")


def _variants(request: Request) -> dict[str, list[str]]:
    """The runs to simulate: the label of each, and the overrides of its config."""
    if request.staleness and request.compare:
        raise ConfigError("--staleness and --compare are two comparisons; ask for one at a time")
    comparison = f"rounds.max_staleness={request.staleness}" if request.staleness else request.compare
    if not comparison:
        return {"run": []}
    key, equals, values = comparison.partition("=")
    if not equals or not values:
        raise ConfigError(f"--compare {comparison!r} is not of the form KEY=VALUE,VALUE")
    return {f"{key}={value}": [f"{key}={value}"] for value in values.split(",")}


def _config(request: Request, override: list[str]) -> RunConfig:
    rounds = [f"rounds.count={request.rounds}"] if request.rounds else []
    return load_config(request.config, [*request.overrides, *rounds, *override])


def _assumptions(request: Request) -> SimulationAssumptions:
    """The assumptions: the defaults, replaced by those of `--like`, replaced by those on the command line."""
    tree: dict[str, Any] = {}
    if request.like:
        from aft_ray.planning.simulation.calibration import assumptions_like

        tree |= assumptions_like(request.like)
    if request.mtbf_hours:
        tree["mtbf_hours"] = request.mtbf_hours
    for override in request.assume:
        apply_override(tree, override)
    return parse_section(SimulationAssumptions, tree)
