"""The result of a simulation as tables, sentences, plain values and a plot of the timeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from aft_ray.config.section import ConfigError
from aft_ray.planning.simulation.result import Simulated


def rounds_of(simulated: Simulated) -> Table:
    """A table with a row for each round: how long samplers and train workers worked and waited."""
    table = Table(title="simulated rounds")
    for column in (
        "round", "policy", "questions", "waited", "load", "sampling", "tail", "tokens/s", "of peak", "failed",
        "waited", "training", "workers busy", "publish", "round time",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    trained = {one.round: (one, seconds) for one, seconds in zip(simulated.trained, simulated.round_s, strict=True)}
    for one in simulated.sampled:
        row = [
            str(one.round), str(one.version), f"{one.questions:,}", _s(one.waited_s), _s(one.load_s), _s(one.seconds),
            f"{one.tail_s:.1f} s", f"{one.tokens / one.seconds:,.0f}", f"{one.full:.0%}", str(one.parked),
        ]  # fmt: skip
        if one.round in trained:
            other, seconds = trained[one.round]
            publish = other.published - other.trained
            row += [_s(other.waited_s), _s(other.train_s), f"{other.busy:.0%}", _s(publish), _s(seconds)]
        table.add_row(*row)
    return table


def totals_of(simulated: Simulated) -> list[str]:
    """The run as a whole, in sentences."""
    sampler_waits = sum(one.waited_s for one in simulated.sampled)
    trainer_waits = sum(one.waited_s for one in simulated.trained)
    hours = simulated.seconds / 3600
    lines = [
        f"{len(simulated.trained)} rounds in {hours:.2f} h on {simulated.gpus:,} GPUs ({hours * simulated.gpus:,.0f} "
        f"GPU-hours); a round after the first takes {simulated.steady_s:.0f} s",
        f"samplers are at work {simulated.samplers_busy:.0%} of the time and wait {sampler_waits:.0f} s for versions; "
        f"train workers compute {simulated.trainers_busy:.0%} of it and wait {trainer_waits:.0f} s for groups",
        f"the forwarding process is busy {simulated.forwarding:.0%} of the sampling",
    ]
    if simulated.sampler_failures or simulated.trainer_failures:
        failed = sum(one.parked for one in simulated.sampled)
        lines.append(
            f"failures: {simulated.sampler_failures} of samplers, {simulated.trainer_failures} of the train workers; "
            f"{failed} questions failed"
        )
    if simulated.stopped:
        lines.append(f"the run stops: {simulated.stopped}")
    return lines


def comparison_of(variants: Mapping[str, Simulated]) -> Table:
    """A table with a row for each variant."""
    table = Table(title="simulated runs", caption="steady: a round after the first; tail: mean over the rounds")
    table.add_column("", no_wrap=True)
    columns = (
        "steady", "run", "samplers at work", "workers busy", "tail", "failed questions", "failures",
        "GPU-hours a round",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for label, one in variants.items():
        rounds = max(1, len(one.sampled))
        table.add_row(
            label + (" (stops)" if one.stopped else ""),
            _s(one.steady_s),
            _s(one.seconds),
            f"{one.samplers_busy:.0%}",
            f"{one.trainers_busy:.0%}",
            f"{sum(sampled.tail_s for sampled in one.sampled) / rounds:.1f} s",
            str(sum(sampled.parked for sampled in one.sampled)),
            str(one.sampler_failures + one.trainer_failures),
            f"{one.steady_s * one.gpus / 3600:,.1f}",
        )
    return table


def figures_of(simulated: Simulated) -> dict[str, Any]:
    """Every value but the curve, as plain values. `Simulated` describes them."""
    names = ("round_s", "steady_s", "samplers_busy", "trainers_busy")
    figures = asdict(simulated) | {name: getattr(simulated, name) for name in names}
    del figures["curve"]
    return figures


def draw(simulated: Simulated, path: Path) -> None:
    """Draws the timeline: how many sequences the engines run, and below it the phases of each round.

    Raises:
        ConfigError: The suffix of the path is no format that matplotlib writes.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1.3))
    minute = 60.0
    above.fill_between(
        [at / minute for at, _ in simulated.curve],
        [100 * share for _, share in simulated.curve],
        step="post", color="#4477aa", alpha=0.75, linewidth=0,
    )  # fmt: skip
    above.set(ylim=(0, 100), ylabel="% of the engines'\nsequence slots in use")
    above.set_title(
        f"{simulated.gpus:,} GPUs: a round takes {simulated.steady_s:.0f} s, engines are at work "
        f"{simulated.samplers_busy:.0%} of the time, train workers {simulated.trainers_busy:.0%}",
        loc="left", fontsize=10,
    )  # fmt: skip
    colours = {
        "samplers load": "#ccbb44", "evaluation": "#66ccee", "sampling": "#4477aa",
        "training": "#228833", "publication": "#ee6677",
    }  # fmt: skip

    def bar(lane: int, start: float, seconds: float, kind: str, label: str = "") -> None:
        if seconds <= 0:
            return
        below.barh(lane, seconds / minute, left=start / minute, color=colours[kind], edgecolor="white", height=0.7)
        if label and seconds > simulated.seconds / 16:
            below.text((start + seconds / 2) / minute, lane, label, ha="center", va="center", fontsize=8, color="white")

    for sampled in simulated.sampled:
        evaluating = sampled.started - sampled.evaluate_s
        bar(1, evaluating - sampled.load_s, sampled.load_s, "samplers load")
        bar(1, evaluating, sampled.evaluate_s, "evaluation")
        bar(1, sampled.started, sampled.seconds, "sampling", f"{sampled.round} (v{sampled.version})")
    for trained in simulated.trained:
        bar(0, trained.started, trained.train_s, "training", str(trained.round))
        bar(0, trained.trained, trained.published - trained.trained, "publication")
    below.set_yticks([1, 0], ["samplers", "train workers"])
    below.set_ylim(-0.5, 1.5)
    below.set(xlabel="minutes", xlim=(0, simulated.seconds / minute))
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in colours.items()],
        loc="outside lower center", ncols=len(colours), fontsize=8, frameon=False,
    )  # fmt: skip
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:  # matplotlib does not know the suffix
        raise ConfigError(f"cannot draw {path}: {error}") from error


def _s(seconds: float) -> str:
    return f"{seconds:,.0f} s"
