"""Tables of results for people to read: percent with the 95 % interval, such as `61.3 [59.2, 63.4]`.

Invariant: a row is one metric, computed in the same way for every model. The difference to the baseline is shown below
the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from aft_ray.evaluation.statistics.bootstrap import Estimate
from aft_ray.evaluation.statistics.comparison import Comparison, Difference
from aft_ray.evaluation.statistics.metrics import EvaluationMetrics

_TITLES = {"greedy": "task accuracy"}


def results_table(
    results: Mapping[str, EvaluationMetrics],
    title: str | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
) -> Table:
    """A table with a column per model and a row per metric. If there are several tasks, each has a section."""
    comparisons = comparisons or {}
    table = Table(title=title, caption=_caption(results, comparisons))
    table.add_column("")
    for label in results:
        table.add_column(label, justify="right", no_wrap=True)
    differences = {label: comparison.differences for label, comparison in comparisons.items()}
    _section(table, {label: result.estimates for label, result in results.items()}, differences)
    tasks = list(dict.fromkeys(task for result in results.values() for task in result.tasks))
    if tasks:
        table.add_section()
        table.add_row("[bold]mean over the tasks[/bold]")
        _section(table, {label: result.macro for label, result in results.items()}, {})
    for task in tasks:
        of_task = {label: result.tasks[task] for label, result in results.items() if task in result.tasks}
        sizes = " / ".join(map(str, sorted({result.questions for result in of_task.values()})))
        table.add_section()
        table.add_row(f"[bold]{task or 'no task'}[/bold] ({sizes} questions)")
        differences = {label: c.tasks[task].differences for label, c in comparisons.items() if task in c.tasks}
        estimates = {label: of_task[label].estimates if label in of_task else {} for label in results}
        _section(table, estimates, differences)
    return table


def _section(
    table: Table,
    estimates: Mapping[str, Mapping[str, Estimate]],
    differences: Mapping[str, Mapping[str, Difference]],
) -> None:
    for name in dict.fromkeys(name for by_name in estimates.values() for name in by_name):
        cells = []
        for label, by_name in estimates.items():
            cell = format_estimate(name, by_name.get(name))
            if (difference := differences.get(label, {}).get(name)) is not None:
                cell += f"\n{format_difference(name, difference)}"
            cells.append(cell)
        table.add_row(_TITLES.get(name, name), *cells)


def comparison_table(
    results: Mapping[str, EvaluationMetrics], metrics: Sequence[str], title: str | None = None
) -> Table:
    """A table with a row per model and a column for each of the given metrics."""
    table = Table(title=title, caption=_caption(results, {}))
    table.add_column("")
    for name in metrics:
        table.add_column(_TITLES.get(name, name), justify="right", no_wrap=True)
    for label, result in results.items():
        table.add_row(label, *(format_estimate(name, result.estimates.get(name)) for name in metrics))
    return table


def format_estimate(name: str, estimate: Estimate | None) -> str:
    """`61.3 [59.2, 63.4]`; with several sampling seeds `61.3 ± 0.8 [59.2, 63.4]`, with their standard deviation."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    factor, form = _format_of(name)
    spread = "" if math.isnan(estimate.std) else f" ± {factor * estimate.std:{form}}"
    return f"{factor * estimate.value:{form}}{spread} [{factor * estimate.low:{form}}, {factor * estimate.high:{form}}]"


def format_difference(name: str, difference: Difference) -> str:
    """`+2.1 [+0.4, +3.9] p=0.012`, in percentage points."""
    if math.isnan(difference.value):
        return "–"
    factor, form = _format_of(name)
    p = "p<0.001" if difference.p < 0.001 else f"p={difference.p:.3f}"
    low, high = (f"{factor * bound:+{form}}" for bound in (difference.low, difference.high))
    return f"{factor * difference.value:+{form}} [{low}, {high}] {p}"


def _format_of(name: str) -> tuple[float, str]:
    """The factor and the number format of a metric: shares are shown in percent, perplexities unchanged."""
    return (1.0, ".2f") if name == "perplexity" else (100.0, ".1f")


def _caption(results: Mapping[str, EvaluationMetrics], comparisons: Mapping[str, Comparison]) -> str | None:
    """What a reader must know to compare the models, such as the number of questions and of undecided responses."""
    facts = []
    if results:
        sizes = sorted({result.questions for result in results.values()})
        facts.append(f"{' / '.join(map(str, sizes))} questions, percent with 95 % interval")
    seeds = sorted({result.seeds for result in results.values()})
    if seeds and seeds[-1] > 1:
        facts.append(f"mean ± standard deviation of {' / '.join(map(str, seeds))} sampling seeds")
    assessed = sorted({r.assessed for r in results.values() if "assessment" in r.estimates})
    if assessed:
        facts.append(f"assessment compares {' / '.join(map(str, assessed))} right against as many wrong samples")
    for label, result in results.items():
        if undecided := result.undecided_greedy + result.undecided_samples:
            facts.append(f"{label}: {undecided} undecided answers")
    if comparisons:
        facts.append(f"below a value: its difference to {next(label for label in results if label not in comparisons)}")
    for label, comparison in comparisons.items():
        if comparison.only_baseline or comparison.only_other:
            facts.append(
                f"{label} is compared on the {comparison.questions} common questions, not on "
                f"{comparison.only_baseline} of the baseline alone and {comparison.only_other} of its own"
            )
    return "; ".join(facts) or None
