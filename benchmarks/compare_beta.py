"""Claim: `objective.beta: auto` needs no search: it computes the boundary of `aft_boundary` from each group.

The paper (arXiv 2309.02144) uses a constant. This script compares the rules of `aft_ray/objectives/beta.py` with a grid
of constants, with the same VFT models and groups as `compare_objectives.py`, and plots accuracy as a function of β. An
interrupted comparison is resumed.

    python benchmarks/compare_beta.py
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from compare_objectives import difference, save, settings_line, spread, values
from laboratory import QUICK, Experiment, Settings, run_all

from aft_ray.objectives.beta import BETA_RULES

GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
RULES = tuple(name for name in BETA_RULES if name != "auto")
DEFAULT = 0.15
METRICS = ("greedy", "assessment", "maj@{k}", "perplexity")


def main(
    seeds: Annotated[int, typer.Option(help="VFT models, each with its own groups")] = 3,
    feedback: Annotated[str, typer.Option(help="binary or steps")] = "binary",
    beta: Annotated[
        list[float] | None, typer.Option(help="constant to compare; may be repeated; default: 0 to 0.5")
    ] = None,
    jobs: Annotated[int, typer.Option(help="processes, one core and about 3 GB each")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="one seed, few steps and questions")] = False,
    directory: Annotated[Path, typer.Option(help="directory of records, tables and plots")] = Path("runs/compare"),
) -> None:
    """Train `aft_boundary` with constants and with rules for β, and compare them."""
    settings, seeds = (QUICK, 1) if quick else (Settings(), seeds)
    options = [*(beta or GRID), *RULES]
    # The default is also an experiment of `compare_objectives.py`, so its record is shared.
    options_of: dict[Any, tuple[tuple[str, Any], ...]] = {
        value: () if value == DEFAULT else (("beta", value),) for value in options
    }
    experiments = [
        Experiment(seed, feedback, "aft_boundary", options_of[value]) for seed in range(seeds) for value in options
    ]
    records = run_all(experiments, directory, settings, jobs)
    rows = {value: [r for r in records if dict(r["options"]).get("beta", DEFAULT) == value] for value in options}
    text = "\n".join([settings_line(settings, seeds), "", *table(rows, settings.evaluation_k)])
    output_dir = directory / settings.name
    (output_dir / "beta.md").write_text(text + "\n")
    print(text)
    plot(output_dir / "beta", rows)
    print(f"written to {output_dir}/beta.md, beta.svg, beta.png")


def table(rows: Mapping[Any, Sequence[Mapping[str, Any]]], k: int) -> list[str]:
    """A row per β or rule, with mean ± standard deviation over the seeds."""
    lines = [
        f"| beta | task accuracy | assessment | maj@{k} | perplexity | accuracy − β = {DEFAULT} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for value, of_seeds in rows.items():
        cells = [spread(metric.format(k=k), of_seeds) for metric in METRICS]
        cells.append(difference(of_seeds, rows[DEFAULT]) if value != DEFAULT and DEFAULT in rows else "")
        name = f"{value:g}" if isinstance(value, float) else f"`{value}`"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(path: Path, rows: Mapping[Any, Sequence[Mapping[str, Any]]]) -> None:
    """Plots accuracy over the constants, with the standard deviation over seeds; a rule is a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    constants = sorted(value for value in rows if isinstance(value, float))
    colours = dict(zip(RULES, ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000"), strict=True))
    titles = ("task accuracy, greedy, %", "assessment accuracy, %")
    for axis, metric, title in zip(axes, METRICS[:2], titles, strict=True):
        of_seeds = [values(metric, rows[value]) for value in constants]
        means = [statistics.mean(v or [math.nan]) for v in of_seeds]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in of_seeds]
        axis.errorbar(constants, means, yerr=deviations, color="#0072b2", marker="o", capsize=2, label="constant")
        for rule in RULES:
            level = statistics.mean(values(metric, rows[rule]) or [math.nan])
            axis.axhline(level, color=colours[rule], linestyle="--", label=f"rule: {rule}")
        axis.set_xlabel("β, nats per token")
        axis.set_ylabel(title)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
