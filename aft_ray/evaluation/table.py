"""Results side by side, for people: percent with the 95 % interval, like `61.3 [59.2, 63.4]`."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from aft_ray.evaluation.metrics import Estimate, Result

_TITLES = {"greedy": "task accuracy"}


def results_table(results: Mapping[str, Result], title: str | None = None) -> Table:
    """One column a model, one row a metric that any of them has; perplexities are not percent."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.estimates))
    table = Table(title=title, caption=_caption(results))
    table.add_column("")
    for label in results:
        table.add_column(label, justify="right", no_wrap=True)
    for name in names:
        cells = (format_estimate(name, result.estimates.get(name)) for result in results.values())
        table.add_row(_TITLES.get(name, name), *cells)
    return table


def comparison_table(results: Mapping[str, Result], metrics: Sequence[str], title: str | None = None) -> Table:
    """One row a model, one column each of some metrics."""
    table = Table(title=title, caption=_caption(results))
    table.add_column("")
    for name in metrics:
        table.add_column(_TITLES.get(name, name), justify="right", no_wrap=True)
    for label, result in results.items():
        table.add_row(label, *(format_estimate(name, result.estimates.get(name)) for name in metrics))
    return table


def results_text(results: Mapping[str, Result], title: str | None = None) -> str:
    """The same table as plain text, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=1000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(results_table(results, title))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def format_estimate(name: str, estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "–"
    if name == "perplexity":
        return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _caption(results: Mapping[str, Result]) -> str | None:
    """What a reader must know to compare them: how many questions, and what could not be decided."""
    facts = []
    if results:
        sizes = sorted({result.questions for result in results.values()})
        facts.append(f"{' / '.join(map(str, sizes))} questions, percent with 95 % interval")
    assessed = sorted({r.assessed for r in results.values() if "assessment" in r.estimates})
    if assessed:
        facts.append(f"assessment of {' / '.join(map(str, assessed))} right against as many wrong samples")
    for label, result in results.items():
        if undecided := result.undecided_greedy + result.undecided_samples:
            facts.append(f"{label}: {undecided} undecided answers")
    return "; ".join(facts) or None
