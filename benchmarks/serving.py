"""Measures over HTTP what ranking adds to the accuracy of a served model, and what it costs in throughput.

    python benchmarks/serving.py runs/demo/seed0/aft --output serving.json

Accuracy: each strategy answers the same unseen questions with the same seeds. Early stopping: the tokens that it saves
and the accuracy that it keeps. Cost: requests/s through the reasoner with n candidates for each question, divided by
the requests/s of Ray's own OpenAI ingress, which samples the same candidates with log-probabilities from the same
engine but does not rank them. The engine's Serve handle is measured too, to show the cost of HTTP. The three are
measured alternately, and the ratios are those of their medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp
import numpy as np
import typer
from local_service import Service, service_of

from aft_ray.config.serve import STRATEGIES
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.storage.records import Verdict

TARGET = 0.9
CONFIDENCES = (1.0, 0.99, 0.95, 0.9, 0.8)
WARM_UP = 32
MODEL, PEER = "model", "/peer"
REASONER, INGRESS, HANDLE = "reasoner", "Ray's OpenAI ingress", "engine's handle"


@dataclass(frozen=True, slots=True)
class Row:
    """A strategy's accuracy with its standard error, in percent, and its candidates and tokens for each question."""

    strategy: str
    stop_confidence: float
    accuracy: float
    error: float
    candidates: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement of one side: requests/s, and percentiles of the seconds that a request took."""

    side: str
    rate: float
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    questions: int
    n: int
    temperature: float
    requests: int
    concurrency: int
    repeats: int


@dataclass(slots=True)
class Bench:
    """Clients of one service. A question is sampled with the seed of its position, by each of the three sides.

    Attributes:
        engine: the streaming handle of the policy servers, which is created once, as in the reasoner.
    """

    url: str
    session: aiohttp.ClientSession
    questions: Sequence[Any]
    prompts: Sequence[list[int]]
    task: Any
    options: Options
    max_tokens: int
    engine: Any

    async def reason(self, position: int, strategy: str, stop_confidence: float) -> dict[str, Any]:
        body = {
            "question": self.questions[position % len(self.questions)].text,
            "strategy": strategy,
            "seed": 1000 * position,
            "max_tokens": self.max_tokens,
        }
        if strategy != "greedy":
            body |= {"n": self.options.n, "temperature": self.options.temperature, "stop_confidence": stop_confidence}
        async with self.session.post(f"{self.url}/v1/reason", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def through_reasoner(self, position: int) -> int:
        answer = await self.reason(position, "score", 1.0)
        return int(answer["usage"]["completion_tokens"])

    async def through_handle(self, position: int) -> int:
        from aft_ray.serving.engine.server import SampleRequest
        from aft_ray.serving.reasoning import FLUSH_INTERVAL_S

        sampling = SamplingSpec(1, self.options.temperature, 1.0, self.max_tokens)
        prompt = self.prompts[position % len(self.prompts)]
        # The engine collects finished candidates as long as it does for the reasoner.
        sample = SampleRequest(prompt, sampling, tuple(range(self.options.n)), 1000 * position, FLUSH_INTERVAL_S)
        tokens = 0
        async for part in self.engine.sample.remote(sample):
            tokens += sum(len(candidate.token_ids) for _, candidate in part.candidates)
        return tokens

    async def through_openai_ingress(self, position: int) -> int:
        body = {
            "model": MODEL,
            "prompt": self.prompts[position % len(self.prompts)],
            "n": self.options.n,
            "temperature": self.options.temperature,
            "max_tokens": self.max_tokens,
            "seed": 1000 * position,
            "logprobs": 0,
        }
        async with self.session.post(f"{self.url}{PEER}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return int(answer["usage"]["completion_tokens"])

    async def each(self, positions: Sequence[int], do: Callable[[int], Awaitable[Any]]) -> list[Any]:
        """Returns the results of `do` for every position, in order; `concurrency` of them run at once."""
        slots = asyncio.Semaphore(self.options.concurrency)

        async def one(position: int) -> Any:
            async with slots:
                return await do(position)

        return list(await asyncio.gather(*(one(position) for position in positions)))


async def accuracy(bench: Bench, strategy: str, stop_confidence: float) -> Row:
    answers = await bench.each(
        range(len(bench.questions)), lambda position: bench.reason(position, strategy, stop_confidence)
    )
    right = [
        bench.task.same(answer["answer"], question.gold).verdict is Verdict.RIGHT
        for answer, question in zip(answers, bench.questions, strict=True)
    ]
    share = float(np.mean(right))
    return Row(
        strategy,
        stop_confidence,
        100 * share,
        100 * float(np.sqrt(share * (1 - share) / len(right))),
        float(np.mean([len(answer["candidates"]) for answer in answers])),
        float(np.mean([answer["usage"]["completion_tokens"] for answer in answers])),
    )


async def measure_side(bench: Bench, side: str, requests: int, first: int) -> Measurement:
    do = {REASONER: bench.through_reasoner, INGRESS: bench.through_openai_ingress, HANDLE: bench.through_handle}[side]
    seconds: list[float] = []

    async def timed(position: int) -> None:
        started = time.monotonic()
        await do(position)
        seconds.append(time.monotonic() - started)

    started = time.monotonic()
    await bench.each(range(first, first + requests), timed)
    rate = requests / (time.monotonic() - started)
    p50, p99 = np.percentile(seconds, [50, 99])
    return Measurement(side, rate, float(p50), float(p99))


def main(
    model: Annotated[str, typer.Argument(help="run directory, or RUN@VERSION")],
    questions: Annotated[int, typer.Option(help="unseen questions for the accuracy table")] = 300,
    n: Annotated[int, typer.Option(help="candidates")] = 8,
    temperature: Annotated[float, typer.Option(help="temperature of sampling")] = 0.7,
    requests: Annotated[int, typer.Option(help="requests of one cost measurement; 0: do not measure the cost")] = 200,
    concurrency: Annotated[int, typer.Option(help="requests in flight")] = 16,
    repeats: Annotated[int, typer.Option(help="cost measurements of each side")] = 3,
    port: Annotated[int, typer.Option(help="port of the service")] = 8017,
    output: Annotated[Path | None, typer.Option(help="JSON file for all results")] = None,
) -> None:
    """Serve a run's model and measure it."""
    options = Options(questions, n, temperature, requests, concurrency, repeats)
    overrides = [f"limits.concurrency={concurrency}", f"limits.queue={concurrency}", "limits.deadline_s=300"]
    with service_of(model, port, [*overrides, "cluster.logical_cpus=4", f"name={MODEL}"]) as service:
        run_peer(service)
        results = asyncio.run(measure(service, options))
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n")


def run_peer(service: Service) -> None:
    """Starts Ray's OpenAI ingress in front of the same engine."""
    from ray import serve
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, make_fastapi_ingress

    from aft_ray.serving.app import llm_config

    ingress = serve.deployment(make_fastapi_ingress(OpenAiIngress)).options(
        name="peer", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5}
    )
    card = to_model_metadata(service.served.name, llm_config(service.config, service.served, ()))
    bound = ingress.bind(llm_deployments={MODEL: engines()}, model_cards={MODEL: card})
    serve.run(bound, name="peer", route_prefix=PEER)


def engines() -> Any:
    """Returns the Serve handle of the policy servers."""
    from ray import serve

    from aft_ray.serving.command import APPLICATION

    deployments = serve.status().applications[APPLICATION].deployments
    return serve.get_deployment_handle(next(name for name in deployments if name.startswith("Policy:")), APPLICATION)


async def measure(service: Service, options: Options) -> dict[str, Any]:
    from aft_ray.tasks import build_tasks, load_split
    from aft_ray.tasks.dataset import load_tokenizer
    from aft_ray.tasks.rendering import Renderer

    run, say = service.run, service.reporter.say
    task = next(iter(build_tasks(run).values()))
    asked = load_split(task, "test", options.questions, run.seed)
    tokenizer = load_tokenizer(run)
    renderer = Renderer(run, tokenizer)
    prompts = [renderer.prompt(task.prompt(one)) for one in asked]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        engine = engines().options(stream=True)
        bench = Bench(service.url, session, asked, prompts, task, options, run.sampling.max_tokens, engine)
        await measure_side(bench, REASONER, WARM_UP, 10**6)
        say(f"\n{len(asked)} unseen questions of {task.name}, n {options.n}, temperature {options.temperature:g}")
        say(f"{'strategy':15} {'stops at':>8} {'accuracy':>14} {'candidates':>10} {'tokens':>7}")
        rows = []
        plan = [("greedy", 1.0), *((s, 1.0) for s in STRATEGIES[1:])]
        plan += [(s, c) for s in STRATEGIES[1:] for c in CONFIDENCES[1:]]
        for strategy, confidence in plan:
            row = await accuracy(bench, strategy, confidence)
            rows.append(row)
            say(
                f"{row.strategy:15} {row.stop_confidence:8.2f} {row.accuracy:6.1f} ± {row.error:4.1f} % "
                f"{row.candidates:10.2f} {row.tokens:7.0f}"
            )
        measurements: list[Measurement] = []
        if options.requests:
            say(f"\n{options.requests} requests each time, {options.concurrency} in flight, n {options.n}")
            sides = (REASONER, INGRESS, HANDLE)
            say(f"{'side':20} {'requests/s':>10} {'p50 s':>7} {'p99 s':>7}")
            await measure_side(bench, INGRESS, WARM_UP, 10**6)
            for repeat in range(options.repeats):
                for side in sides:
                    one = await measure_side(bench, side, options.requests, repeat * options.requests)
                    measurements.append(one)
                    say(f"{one.side:20} {one.rate:10.2f} {one.p50:7.3f} {one.p99:7.3f}")
            median = {side: statistics.median(one.rate for one in measurements if one.side == side) for side in sides}
            say(f"{REASONER} / {INGRESS}: {median[REASONER] / median[INGRESS]:.3f} (target {TARGET})")
            say(f"{REASONER} / {HANDLE}, which has no HTTP: {median[REASONER] / median[HANDLE]:.3f}")
    return {"rows": [asdict(row) for row in rows], "turns": [asdict(one) for one in measurements]}


if __name__ == "__main__":
    typer.run(main)
