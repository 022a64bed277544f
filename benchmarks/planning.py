"""Claim: calibrated on one run of a machine, `aft-ray plan` predicts other runs there within a factor of 1.5.

The benchmark makes small real runs on the CPU, with one sampler and one train worker that alternate. They differ in k,
in the length of responses, in the number of optimiser steps and in the size of the model. Existing run directories can
be given instead.

The last round of the first run calibrates two constants of the machine: the FLOP/s that its CPU reaches in training,
and the seconds that its engine needs for a token outside the model. Every round of every run is then planned with these
two constants and with the mean lengths and the share of groups with a signal that the round reports. The planned times
are compared with those in the run's metrics. The ratio of the calibrating round is 1 by construction; all others are
predictions.

    python benchmarks/planning.py --json planning.json             # about 8 minutes
    python benchmarks/planning.py runs/demo/seed0/aft runs/smoke   # CPU runs of this machine; the first calibrates
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from aft_ray.config.run import RunConfig, parse_config
from aft_ray.planning import RunPlan, plan
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.hardware import NODES, ClusterShape
from aft_ray.storage.run_dir import RunDir

TARGET = 1.5
# Name of a run, what it changes in the config, and the model's hidden size, layers and heads.
BASE_MODEL = (128, 4, 4)
VARIANTS: list[tuple[str, dict[str, dict[str, Any]], tuple[int, int, int]]] = [
    ("calibration", {}, BASE_MODEL),
    ("k = 12", {"sampling": {"k": 12}}, BASE_MODEL),
    ("responses half as long", {"sampling": {"max_tokens": 32}}, BASE_MODEL),
    ("twice the passes, small steps", {"training": {"epochs": 8, "groups_per_step": 32}}, BASE_MODEL),
    ("a model of 8.5 times the weights", {}, (256, 8, 8)),
]


@dataclass(frozen=True)
class Round:
    """A round that was measured.

    Attributes:
        name: The run and the round.
        sampling: Seconds of sampling; None for round 0, which trains on references alone.
        training: Seconds of training.
        response: Mean tokens of a candidate.
        row: Mean tokens of a trained row.
        signal: Share of groups with right and wrong candidates.
    """

    name: str
    sampling: float | None
    training: float
    response: float
    row: float
    signal: float


def main(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="existing run directories; none: the benchmark makes its own")
    ] = None,
    questions: Annotated[int, typer.Option(help="questions in a round of its own runs")] = 240,
    epochs: Annotated[int, typer.Option(help="passes over a round's groups in its own runs")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Prints planned and measured seconds of sampling and training."""
    from aft_ray.storage.versions import read_config
    from jobs.tiny_model import build_tiny_model

    made: list[tuple[Round, RunConfig]] = []
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        for path in runs or []:
            config = read_config(RunDir(str(path)))
            made += [(measured, config) for measured in _rounds("/".join(path.parts[-3:]), RunDir(str(path)), config)]
        for number, (name, sections, (hidden, layers, heads)) in enumerate(VARIANTS if not runs else []):
            model = build_tiny_model(f"{scratch}/model-{number}", 0, hidden, layers, heads)
            config = _config(f"{scratch}/run-{number}", str(model), questions, epochs, sections)
            _run(config)
            made += [(measured, config) for measured in _rounds(name, RunDir(config.run_dir), config)]
            typer.echo(f"{name}: done")
        results = _compare(made)
    _show(results)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))


def _config(run_dir: str, model: str, questions: int, epochs: int, sections: dict[str, dict[str, Any]]) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": run_dir,
        "model": {"name": model, "dtype": "float32", "max_length": 256},
        "data": {"task": "arithmetic", "arithmetic": {"train_size": questions}},
        "vft": {"epochs": 0},
        "rounds": {"count": 2, "max_staleness": 0, "evaluate_every": 0},
        "sampling": {"k": 6, "max_tokens": 64},
        "training": {"epochs": epochs, "learning_rate": 1e-9, "tokens_per_microbatch": 4096},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return parse_config(tree)


def _run(config: RunConfig) -> None:
    from aft_ray.observe.logs import library_output_to
    from aft_ray.observe.reporter import Reporter
    from aft_ray.run.launch import run

    run_dir = RunDir(config.run_dir)
    with library_output_to(run_dir.local_path("logs/driver.log")) as console, Reporter(run_dir, console) as reporter:
        run(config, reporter)


def _rounds(name: str, run_dir: RunDir, config: RunConfig) -> list[Round]:
    """The rounds of a run, read from its metrics."""
    from aft_ray.observe.summary import read_events

    events = read_events(run_dir)
    sampled = {event["round"]: event for event in events if event["event"] == "sampled"}
    trained = {event["round"]: event for event in events if event["event"] == "trained"}
    found = []
    for number, event in sorted(trained.items()):
        answers = sampled.get(number)
        signal = answers["signal"] if answers else 0.0
        k = answers["candidates"] if answers else 0.0
        rows = 1 + signal * k
        passes = config.training.epochs if number else config.vft.epochs
        found.append(
            Round(
                f"{name}, round {number}",
                answers["seconds"] if answers else None,
                event["train_s"],
                answers["tokens"] / (answers["groups"] * k) if answers else 1.0,
                event["tokens"] / (event["groups"] * passes * rows),
                signal,
            )
        )
    return found


def _plan(measured: Round, config: RunConfig, response: float, gflops: float, token_overhead_s: float) -> RunPlan:
    """A plan whose only unknowns are the two constants. It assumes that the prompt is half of a trained row."""
    assumptions = PlanAssumptions(
        prompt_tokens=measured.row / 2,
        response_tokens=response,
        signal=measured.signal,
        distinct=1,
        filling=0.9,
        mfu=1,
        prefill_mfu=1,
        memory_efficiency=1,
        pass_overhead_s=0,
        step_overhead_s=0,
        token_overhead_s=token_overhead_s,
        round_overhead_s=2,
    )
    node = NODES["cpu"].model_copy(update={"cpu_gflops": gflops})
    return plan(config, ClusterShape(node, 1), assumptions)


def _planned(measured: Round, config: RunConfig, gflops: float, token_overhead_s: float) -> tuple[float, float]:
    """The planned seconds of sampling and of training. Candidates may be longer than the rows that are trained on."""
    training = _plan(measured, config, measured.row / 2, gflops, token_overhead_s)
    if measured.sampling is None:
        return 0.0, training.vft.seconds
    sampling = _plan(measured, config, measured.response, gflops, token_overhead_s)
    assert sampling.sampling is not None
    return sampling.sampling.seconds + sampling.planner.assumptions.round_overhead_s, training.training.seconds


def _compare(made: list[tuple[Round, RunConfig]]) -> dict[str, Any]:
    of_first = [measured for measured, config in made if config is made[0][1] and measured.sampling is not None]
    first, config = of_first[-1], made[0][1]
    assert first.sampling is not None
    gflops, token = 50.0, 1e-4
    for _ in range(20):  # both planned times are nearly proportional to their constant
        sampling, training = _planned(first, config, gflops, token)
        gflops, token = gflops * training / first.training, token * first.sampling / sampling
    rows = []
    for measured, its_config in made:
        sampling, training = _planned(measured, its_config, gflops, token)
        rows.append({**asdict(measured), "planned_sampling": sampling, "planned_training": training})
    constants = {"training_gflops": gflops, "token_overhead_s": token}
    return {
        "benchmark": "planning", "calibrated_on": first.name, "constants": constants, "target": TARGET, "rounds": rows
    }  # fmt: skip


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "sampling", "planned", "ratio", "training", "planned", "ratio", title="seconds of a round")
    for row in results["rounds"]:
        cells = [row["name"]]
        for side in ("sampling", "training"):
            measured, planned = row[side], row[f"planned_{side}"]
            cells += ["", "", ""] if measured is None else [
                f"{measured:.1f}", f"{planned:.1f}", f"{planned / measured:.2f}"
            ]  # fmt: skip
        table.add_row(*cells)
    Console(width=140).print(table)
    constants = results["constants"]
    typer.echo(
        f"calibrated on {results['calibrated_on']}: {constants['training_gflops']:.1f} GFLOP/s in training, "
        f"{constants['token_overhead_s'] * 1e6:.0f} us a sampled token"
    )


if __name__ == "__main__":
    typer.run(main)
