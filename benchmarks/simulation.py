"""Claim: a simulation that is calibrated on a run's first round predicts the time of the other rounds.

The claim holds while the speeds of the machine do not change. For each finished run directory, the speeds of engines
and workers and the lengths of responses are taken from the first sampled round alone (`aft-ray simulate --like`). Then
the whole run is simulated. The time from the end of round 1's training to the end of the last round's training is
compared with that of the run. Nothing is started; a run of `make demo` is enough.

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


def main(runs: Annotated[list[str], typer.Argument(help="run directories with at least two trained rounds")]) -> None:
    """Compare simulated and measured seconds per round, without the first round."""
    typer.echo("run | staleness | rounds | measured s/round | simulated s/round | ratio")
    for run in runs:
        config, events = read_config(RunDir(run)), read_events(RunDir(run))
        trained = [event["time"] for event in events if event["event"] == "trained" and event["round"] > 0]
        if len(trained) < 2:
            raise SystemExit(f"{run} has trained {len(trained)} rounds; two are needed, since the first one calibrates")
        simulated = simulate(config, SimulationAssumptions(**assumptions_like(run)))
        measured = (trained[-1] - trained[0]) / (len(trained) - 1)
        typer.echo(
            f"{run} | {config.rounds.max_staleness} | {len(trained)} | {measured:.1f} | {simulated.steady_s:.1f} | "
            f"{simulated.steady_s / measured:.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
