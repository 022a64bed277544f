"""Claim: 10,000 ordinary answers are verified in less than 10 s on two cores, with a hard deadline for each.

The answers are generated: numbers, options, yes or no, and mathematics, in forms that models write, after some
reasoning. About half of them are right. The pool is `aft_ray.verify.process_pool.Verifier` with two worker processes.
The peer is the same extraction and comparison in this process, without deadline, memory limit or protection. In each
repeat both verify the same new answers, one after the other, and must agree on every verdict. The time to start the
pool, once per process, is shown separately.

    python benchmarks/verification.py --json verification.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from answers import MarkedAnswers, ordinary_requests

from aft_ray.verify.process_pool import VerificationRequest, Verifier
from aft_ray.verify.result import VerificationResult

TARGET_S = 10.0


def main(
    answers: Annotated[int, typer.Option(help="number of answers in each repeat")] = 10_000,
    workers: Annotated[int, typer.Option(help="number of processes in the pool")] = 2,
    repeats: Annotated[int, typer.Option(help="number of repeats")] = 3,
    seed: Annotated[int, typer.Option(help="seed of the generated answers")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Compare the time of the pool for ordinary answers with that of plain comparison in this process."""
    verifier = Verifier(workers)
    # Both compare one expression before the first repeat, because the parser of LaTeX is built when it is first used.
    first = [VerificationRequest(MarkedAnswers("math"), "#### x+1", "x+2")] * (2 * workers)
    _, start_s = _timed(verifier.verify, first)
    _timed(_verify_here, first)
    seconds: dict[str, list[float]] = {"here": [], "pool": []}
    verdicts: Counter[str] = Counter()
    for repeat in range(repeats):
        requests = ordinary_requests(answers, seed + repeat)
        plain, took = _timed(_verify_here, requests)
        seconds["here"].append(took)
        pooled, took = _timed(verifier.verify, requests)
        seconds["pool"].append(took)
        if [one.verdict for one in plain] != [one.verdict for one in pooled]:
            raise RuntimeError("the pool and plain comparison disagree on a verdict")
        verdicts.update(one.verdict.value for one in pooled)
        typer.echo(f"repeat {repeat + 1}  in this process {seconds['here'][-1]:.2f} s, in the pool {took:.2f} s")
    verifier.close()
    results = _results(answers, workers, start_s, seconds, verdicts)
    _print_results(results)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))


def _verify_here(requests: list[VerificationRequest]) -> list[VerificationResult]:
    return [request.task.same(request.task.extract(request.text), request.gold) for request in requests]


def _timed(
    verify: Callable[[list[VerificationRequest]], list[VerificationResult]], requests: list[VerificationRequest]
) -> tuple[list[VerificationResult], float]:
    started = time.monotonic()
    results = verify(requests)
    return results, time.monotonic() - started


def _results(
    answers: int, workers: int, start_s: float, seconds: dict[str, list[float]], verdicts: Counter[str]
) -> dict[str, Any]:
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
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


def _print_results(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "seconds (median)", "answers/s", "seconds of each repeat")
    for name, title in (("here", "plain comparison"), ("pool", f"pool, {results['workers']} workers")):
        median = results["median_s"][name]
        repeats = ", ".join(f"{one:.2f}" for one in results["seconds"][name])
        table.add_row(title, f"{median:.2f}", f"{results['answers'] / median:,.0f}", repeats)
    table.add_row("pool / plain", f"{results['ratio']:.2f}", "", f"target: pool under {results['target_s']:g} s")
    table.add_row("starting the pool", f"{results['start_s']:.2f}", "", "once per process")
    Console().print(table)
    Console().print(", ".join(f"{count} {verdict}" for verdict, count in sorted(results["verdicts"].items())))


if __name__ == "__main__":
    typer.run(main)
