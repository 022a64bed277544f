"""A service asked for more than it can answer: what clients get, whose answers they get, and what memory does.

    python benchmarks/serving_load.py runs/demo/seed0/aft

First every question is asked alone. Then `clients` ask without pause, far more than are let in at once, each its own
question with its own seed; an answer is right when it is, word for word, the one that was given alone. Memory is the
sum over the processes of the service (RSS; shared pages count more than once), every few seconds.
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
from served import service_of

from aft_ray.observe.reporter import Reporter

LOOK_S = 5.0


def main(
    model: Annotated[str, typer.Argument(help="run directory, or RUN@VERSION")],
    clients: Annotated[int, typer.Option(help="that ask without pause")] = 64,
    seconds: Annotated[float, typer.Option(help="how long")] = 60.0,
    concurrency: Annotated[int, typer.Option(help="questions at work at once")] = 16,
    queue: Annotated[int, typer.Option(help="questions that may wait")] = 16,
    n: Annotated[int, typer.Option(help="candidates")] = 8,
    port: Annotated[int, typer.Option(help="port to serve at meanwhile")] = 8018,
    output: Annotated[Path | None, typer.Option(help="JSON file of all figures")] = None,
) -> None:
    """Serve a run's model here, and ask for too much."""
    with service_of(model, port, [f"limits.concurrency={concurrency}", f"limits.queue={queue}"]) as service:
        from aft_ray.tasks import build_tasks, load_split

        run = service.run
        questions = [q.text for q in load_split(next(iter(build_tasks(run).values())), "test", clients, run.seed)]
        figures = asyncio.run(load(f"{service.url}/v1/reason", questions, n, seconds, service.reporter))
    if output:
        output.write_text(json.dumps(figures, indent=1) + "\n")
    if figures["other"] or figures["wrong"]:
        raise SystemExit("some clients got neither an answer of their own nor a 429")


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
                    # Sooner than told: the point is to ask for too much.
                    await asyncio.sleep(0.5)

        async def watch() -> None:
            while time.monotonic() - started < seconds:
                memory.append(service_mib())
                await asyncio.sleep(LOOK_S)

        reporter.say(f"{len(questions)} clients for {seconds:.0f} s")
        await asyncio.gather(watch(), *(client(index) for index in range(len(questions))))
        elapsed = time.monotonic() - started
    p50, p99 = np.percentile(taken, [50, 99])
    reporter.say(f"answered {statuses[200]} ({statuses[200] / elapsed:.1f}/s), p50 {p50:.2f} s, p99 {p99:.2f} s")
    reporter.say(f"refused with 429: {statuses[429]}; anything else: {dict(other) or 0}")
    reporter.say(f"answers other than when asked alone: {wrong}")
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
    """Of the processes that this one started."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


if __name__ == "__main__":
    typer.run(main)
