"""The samplers of a simulated run behind the orchestrator's interfaces: a stream of answers, and loading of versions.

What is real: `sampling.sample_stage.SampleStage` and `sampling.sampler_health.SamplerHealth` (which sampler a question
goes to, and what follows when that fails) and `sampling.version_loading.load_version`. What is simulated: the engines,
and the one process that forwards questions to them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from aft_ray.config.run import RunConfig
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.planning.simulation.assumptions import SimulationAssumptions, Work, draw_work, most_sequences
from aft_ray.planning.simulation.questions import (
    EVALUATION_STAGE,
    count_validation_questions,
    number_of,
    simulated_group,
)
from aft_ray.planning.simulation.sampler import SimulatedSampler
from aft_ray.sampling.counts import SampleCounts
from aft_ray.sampling.sample_stage import SampleJob, SampleStage, split_failed
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.stream import WrittenGroups, data_flow, sampling_spec
from aft_ray.sampling.version_loading import load_version
from aft_ray.storage.groups.group_files import GroupFile
from aft_ray.storage.ledger import FailedQuestion
from aft_ray.storage.records import Group, groups_to_table
from aft_ray.storage.run_dir import RunDir
from aft_ray.weights.version_manifest import VersionManifest

# Runs a coroutine in virtual time until it ends, together with everything else that runs then.
RunVirtually = Callable[[Coroutine[Any, Any, Any]], Any]


class SerialProcess:
    """A process that does one thing after the other, first come, first served."""

    def __init__(self) -> None:
        self._free_at = self.busy_s = 0.0

    async def work(self, seconds: float) -> None:
        """Waits until the process has finished this work, which takes `seconds` once it is started."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + seconds
        self.busy_s += seconds
        await asyncio.sleep(self._free_at - now)


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """Statistics of one execution of the pipeline.

    Attributes:
        answered_at: when each question was answered or failed, sorted, seconds from the run's start.
        tokens: tokens that the engines generated meanwhile.
        busy_s: seconds for which the engines had a sequence meanwhile, summed over the engines.
    """

    answered_at: list[float]
    tokens: int
    busy_s: float

    @property
    def tail_s(self) -> float:
        """Seconds from 95 % of the questions answered to the last."""
        return self.answered_at[-1] - self.answered_at[math.ceil(0.95 * len(self.answered_at)) - 1]


class SimulatedSamplers:
    """All samplers of a simulated run. Must be made inside the virtual event loop.

    Attributes:
        work: the answers of each stage, by its number.
        answered: the questions of each round that have a group, as (id, number).
        streamed: statistics of the sampling of each round.
        load_s, evaluate_s: seconds that the last load and the evaluation after it took.
    """

    def __init__(
        self, config: RunConfig, assumed: SimulationAssumptions, seed: int, questions: int, run_virtually: RunVirtually
    ) -> None:
        self._config, self._assumed, self._seed, self._questions = config, assumed, seed, questions
        self._run_virtually = run_virtually
        self._loop = asyncio.get_running_loop()
        sampling = config.sampling
        self.work: dict[int, Work] = {}
        most = most_sequences(config, assumed)
        self.samplers = [SimulatedSampler(index, assumed, most, self.work) for index in range(sampling.samplers)]
        self._handles = SamplerHandles(
            actors=tuple(self.samplers),
            placement_groups=(),
            log_files=(None,) * sampling.samplers,
            minimum=sampling.min_samplers,
            start_timeout_s=sampling.start_timeout_s,
            load_timeout_s=config.weights.timeout_s,
            tolerance=config.score_tolerance,
            ready=frozenset(range(sampling.samplers)),
        )
        self.health = self._handles.health()
        self.forwarder = SerialProcess()
        self.answered: dict[int, list[tuple[str, int]]] = {}
        self.streamed: dict[int, StreamStatistics] = {}
        self.load_s = self.evaluate_s = 0.0

    def load(self, manifest: VersionManifest) -> None:
        """Loads a version as `sampling.sampler_pool.SamplerPool` does."""
        started = self._loop.time()
        self._run_virtually(load_version(self._handles, self.health, manifest))
        self.load_s, self.evaluate_s = self._loop.time() - started, 0.0

    def release(self) -> None:
        """Does nothing, because simulated samplers have GPUs of their own."""

    def stream(self, manifest: VersionManifest, groups: Sequence[Group]) -> Iterator[WrittenGroups]:
        """Answers a round as `sampling.stream.sample_round` does, with files that nobody wrote."""
        round_number, spec = groups[0].round, sampling_spec(self._config.sampling)
        self.work[round_number] = draw_work(
            self._assumed, self._seed, round_number, self._questions, spec.k, spec.max_tokens
        )
        asked = [simulated_group(round_number, number_of(group), group.question.task) for group in groups]
        tokens, busy_s = self.tokens, self.busy_s
        answered, failed, answered_at = self._run_virtually(
            self._answer(asked, manifest, spec, f"round {round_number}", self._assumed.overhead_s)
        )
        returned = sorted([id for id, _ in answered] + [id for id, _ in failed])
        if returned != sorted(group.question.id for group in asked):
            raise RuntimeError(
                f"round {round_number}: of {len(asked)} questions {len(set(returned))} were returned, "
                f"{len(returned)} times"
            )
        self.streamed[round_number] = StreamStatistics(answered_at, self.tokens - tokens, self.busy_s - busy_s)
        self.answered[round_number] = answered
        yield from self._written(round_number, answered, failed)

    def evaluate(self, run_dir: RunDir, manifest: VersionManifest, name: str) -> None:
        """Answers the validation questions, once greedily and `evaluation.during_training_k` times sampled."""
        count, stage = count_validation_questions(self._config, self._assumed), EVALUATION_STAGE + manifest.version
        if count:
            started, k = self._loop.time(), 1 + self._config.evaluation.during_training_k
            spec = SamplingSpec(k, 1.0, 1.0, self._config.sampling.max_tokens)
            self.work[stage] = draw_work(self._assumed, self._seed, stage, count, spec.k, spec.max_tokens)
            asked = [simulated_group(stage, number, "validation") for number in range(count)]
            self._run_virtually(self._answer(asked, manifest, spec, f"evaluation {manifest.version}"))
            self.evaluate_s = self._loop.time() - started
        run_dir.write_json(run_dir.evaluation(name), {})

    @property
    def tokens(self) -> int:
        """Tokens that all engines have generated."""
        return sum(sampler.engine.tokens for sampler in self.samplers)

    @property
    def busy_s(self) -> float:
        """Seconds for which the engines had a sequence, summed over the engines."""
        return sum(sampler.engine.busy_s for sampler in self.samplers)

    async def _answer(
        self, groups: list[Group], manifest: VersionManifest, spec: SamplingSpec, purpose: str, overhead_s: float = 0.0
    ) -> tuple[list[tuple[str, int]], list[tuple[str, str]], list[float]]:
        """The pipeline of `sampling.stream`: batches in order, a bounded number in flight through one stage.

        Returns the answered questions as (id, number), the failed ones as (id, reason), and the times of both.
        """
        stage = SampleStage()
        samplers = replace(self._handles, ready=self.health.ready)
        job = SampleJob(samplers, manifest, spec, self._config.sampling, self._config.seed, purpose)
        size, in_flight = data_flow(self._config.sampling, len(self.samplers))
        slots = asyncio.Semaphore(in_flight)
        answered: list[tuple[str, int]] = []
        failed: list[tuple[str, str]] = []
        answered_at: list[float] = []

        async def forward(batch: list[Group]) -> None:
            async with slots:
                await self.forwarder.work(len(batch) * self._assumed.forward_ms / 1e3)
                table: pa.Table = await stage(groups_to_table(batch), job)
            for group, reason, _ in zip(*split_failed(table), strict=True):
                answered_at.append(self._loop.time())
                if reason is None:
                    answered.append((group.question.id, number_of(group)))
                else:
                    failed.append((group.question.id, reason))

        try:
            await asyncio.gather(*(forward(groups[start : start + size]) for start in range(0, len(groups), size)))
        finally:
            await stage.close()
        await asyncio.sleep(overhead_s)
        return answered, failed, sorted(answered_at)

    def _written(
        self, round_number: int, answered: list[tuple[str, int]], failed: list[tuple[str, str]]
    ) -> Iterator[WrittenGroups]:
        """The answers as files of `sampling.groups_per_file` groups, which are recorded but not written."""
        size, work = self._config.sampling.groups_per_file, self.work[round_number]
        questions = tuple(
            FailedQuestion(round_number, id, reason, self._config.sampling.attempts) for id, reason in failed
        )
        if questions:
            yield WrittenGroups(None, questions, SampleCounts())
        for number, start in enumerate(range(0, len(answered), size)):
            of_file = answered[start : start + size]
            numbers = [one for _, one in of_file]
            right = work.right[numbers]
            counts = SampleCounts(
                groups=len(of_file),
                with_signal=int((right.any(axis=1) & ~right.all(axis=1)).sum()),
                right=int(right.sum()),
                wrong=int((~right).sum()),
                tokens=int(work.lengths[numbers].sum()),
            )
            path = f"rounds/{round_number:04d}/groups/{number:08d}.parquet"
            yield WrittenGroups(GroupFile(round_number, path, "", tuple(id for id, _ in of_file)), (), counts)
