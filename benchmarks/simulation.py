"""Claim: a simulation calibrated on a run's first round foretells the others, where speeds hold still.

For each finished run directory: engines, workers and answers are read off its first sampled round alone
(`aft-ray simulate --like`), the whole run is simulated, and the time from the end of round 1's training to the end of
the last round's is compared with that of the run. Nothing is started; a run of `make demo` will do.

    python benchmarks/simulation.py runs/demo/seed0/aft
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from aft_ray.observe.summary import read_events
from aft_ray.planning.simulation.assumptions import SimulationAssumptions
from aft_ray.planning.simulation.calibration import assumptions_like
from aft_ray.planning.simulation.simulate import simulate
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.versions import read_config


def main(runs: Annotated[list[str], typer.Argument(help="run directories of at least two rounds")]) -> None:
    """Simulated and measured seconds of a round, after the first."""
    typer.echo("run | staleness | rounds | measured s/round | simulated s/round | ratio")
    for run in runs:
        config, events = read_config(RunDir(run)), read_events(RunDir(run))
        trained = [event["time"] for event in events if event["event"] == "trained" and event["round"] > 0]
        if len(trained) < 2:
            raise SystemExit(f"{run} has trained {len(trained)} rounds; two are needed, since the first calibrates")
        simulated = simulate(config, SimulationAssumptions(**assumptions_like(run)))
        measured = (trained[-1] - trained[0]) / (len(trained) - 1)
        typer.echo(
            f"{run} | {config.rounds.max_staleness} | {len(trained)} | {measured:.1f} | {simulated.steady_s:.1f} | "
            f"{simulated.steady_s / measured:.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
