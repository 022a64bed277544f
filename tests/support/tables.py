"""Tables of an evaluation as plain text."""

import io

from rich.console import Console

from aft_ray.evaluation.report.table import results_table


def results_text(results, title=None, comparisons=None) -> str:
    """The table of `results_table` as plain text of any width."""
    console = Console(file=io.StringIO(), width=1000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(results_table(results, title, comparisons))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
