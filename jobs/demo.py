"""`make demo`: trains a tiny reasoner on two cores and prints a table that shows the effect of AFT.

It compares three models: a model that was fine-tuned on reference responses (VFT, supervised fine-tuning), the same
model fine-tuned for the same number of additional steps on the same questions (the control), and the same model after
rounds of AFT. When the demo is started again, it continues where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from aft_ray.cli import fail, quiet, user_errors
from aft_ray.config.run import ConfigError, RunConfig, load_config

CONFIG = Path(__file__).parent / "configs" / "arithmetic_demo.yaml"
# The control is fine-tuned on the same questions for the same number of additional steps.
CONTROL = ("vft.epochs=0", "objective.name=vft", "objective.beta=null", "rounds.evaluate_every=0")
COLUMNS = ("greedy", "maj@{k}", "best-of-{k}", "assessment")


def demo(
    directory: Annotated[Path, typer.Option(help="directory of everything that the demo writes")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="seed of data order, sampling and training")] = 0,
) -> None:
    """Train a tiny reasoner and compare it with fine-tuning alone; about ten minutes on two cores."""
    from aft_ray.cluster.connect import connected
    from aft_ray.cluster.reservations import training_reservations
    from aft_ray.evaluation.report.summary import summarize, write_summary
    from aft_ray.evaluation.report.table import comparison_table
    from aft_ray.evaluation.standalone import evaluate_models
    from aft_ray.evaluation.statistics.metrics import EvaluationMetrics
    from aft_ray.evaluation.targets import Target
    from aft_ray.observe.logs import driver_log_path, library_output_to
    from aft_ray.observe.reporter import Reporter
    from aft_ray.storage.run_dir import RunDir

    started = time.monotonic()
    demo_dir = directory.absolute() / f"seed{seed}"
    untrained, aft_dir, control_dir = demo_dir / "untrained", demo_dir / "aft", demo_dir / "control"
    vft_model = aft_dir / "rounds" / "0000" / "model"
    aft = _config(aft_dir, untrained, seed)
    control = _config(control_dir, vft_model, seed, *CONTROL)
    # No training runs while the models are compared, so both cores can sample.
    evaluation_config = aft.model_copy(update={"sampling": aft.sampling.model_copy(update={"samplers": 2})})
    last = f"{aft.rounds.count:04d}"
    rows = {
        "VFT": Target("VFT", str(vft_model)),
        "VFT, as many steps": Target("control", str(control_dir / "rounds" / last / "model")),
        "AFT": Target("AFT", str(aft_dir / "rounds" / last / "model")),
    }
    with library_output_to(driver_log_path(RunDir(demo_dir))) as console, Reporter(None, console) as reporter:
        reporter.say(f"Everything is written to {demo_dir}; the output of libraries goes to its logs/.")
        _build_untrained_model(untrained, seed)
        with connected(aft.cluster, training_reservations(aft)):
            for title, config in (("VFT and AFT", aft), ("the control: VFT for as many steps", control)):
                reporter.say(f"\n{title}")
                _train(config, console)
            reporter.say("")
            for target in rows.values():
                path = demo_dir / f"{target.label}.json"
                if not path.exists():
                    evaluated = evaluate_models(evaluation_config, [target], reporter, RunDir(demo_dir))
                    summary = summarize(evaluated, None, aft.evaluation.resamples, aft.evaluation.seed)
                    write_summary(summary, path, {"split": aft.evaluation.split}, plots=True)
    results = {
        name: EvaluationMetrics.from_json(json.loads((demo_dir / f"{target.label}.json").read_text()))
        for name, target in rows.items()
    }
    from rich.console import Console

    columns = [name.format(k=aft.evaluation.k) for name in COLUMNS]
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print()
    console.print(comparison_table(results, columns))
    print(f"The demo took {time.monotonic() - started:.0f} s. The model: {rows['AFT'].source}")
    print(f"Next: aft-ray status {aft_dir} | aft-ray evaluate {aft_dir} | tensorboard --logdir {aft_dir}")


def _config(run_dir: Path, model: Path, seed: int, *overrides: str) -> RunConfig:
    return load_config(CONFIG, [f"run_dir={run_dir}", f"model.name={model}", f"seed={seed}", *overrides])


def _train(config: RunConfig, console: object) -> None:
    from rich.console import Console

    from aft_ray.observe.reporter import Reporter
    from aft_ray.run.launch import run
    from aft_ray.storage.run_dir import RunDir

    assert isinstance(console, Console)
    with Reporter(RunDir(config.run_dir), console) as reporter:
        if not run(config, reporter):
            reporter.say("this run is complete already; there is nothing to do")


def _build_untrained_model(directory: Path, seed: int) -> None:
    from jobs.tiny_model import build_tiny_model

    if not (directory / "config.json").exists():
        build_tiny_model(directory, seed, layers=2)


def main() -> None:
    quiet()
    try:
        typer.run(demo)
    except ConfigError as error:
        fail(str(error), 2)
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        fail(str(error), 1)


if __name__ == "__main__":
    main()
