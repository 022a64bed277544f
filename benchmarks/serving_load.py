"""Loads a service with more questions than it can answer; checks the responses and measures its memory.

    python benchmarks/serving_load.py runs/demo/seed0/aft

First, every question is asked alone. Then many clients ask without pause, far more than the service admits at once,
each its own question with its own seed. An answer is right if its candidates have the same texts as when the question
was asked alone. Memory is the sum of the resident sizes (RSS) of the service's processes, measured every few seconds;
pages that they share are counted more than once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp
import numpy as np
import psutil
import typer
from local_service import service_of

from aft_ray.observe.reporter import Reporter

MEMORY_INTERVAL_S = 5.0


def main(
    model: Annotated[str, typer.Argument(help="run directory, or RUN@VERSION")],
    clients: Annotated[int, typer.Option(help="clients that ask without pause")] = 64,
    seconds: Annotated[float, typer.Option(help="duration in seconds")] = 60.0,
    concurrency: Annotated[int, typer.Option(help="questions that are answered at once")] = 16,
    queue: Annotated[int, typer.Option(help="questions that may wait")] = 16,
    n: Annotated[int, typer.Option(help="candidates")] = 8,
    port: Annotated[int, typer.Option(help="port of the service")] = 8018,
    output: Annotated[Path | None, typer.Option(help="JSON file for all results")] = None,
) -> None:
    """Serve a run's model and overload it."""
    with service_of(model, port, [f"limits.concurrency={concurrency}", f"limits.queue={queue}"]) as service:
        from aft_ray.tasks import build_tasks, load_split

        run = service.run
        questions = [q.text for q in load_split(next(iter(build_tasks(run).values())), "test", clients, run.seed)]
        results = asyncio.run(load(f"{service.url}/v1/reason", questions, n, seconds, service.reporter))
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n")
    if results["other"] or results["wrong"]:
        raise SystemExit("some clients got neither the right answer nor a 429")


async def load(url: str, questions: list[str], n: int, seconds: float, reporter: Reporter) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    other: Counter[str] = Counter()
    taken: list[float] = []
    wrong = 0
    memory: list[float] = []

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(client: int) -> tuple[int, list[Any]]:
            body = {
                "question": questions[client],
                "seed": 1000 * client,
                "n": n,
                "strategy": "score",
                "stop_confidence": 1,
            }
            async with session.post(url, json=body) as response:
                answer = await response.json(content_type=None)
                if response.status == 200:
                    return 200, sorted((one["index"], one["response"]) for one in answer["candidates"])
                if response.status == 429:
                    assert int(response.headers["Retry-After"]) >= 1
                else:
                    other[str(answer)[:200]] += 1
                return response.status, []

        reporter.say(f"{len(questions)} questions, each alone")
        alone = [(await ask(client))[1] for client in range(len(questions))]
        started = time.monotonic()

        async def client(index: int) -> None:
            nonlocal wrong
            while time.monotonic() - started < seconds:
                asked = time.monotonic()
                status, candidates = await ask(index)
                statuses[status] += 1
                if status == 200:
                    taken.append(time.monotonic() - asked)
                    wrong += candidates != alone[index]
                else:
                    # Sooner than Retry-After says, so that the queue stays full.
                    await asyncio.sleep(0.5)

        async def measure_memory() -> None:
            while time.monotonic() - started < seconds:
                memory.append(service_mib())
                await asyncio.sleep(MEMORY_INTERVAL_S)

        reporter.say(f"{len(questions)} clients for {seconds:.0f} s")
        await asyncio.gather(measure_memory(), *(client(index) for index in range(len(questions))))
        elapsed = time.monotonic() - started
    p50, p99 = np.percentile(taken, [50, 99])
    reporter.say(f"answered {statuses[200]} ({statuses[200] / elapsed:.1f}/s), p50 {p50:.2f} s, p99 {p99:.2f} s")
    reporter.say(f"rejected with 429: {statuses[429]}; other errors: {dict(other) or 0}")
    reporter.say(f"answers that differ from those given alone: {wrong}")
    reporter.say(f"memory, MiB: {' '.join(f'{value:.0f}' for value in memory)}")
    return {
        "statuses": dict(statuses),
        "other": dict(other),
        "wrong": wrong,
        "rate": statuses[200] / elapsed,
        "p50": float(p50),
        "p99": float(p99),
        "memory_mib": memory,
    }


def service_mib() -> float:
    """Returns the resident memory of the processes that this one started, in MiB."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


if __name__ == "__main__":
    typer.run(main)
