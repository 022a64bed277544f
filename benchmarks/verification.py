"""Claim: 10,000 ordinary answers are verified in less than 10 s on two cores, with a hard deadline for each.

The answers are generated: numbers, options, yes or no, and mathematics, with reasoning before them, as models write
them, about half of them right. The pool is `aft_ray.verify.process_pool.Verifier` with two worker processes; the peer is the
same extraction and comparison called in this process, without deadline, memory bound or protection. They take turns
on the same answers, new ones in every turn, and must agree on every verdict. What starting the pool costs, once per
process, is shown beside them.

    python benchmarks/verification.py --json verification.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from answers import Marked, ordinary_items

from aft_ray.verify.process_pool import VerificationRequest, Verifier
from aft_ray.verify.result import VerificationResult

TARGET_S = 10.0


def main(
    answers: Annotated[int, typer.Option(help="in a turn")] = 10_000,
    workers: Annotated[int, typer.Option(help="processes of the pool")] = 2,
    repeats: Annotated[int, typer.Option(help="turns of each")] = 3,
    seed: Annotated[int, typer.Option(help="of the generated answers")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Seconds for ordinary answers through the pool, beside plain comparison in this process."""
    verifier = Verifier(workers)
    # Both compare one expression before the first turn: the parser of LaTeX is built by its first use.
    first = [VerificationRequest(Marked("math"), "#### x+1", "x+2")] * (2 * workers)
    _, start_s = _timed(verifier.verify, first)
    _timed(_here, first)
    seconds: dict[str, list[float]] = {"here": [], "pool": []}
    verdicts: Counter[str] = Counter()
    for turn in range(repeats):
        items = ordinary_items(answers, seed + turn)
        plain, took = _timed(_here, items)
        seconds["here"].append(took)
        pooled, took = _timed(verifier.verify, items)
        seconds["pool"].append(took)
        if [one.verdict for one in plain] != [one.verdict for one in pooled]:
            raise RuntimeError("the pool and plain comparison differ in a verdict")
        verdicts.update(one.verdict.value for one in pooled)
        typer.echo(f"turn {turn + 1}  in this process {seconds['here'][-1]:.2f} s, in the pool {took:.2f} s")
    verifier.close()
    figures = _figures(answers, workers, start_s, seconds, verdicts)
    _show(figures)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


def _here(items: list[VerificationRequest]) -> list[VerificationResult]:
    return [item.task.same(item.task.extract(item.text), item.gold) for item in items]  # type: ignore[misc]


def _timed(verify: Any, items: list[VerificationRequest]) -> tuple[list[VerificationResult], float]:
    started = time.monotonic()
    outcomes = verify(items)
    return outcomes, time.monotonic() - started


def _figures(
    answers: int, workers: int, start_s: float, seconds: dict[str, list[float]], verdicts: Counter[str]
) -> dict[str, Any]:
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    return {
        "benchmark": "verification",
        "answers": answers,
        "workers": workers,
        "start_s": start_s,
        "seconds": seconds,
        "median_s": medians,
        "ratio": medians["pool"] / medians["here"],
        "verdicts": dict(verdicts),
        "target_s": TARGET_S,
    }


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "seconds (median)", "answers/s", "turns")
    for name, title in (("here", "plain comparison"), ("pool", f"pool, {figures['workers']} workers")):
        median = figures["median_s"][name]
        turns = ", ".join(f"{one:.2f}" for one in figures["seconds"][name])
        table.add_row(title, f"{median:.2f}", f"{figures['answers'] / median:,.0f}", turns)
    table.add_row("pool / plain", f"{figures['ratio']:.2f}", "", f"target: pool under {figures['target_s']:g} s")
    table.add_row("starting the pool", f"{figures['start_s']:.2f}", "", "once per process")
    Console().print(table)
    Console().print(", ".join(f"{count} {verdict}" for verdict, count in sorted(figures["verdicts"].items())))


if __name__ == "__main__":
    typer.run(main)
