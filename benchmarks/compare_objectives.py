"""Claim: ranking losses without a constraint generate badly; with AFT's constraint they beat further fine-tuning.

For each seed, every objective starts from the same VFT model and trains on the same sampled groups of the arithmetic
task for the same number of optimiser steps, with binary feedback and with graded feedback (the share of right steps).
All models answer the same unseen questions. The script prints two tables like those of the paper (arXiv 2309.02144) and
writes them, with plots, to the directory. An interrupted comparison is resumed.

    python benchmarks/compare_objectives.py                 # 3 seeds; under 90 minutes on two cores
    python benchmarks/compare_objectives.py --quick         # a first look, under 10 minutes
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from laboratory import QUICK, Experiment, Settings, run_all

from aft_ray.config.objectives import OBJECTIVES

# Name in the paper, objective without a constraint, and its variants with a constraint.
FAMILIES = (
    ("RRHF", "rrhf", ("rrhf_detached",)),
    ("PRO", "pro", ("pro_detached",)),
    ("AFT", "align", ("aft_detached", "aft_detached_lowest", "aft_boundary")),
)
OTHERS = ("dpo", "irpo", "dpop", "grpo")
CONSTRAINED = {twin for _, _, twins in FAMILIES for twin in twins}
ORDER = ("start", "vft", "rft", *(name for _, plain, twins in FAMILIES for name in (plain, *twins)), *OTHERS)
COLUMNS = {
    "greedy": "task accuracy",
    "maj@{k}": "maj@{k}",
    "best-of-{k}": "best-of-{k}",
    "assessment": "assessment",
    "perplexity": "perplexity",
}
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # for each row the records of its seeds


def main(
    seeds: Annotated[int, typer.Option(help="VFT models, each with its own groups")] = 3,
    feedback: Annotated[list[str] | None, typer.Option(help="binary, steps; repeatable; default both")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="only these; repeatable; default all")] = None,
    jobs: Annotated[int, typer.Option(help="processes, one core and about 3 GB each")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="one seed, few steps and questions")] = False,
    directory: Annotated[Path, typer.Option(help="directory of records, tables and plots")] = Path("runs/compare"),
) -> None:
    """Train every objective from the same VFT model on the same groups, and compare them."""
    settings, seeds = (QUICK, 1) if quick else (Settings(), seeds)
    kinds = feedback or ["binary", "steps"]
    names = objective or list(OBJECTIVES)
    started = time.monotonic()
    experiments = [Experiment(seed, "binary", None) for seed in range(seeds)]
    for seed in range(seeds):
        for kind in kinds:
            # VFT uses no candidates and RFT only right ones, so graded feedback changes neither. With binary feedback
            # aft_detached_lowest equals aft_detached, because there is only one reward below the best.
            known = ("vft", "rft") if kind != kinds[0] else ("aft_detached_lowest",) if kind == "binary" else ()
            own = [name for name in names if name not in known]
            experiments += [Experiment(seed, kind, name) for name in own]
    records = run_all(experiments, directory, settings, jobs)
    output_dir = directory / settings.name
    report = [f"{settings_line(settings, seeds)}\n"]
    for kind in kinds:
        chosen = rows(records, kind)
        report += [f"### Feedback: {kind}", "", *table(chosen, settings.evaluation_k), ""]
        report += ["No constraint → constraint:", "", *paper_table(chosen), ""]
    text = "\n".join(report)
    (output_dir / "tables.md").write_text(text + "\n")
    print(text)
    plots(output_dir, {kind: rows(records, kind) for kind in kinds})
    print(f"{time.monotonic() - started:.0f} s; tables and plots in {output_dir}")


def settings_line(settings: Settings, seeds: int) -> str:
    return (
        f"{seeds} seed{'s' if seeds > 1 else ''}; {settings.groups // settings.groups_per_step} steps of "
        f"{settings.groups_per_step} groups of {settings.k} candidates, weight {settings.weight:g}, learning rate "
        f"{settings.learning_rate:g}; {settings.greedy_questions} test questions, {settings.sampled_questions} of them "
        f"sampled {settings.evaluation_k} times."
    )


def rows(records: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    """The records of one kind of feedback by row, including `start`, `vft` and `rft`, which all kinds share."""
    chosen: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        shared = record["objective"] in (None, "vft", "rft")
        if shared or record["feedback"] == kind:
            chosen.setdefault(record["objective"] or "start", []).append(record)
    return {name: chosen[name] for name in ORDER if name in chosen}


def table(chosen: Records, k: int) -> list[str]:
    """A table of all metrics as mean ± standard deviation over the seeds, with differences to both baselines."""
    baselines = [name for name in ("start", "vft") if name in chosen]
    titles = [*(title.format(k=k) for title in COLUMNS.values()), *(f"accuracy − `{name}`" for name in baselines)]
    lines = ["| objective | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name, of_seeds in chosen.items():
        cells = [spread(column.format(k=k), of_seeds) for column in COLUMNS]
        cells += ["" if name == base else difference(of_seeds, chosen[base]) for base in baselines]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def paper_table(chosen: Records) -> list[str]:
    """The table of the paper: each family without and with a constraint."""
    lines = ["| | task accuracy | assessment | perplexity |", "|---|---:|---:|---:|"]
    columns = ("greedy", "assessment", "perplexity")
    for name, title in (("start", "VFT (`start`)"), ("vft", "VFT for as many further steps (`vft`)")):
        if name in chosen:
            lines.append(f"| {title} | " + " | ".join(mean(column, chosen[name]) for column in columns) + " |")
    for family, plain, twins in FAMILIES:
        for twin in twins:
            if plain in chosen and twin in chosen:
                pairs = [f"{mean(column, chosen[plain])} → {mean(column, chosen[twin])}" for column in columns]
                lines.append(f"| {family} (`{plain}` → `{twin}`) | " + " | ".join(pairs) + " |")
    return lines


def values(metric: str, of_seeds: Sequence[Mapping[str, Any]]) -> list[float]:
    """The values of a metric for the seeds that have it, in percent except for the perplexity."""
    scale = 1 if metric == "perplexity" else 100
    found = [record["result"]["estimates"].get(metric, {}).get("value") for record in of_seeds]
    return [scale * value for value in found if value is not None]


def mean(metric: str, of_seeds: Sequence[Mapping[str, Any]]) -> str:
    known = values(metric, of_seeds)
    return f"{statistics.mean(known):.{2 if metric == 'perplexity' else 1}f}" if known else "–"


def spread(metric: str, of_seeds: Sequence[Mapping[str, Any]]) -> str:
    known = values(metric, of_seeds)
    digits = 2 if metric == "perplexity" else 1
    return mean(metric, of_seeds) + (f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else "")


def difference(of_seeds: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> str:
    """Mean difference in task accuracy in points, with its paired 95 % bootstrap interval over the questions."""
    import numpy as np

    by_seed = {record["seed"]: record for record in base}
    pairs = [(one, by_seed[one["seed"]]) for one in of_seeds if one["seed"] in by_seed]
    changes = [right(one) - right(other) for one, other in pairs]
    rng = np.random.default_rng(0)
    draws = [
        np.mean([change[rng.integers(len(change), size=len(change))].mean() for change in changes]) for _ in range(2000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * np.mean([c.mean() for c in changes]):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def right(record: Mapping[str, Any]) -> Any:
    """Array of shape [question]: 1.0 where the greedy answer was right, else 0.0."""
    import numpy as np

    return np.array([float(mark) for mark in record["greedy_right"]])


def plots(output_dir: Path, by_feedback: Mapping[str, Records]) -> None:
    """Draws two plots: overview, three metrics of each objective; scores, the scores of right and wrong samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ORDER if any(name in chosen for chosen in by_feedback.values())]
    panels = {"greedy": "task accuracy, greedy, %", "assessment": "assessment accuracy, %", "perplexity": "perplexity"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.42 * len(names) + 1.2), sharey=True)
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        overview(axis, metric, names, by_feedback)
        axis.set_title(title, fontsize=10)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    save(figure, output_dir / "overview")

    kind, chosen = next(iter(by_feedback.items()))
    shown = [name for name in ("start", "vft", "align", "aft_detached", "aft_boundary") if name in chosen]
    figure, axes = plt.subplots(len(shown), 1, figsize=(6.4, 1.5 * len(shown)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], shown, strict=True):
        histogram(axis, name, chosen[name])
    axes[0][0].legend(frameon=False)
    axes[-1][0].set_xlabel(f"score of a fresh sample, nats per token (feedback: {kind})")
    figure.tight_layout()
    save(figure, output_dir / "scores")


def overview(axis: Any, metric: str, names: Sequence[str], by_feedback: Mapping[str, Records]) -> None:
    """Draws a row per objective: the mean over the seeds with its standard deviation, and a dot per seed."""
    styles = (("o", "#0072b2", -0.14), ("s", "#d55e00", 0.14))
    for (kind, chosen), (marker, colour, shift) in zip(by_feedback.items(), styles, strict=False):
        first = True
        for row, name in enumerate(names):
            known = values(metric, chosen.get(name, ()))
            if not known:
                continue
            at, deviation = statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0
            label = f"feedback: {kind}" if first else None
            axis.errorbar(at, row + shift, xerr=deviation, fmt=marker, color=colour, ms=6, elinewidth=1, label=label)
            axis.plot(known, [row + shift] * len(known), ".", color=colour, alpha=0.45, ms=4)
            first = False
        if base := values(metric, chosen.get("start", ())):
            axis.axvline(statistics.mean(base), color="#888888", linestyle=":", linewidth=1, zorder=0)
    for row in (row for row, name in enumerate(names) if name in CONSTRAINED):
        axis.axhspan(row - 0.5, row + 0.5, color="#0072b2", alpha=0.06, linewidth=0)
    axis.grid(axis="x", alpha=0.25)


def histogram(axis: Any, name: str, of_seeds: Sequence[Mapping[str, Any]]) -> None:
    """Draws the scores of right and of wrong new samples of all seeds."""
    import numpy as np

    samples = [sample for record in of_seeds for question in record["samples"] for sample in question]
    bins = np.linspace(-1, 0, 51)
    for verdict, label, colour in ((True, "right", "#0072b2"), (False, "wrong", "#d55e00")):
        scores = np.clip([score for is_right, _, score in samples if is_right is verdict], bins[0], bins[-1])
        if len(scores):
            axis.hist(scores, bins=bins, density=True, alpha=0.55, color=colour, label=label)
    axis.set_yticks([])
    axis.set_title(f"{name}: assessment {spread('assessment', of_seeds)} %", fontsize=9, loc="left")


def save(figure: Any, path: Path) -> None:
    for kind in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)


if __name__ == "__main__":
    typer.run(main)
