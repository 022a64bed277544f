"""Claim: sampling round r+1 while round r trains reaches at least 0.85 of the ideal speed-up.

The script measures whole runs (`aft_ray.run.launch.run`) with max_staleness 0 and 1 alternately. The sampler and the
train worker are pinned to one core each. G is the time in which a round samples, and T the time in which it trains and
publishes, both as means over the rounds of the window with staleness 0, from the metrics of the runs. In a steady state
a round takes G + T with staleness 0, and at least max(G, T) with staleness 1, so the ideal speed-up is
(G + T) / max(G, T). The target applies to the steady state, from the end of the training of round 1 to that of the last
round. The whole run, from the first question, is shown as well: R rounds take at least G + (R-1) max(G, T) + T.

Loading new weights, reading groups and waiting for messages belong to neither G nor T. They lengthen both kinds of
runs, so max(G, T) as a share of the overlapped time is shown as well.

The model is untrained and its learning rate is nearly zero, so every round has the same amount of work. Choose --epochs
so that G and T are about equal: the ideal is then highest and hardest to reach.

    python benchmarks/overlap.py --json overlap.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from aft_ray.config.loader import apply_override
from aft_ray.config.run import RunConfig, parse_config

TARGET = 0.85


@dataclass(frozen=True)
class Timing:
    """Times of one run in seconds.

    Attributes:
        sampling, training: of each round.
        whole: of all rounds.
        steady: of all rounds except the first.
    """

    staleness: int
    sampling: list[float]
    training: list[float]
    whole: float
    steady: float


def main(
    questions: Annotated[int, typer.Option(help="questions in a round")] = 240,
    k: Annotated[int, typer.Option(help="candidates per question")] = 6,
    max_tokens: Annotated[int, typer.Option(help="longest response")] = 64,
    epochs: Annotated[int, typer.Option(help="training passes over the groups of a round")] = 4,
    rounds: Annotated[int, typer.Option(help="rounds in a run")] = 6,
    repeats: Annotated[int, typer.Option(help="runs of each setting")] = 2,
    model: Annotated[
        str | None, typer.Option(help="model directory, used in float32; default: a tiny untrained model")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="key.sub=value of the run's config; may be repeated")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all numbers to this file")] = None,
) -> None:
    """Compare rounds per hour with and without overlap with the ideal."""
    if rounds < 2:
        raise SystemExit("--rounds must be at least 2, because the first round is not counted")
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this benchmark needs two cores: one for the sampler, one for the train worker")
    timings = []
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        if model is None:
            from jobs.tiny_model import build_tiny_model

            model = str(build_tiny_model(f"{scratch}/model", 0))
        for number in range(repeats):
            for staleness in (0, 1):
                tree: dict[str, Any] = {
                    "run_dir": f"{scratch}/run-{number}-{staleness}",
                    "model": {"name": model, "dtype": "float32", "max_length": 256},
                    "data": {"task": "arithmetic", "arithmetic": {"train_size": questions}},
                    "vft": {"epochs": 0},
                    "rounds": {"count": rounds, "max_staleness": staleness, "evaluate_every": 0},
                    "sampling": {"k": k, "max_tokens": max_tokens},
                    "training": {"epochs": epochs, "learning_rate": 1e-9},
                }
                for override in setting or []:
                    apply_override(tree, override)
                timings.append(_run(parse_config(tree)))
                typer.echo(_line(timings[-1]))
    results = _results(timings, rounds)
    _show(results)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))


def _run(config: RunConfig) -> Timing:
    from aft_ray.observe.logs import library_output_to
    from aft_ray.observe.reporter import Reporter
    from aft_ray.observe.summary import read_events
    from aft_ray.run.launch import run
    from aft_ray.storage.run_dir import RunDir

    run_dir = RunDir(config.run_dir)
    with (
        library_output_to(run_dir.local_path("logs/driver.log")) as console,
        Reporter(run_dir, console) as reporter,
        _pinned(),
    ):
        run(config, reporter)
    events = read_events(run_dir)
    sampled = [event for event in events if event["event"] == "sampled"]
    trained = [event for event in events if event["event"] == "trained"]
    return Timing(
        config.rounds.max_staleness,
        [event["seconds"] for event in sampled],
        [event["train_s"] + event["publish_s"] for event in trained],
        trained[-1]["time"] - (sampled[0]["time"] - sampled[0]["seconds"]),
        trained[-1]["time"] - trained[0]["time"],
    )


@contextmanager
def _pinned() -> Iterator[None]:
    """Pins all threads of the sampler to one core, and those of the train worker to another, as soon as they start."""
    import psutil

    cores = dict(zip(("ray::Sampler", "ray::RayTrainWorker"), sorted(os.sched_getaffinity(0)), strict=False))
    ended = threading.Event()
    pinned: set[str] = set()

    def pin() -> None:
        while not ended.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError):
                    title = " ".join(process.cmdline())
                    for name, core in cores.items():
                        if title.startswith(name):
                            for thread in os.listdir(f"/proc/{process.pid}/task"):
                                os.sched_setaffinity(int(thread), {core})
                            pinned.add(name)

    thread = threading.Thread(target=pin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if missing := set(cores) - pinned:
        raise RuntimeError(f"never found a process named {' or '.join(missing)} to pin to a core")


def _line(timing: Timing) -> str:
    sampling, training = statistics.mean(timing.sampling), statistics.mean(timing.training)
    return (
        f"max_staleness {timing.staleness}: sampling {sampling:.1f} s and training {training:.1f} s per round, "
        f"{timing.whole:.1f} s in all, {timing.steady:.1f} s after round 1"
    )


def _results(timings: list[Timing], rounds: int) -> dict[str, Any]:
    alternating, overlapped = [t for t in timings if t.staleness == 0], [t for t in timings if t.staleness == 1]
    results: dict[str, Any] = {"benchmark": "overlap", "rounds": rounds}
    for name, skipped in (("steady", 1), ("whole", 0)):
        # Round 1 is slower because of warm-up, so its G and T are used only for the window of the whole run.
        g = statistics.mean(seconds for timing in alternating for seconds in timing.sampling[skipped:])
        t = statistics.mean(seconds for timing in alternating for seconds in timing.training[skipped:])
        count, longer = rounds - skipped, max(g, t)
        ideal = (g + t) / longer if skipped else count * (g + t) / (g + (count - 1) * longer + t)
        before = statistics.mean(getattr(timing, name) for timing in alternating)
        after = statistics.mean(getattr(timing, name) for timing in overlapped)
        results[name] = {
            "sampling_s": g,
            "training_s": t,
            "rounds_per_hour": {"0": 3600 * count / before, "1": 3600 * count / after},
            "speedup": before / after,
            "ideal": ideal,
            "share_of_ideal": before / after / ideal,
            "longer_side_busy": count * longer / after,
        }
    return results | {"target": TARGET, "runs": [asdict(timing) for timing in timings]}


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "G", "T", "rounds/h: staleness 0", "1", "speed-up", "ideal", "of ideal", "longer side busy")
    for name, label in (("steady", f"after round 1 (target {TARGET:g})"), ("whole", "the whole run")):
        window = results[name]
        seconds = [f"{window[key]:.1f} s" for key in ("sampling_s", "training_s")]
        speeds = [f"{window['rounds_per_hour'][staleness]:.0f}" for staleness in ("0", "1")]
        ratios = [f"{window[key]:.3f}" for key in ("speedup", "ideal", "share_of_ideal", "longer_side_busy")]
        table.add_row(label, *seconds, *speeds, *ratios)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
