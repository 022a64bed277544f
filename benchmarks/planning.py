"""Claim: after it is calibrated on one run, `aft-ray plan` foretells the others of a machine within a factor of 1.5.

Small real runs (`aft_ray.rounds.run`, one sampler and one train worker on the CPU, in turns) that differ in k, in the
length of responses, in the steps they take and in the size of the model. The first calibrates the machine's two
constants: the training FLOP/s that its CPU reaches, and the seconds that its engine needs for a token beside the
model's own arithmetic. The plan of each run, with these two and with the mean lengths that the run itself reports, is
then set beside what its last round took by its metrics. The first run's own ratio is 1 by construction, all others are
predictions. Models are untrained: a round's training is on reference responses, passes times.

    python benchmarks/planning.py --json planning.json        # about 8 minutes
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

from aft_ray.config import RunConfig, parse_config
from aft_ray.planning import Plan, plan
from aft_ray.planning.assumptions import Assumptions
from aft_ray.planning.hardware import NODES, Cluster

TARGET = 1.5
# Name, and what it changes: of the config, and of the model (hidden size, layers, heads).
BASE_MODEL = (128, 4, 4)
VARIANTS: list[tuple[str, dict[str, dict[str, Any]], tuple[int, int, int]]] = [
    ("calibration", {}, BASE_MODEL),
    ("k = 12", {"sampling": {"k": 12}}, BASE_MODEL),
    ("responses half as long", {"sampling": {"max_tokens": 32}}, BASE_MODEL),
    ("twice the passes, small steps", {"training": {"epochs": 8, "groups_per_step": 32}}, BASE_MODEL),
    ("a model of 8.5 times the weights", {}, (256, 8, 8)),
]


@dataclass(frozen=True)
class Run:
    """Seconds of the last round, and what it did: mean tokens of responses and of prompts with references."""

    name: str
    sampling: float
    training: float
    response: float
    row: float


def main(
    questions: Annotated[int, typer.Option(help="in a round")] = 240,
    epochs: Annotated[int, typer.Option(help="passes of training over a round's groups")] = 4,
    repeats: Annotated[
        int, typer.Option(help="runs of each; the fastest of each counts, as a machine has other work")
    ] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Planned beside measured seconds of sampling and training."""
    from aft_ray.tasks.arithmetic_model import build_tiny_model

    made: list[tuple[Run, RunConfig]] = []
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        for number, (name, sections, (hidden, layers, heads)) in enumerate(VARIANTS):
            model = build_tiny_model(f"{scratch}/model-{number}", 0, hidden, layers, heads)
            runs = []
            for repeat in range(repeats):
                config = _config(f"{scratch}/run-{number}-{repeat}", str(model), questions, epochs, sections)
                runs.append((_run(name, config), config))
                typer.echo(f"{name}: {runs[-1][0].sampling:.1f} s sampling, {runs[-1][0].training:.1f} s training")
            best = Run(
                name,
                min(run.sampling for run, _ in runs),
                min(run.training for run, _ in runs),
                runs[0][0].response,
                runs[0][0].row,
            )
            made.append((best, runs[0][1]))
        figures = _compare(made)
    _show(figures)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


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


def _run(name: str, config: RunConfig) -> Run:
    from aft_ray.observe.reporter import Reporter, chatter_to
    from aft_ray.observe.summary import read_events
    from aft_ray.rounds import run
    from aft_ray.run_dir import RunDir

    run_dir = RunDir(config.run_dir)
    with chatter_to(run_dir.local_path("logs/driver.log")) as console, Reporter(run_dir, console) as reporter:
        run(config, reporter)
    events = read_events(run_dir)
    sampled = [event for event in events if event["event"] == "sampled"][-1]
    trained = [event for event in events if event["event"] == "trained"][-1]
    return Run(
        name,
        sampled["seconds"],
        trained["train_s"],
        sampled["tokens"] / (sampled["groups"] * config.sampling.k),
        trained["tokens"] / (trained["groups"] * config.training.epochs),
    )


# Of a row of the generated problems with their references, the part that is prompt.
PROMPT = 0.56


def _plan(run: Run, config: RunConfig, response: float, gflops: float, token_overhead_s: float) -> Plan:
    """A plan whose only unknowns are the two constants. response: mean tokens, of samples or of references."""
    assumed = Assumptions(
        prompt_tokens=run.row * PROMPT,
        response_tokens=response,
        signal=0,
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
    return plan(config, Cluster(node, 1), assumed)


def _planned(run: Run, config: RunConfig, gflops: float, token_overhead_s: float) -> tuple[float, float]:
    """Seconds of sampling and of training; an untrained model's samples are longer than what it is trained on."""
    sampling = _plan(run, config, run.response, gflops, token_overhead_s)
    training = _plan(run, config, run.row * (1 - PROMPT), gflops, token_overhead_s)
    assert sampling.sampling is not None
    return sampling.sampling.seconds + sampling.planner.assumed.round_overhead_s, training.training.seconds


def _compare(made: list[tuple[Run, RunConfig]]) -> dict[str, Any]:
    first, config = made[0]
    gflops, token = 50.0, 1e-4
    for _ in range(20):  # both planned times are nearly proportional to their constant
        sampling, training = _planned(first, config, gflops, token)
        gflops, token = gflops * training / first.training, token * first.sampling / sampling
    rows = []
    for run, one in made:
        sampling, training = _planned(run, one, gflops, token)
        rows.append({**asdict(run), "planned_sampling": sampling, "planned_training": training})
    constants = {"training_gflops": gflops, "token_overhead_s": token}
    return {"benchmark": "planning", "constants": constants, "target": TARGET, "runs": rows}


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "sampling", "planned", "ratio", "training", "planned", "ratio", title="seconds of a round")
    for row in figures["runs"]:
        cells = [row["name"]]
        for side in ("sampling", "training"):
            planned = row[f"planned_{side}"]
            cells += [f"{row[side]:.1f}", f"{planned:.1f}", f"{planned / row[side]:.2f}"]
        table.add_row(*cells)
    Console(width=140).print(table)
    constants = figures["constants"]
    typer.echo(
        f"calibrated on the first: {constants['training_gflops']:.1f} GFLOP/s in training, "
        f"{constants['token_overhead_s'] * 1e6:.0f} us a sampled token"
    )


if __name__ == "__main__":
    typer.run(main)
