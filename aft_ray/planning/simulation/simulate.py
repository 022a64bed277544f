"""A run in virtual time: the scheduling code of real runs, driven by simulated engines and train workers.

What is real: `sampling.stream.SampleStage` and `sampling.members.Members` (whom a question is sent to, what happens when that
fails), `board.Coordinator` (who waits for whom), `schedule.order_of_rounds` (which version samples which round),
`questions.questions_of_round` and `training.batching.plan_pass`. What is simulated: the time that engines, train
workers, loads and publications take, and what fails. Invariant: every question of a round is answered or parked once,
or the simulation says so and fails.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.coordination.coordinator import Coordinator, PeerFailed
from aft_ray.inference.engine import SamplingSpec
from aft_ray.planning.plan.workload import KNOWN
from aft_ray.planning.simulation.assumptions import SimulationAssumptions, Work, draw_work
from aft_ray.planning.simulation.result import SampledRound, Simulated
from aft_ray.planning.simulation.sampler import SimulatedSampler
from aft_ray.planning.simulation.trainer import SimulatedTrainer, group_sizes
from aft_ray.planning.simulation.virtual_time import run_virtually
from aft_ray.run.schedule import AwaitVersion, order_of_rounds
from aft_ray.sampling.sampler_health import SamplersFailed, reason_of
from aft_ray.sampling.sampler_pool import Samplers
from aft_ray.sampling.stream import SampleJob, SampleStage, data_flow, sampling_spec
from aft_ray.storage.records import Group, Question, groups_to_table, table_to_groups
from aft_ray.tasks.dataset import questions_of_round
from aft_ray.training.batching import GroupSize
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed

# Stages of evaluations are numbered from here, those of rounds from 1.
_EVALUATION = 1_000_000
# Points of the engines' curve; the interval between two of them doubles when there are twice as many.
_POINTS = 1500


class _Breaks(Protocol):
    def fail(self, noticed_s: float, back_s: float) -> None: ...


def simulate(config: RunConfig, assumed: SimulationAssumptions, seed: int = 0) -> Simulated:
    """The rounds of a run after round 0, from engines that run to the last publication. Raises ConfigError."""
    if not config.samples or not config.rounds.count:
        raise ConfigError(
            "a run without sampled rounds has nothing to schedule; simulate an objective that samples, with "
            "rounds.count of at least 1"
        )
    return run_virtually(_Run.simulated(config, assumed, seed))


class _SerialProcess:
    """A process that does one thing after the other, first come, first served."""

    def __init__(self) -> None:
        self._free_at = self.busy_s = 0.0

    async def work(self, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + seconds
        self.busy_s += seconds
        await asyncio.sleep(self._free_at - now)


@dataclass(slots=True)
class _Answered:
    """What came out of the pipeline. answered: (id, number); at: when each question came out."""

    answered: list[tuple[str, int]]
    parked: list[tuple[str, str]]
    at: list[float]


class _Run:
    def __init__(self, config: RunConfig, assumed: SimulationAssumptions, seed: int) -> None:
        self.config, self.assumed, self.seed = config, assumed, seed
        self.loop = asyncio.get_running_loop()
        self.coordinator = Coordinator()
        self.work: dict[int, Work] = {}
        sampling = config.sampling
        self.samplers = [
            SimulatedSampler(index, assumed, sampling.max_num_seqs, self.work) for index in range(sampling.samplers)
        ]
        self.pool = Samplers(
            actors=tuple(self.samplers),
            groups=(),
            log_files=(None,) * sampling.samplers,
            minimum=sampling.min_samplers,
            start_timeout_s=sampling.start_timeout_s,
            load_timeout_s=config.weights.timeout_s,
            tolerance=config.score_tolerance,
            ready=frozenset(range(sampling.samplers)),
        )
        self.health = self.pool.health()
        self.questions = _questions(config, assumed)
        self.trainer = SimulatedTrainer(config, assumed, self.coordinator, self._sizes)
        self.forwarder = _SerialProcess()
        self.answered: dict[int, list[tuple[str, int]]] = {}
        self.sampled: list[SampledRound] = []
        self.curve: list[tuple[float, float]] = []

    @classmethod
    async def simulated(cls, config: RunConfig, assumed: SimulationAssumptions, seed: int) -> Simulated:
        run = cls(config, assumed, seed)
        stopped = None
        run.health.watch()
        others = [run.loop.create_task(run._watch()), *run._start_failures()]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(run.trainer.run(1, config.rounds.count))
                group.create_task(run._conduct())
        except* (PeerFailed, SamplersFailed, WeightUpdateFailed) as failed:
            stopped = str(failed.exceptions[0])
        for task in others:
            task.cancel()
        await run.health.close()
        sampling_s = sum(one.seconds for one in run.sampled)
        return Simulated(
            sampled=run.sampled,
            trained=run.trainer.rounds,
            seconds=run.loop.time(),
            gpus=sum(_gpus(config)),
            sampler_failures=sum(sampler.failures for sampler in run.samplers),
            trainer_failures=run.trainer.failures,
            forwarding=run.forwarder.busy_s / sampling_s if sampling_s else 0.0,
            stopped=stopped,
            curve=run.curve,
        )

    async def _conduct(self) -> None:
        """The conductor's side, in the order that `rounds.Orchestrator` follows."""
        rounds = self.config.rounds
        await self.coordinator.publish(VersionManifest(0, "", (), ()))
        for step in order_of_rounds(1, rounds.count, rounds.max_staleness):
            manifest, waited = await self.coordinator.wait_version(step.version, rounds.timeout_s)
            began = self.loop.time()
            await self._bring_samplers_to(manifest)
            loaded = self.loop.time()
            await self._evaluate_if_due(manifest)
            if isinstance(step, AwaitVersion):
                continue
            await self._sample(step.round, manifest, waited, loaded - began, self.loop.time() - loaded)
            await self.coordinator.set_ready(step.round)

    async def _bring_samplers_to(self, manifest: VersionManifest) -> None:
        """What `SamplerPool.load` does: all that answer, as many as must at least; one that ends meanwhile waits."""
        pool, loaded = self.pool, set[int]()
        patience = 3 * pool.load_timeout_s + 30
        while not loaded or len(loaded) < pool.minimum:
            wanted = sorted(await self.health.enough() - loaded)
            calls = {self.samplers[i].load.remote(manifest, pool.tolerance, pool.load_timeout_s): i for i in wanted}
            done, late = await asyncio.wait(calls, timeout=patience) if calls else (set(), set())
            if late:
                raise WeightUpdateFailed(f"{len(late)} samplers did not load a version within {patience:.0f} s")
            for call in done:
                if (error := call.exception()) is None:
                    loaded.add(calls[call])
                else:
                    self.health.lost(calls[call], reason_of(error))

    async def _evaluate_if_due(self, manifest: VersionManifest) -> None:
        rounds, evaluation, count = self.config.rounds, self.config.evaluation, _validation(self.config, self.assumed)
        version, stage = manifest.version, _EVALUATION + manifest.version
        due = rounds.evaluate_every and (version % rounds.evaluate_every == 0 or version == rounds.count)
        if not due or not count or stage in self.work:
            return
        # The greedy answer and the samples, as one question of so many candidates.
        how = SamplingSpec(1 + evaluation.during_training_k, 1.0, 1.0, self.config.sampling.max_tokens)
        self.work[stage] = draw_work(self.assumed, self.seed, stage, count, how.k, how.max_tokens)
        groups = [_group(stage, number, "validation") for number in range(count)]
        await self._answer(groups, manifest, how, f"evaluation {version}")

    async def _sample(
        self, number: int, manifest: VersionManifest, waited: float, load_s: float, evaluate_s: float
    ) -> None:
        how = sampling_spec(self.config.sampling)
        wanted = questions_of_round(self.config, self.questions, number)
        self.work[number] = draw_work(self.assumed, self.seed, number, len(self.questions), how.k, how.max_tokens)
        groups = [_group(number, group.prompt_token_ids[1], group.question.task) for group in wanted]
        started, tokens, busy = self.loop.time(), self._tokens(), self._busy_s()
        done = await self._answer(groups, manifest, how, f"round {number}")
        await asyncio.sleep(self.assumed.overhead_s)
        await self.coordinator.check()
        ended = self.loop.time()
        ids = sorted([one for one, _ in done.answered] + [one for one, _ in done.parked])
        if ids != sorted(group.question.id for group in groups):
            raise RuntimeError(
                f"round {number}: of {len(groups)} questions {len(ids)} came back, {len(set(ids))} unlike"
            )
        if len(done.parked) > self.config.sampling.max_parked * len(groups):
            await self.coordinator.fail(
                f"round {number}: {len(done.parked)} of {len(groups)} questions could not be sampled, more than "
                f"sampling.max_parked={self.config.sampling.max_parked:g}; the first: {done.parked[0][1]}"
            )
            await self.coordinator.check()
        self.answered[number] = done.answered
        generated, seconds = self._tokens() - tokens, ended - started
        at = sorted(done.at)
        self.sampled.append(
            SampledRound(
                round=number,
                version=manifest.version,
                staleness=number - 1 - manifest.version,
                waited_s=waited,
                load_s=load_s,
                evaluate_s=evaluate_s,
                started=started,
                ended=ended,
                tail_s=at[-1] - at[math.ceil(0.95 * len(at)) - 1],
                questions=len(groups),
                parked=len(done.parked),
                tokens=generated,
                full=generated / (seconds * len(self.samplers) * peak_tokens_per_s(self.config, self.assumed)),
                busy=(self._busy_s() - busy) / (seconds * len(self.samplers)),
            )
        )

    async def _answer(
        self, groups: list[Group], manifest: VersionManifest, how: SamplingSpec, purpose: str
    ) -> _Answered:
        """The pipeline of `sampling.stream`: batches in order, so many of them in flight through one `SampleStage`."""
        ask = SampleStage()
        job = SampleJob(
            replace(self.pool, ready=self.health.ready),
            manifest,
            how,
            self.config.sampling,
            self.config.seed,
            purpose,
        )
        size, in_flight = data_flow(self.config.sampling, len(self.samplers))
        slots = asyncio.Semaphore(in_flight)
        done = _Answered([], [], [])

        async def forward(batch: list[Group]) -> None:
            async with slots:
                await self.forwarder.work(len(batch) * self.assumed.forward_ms / 1e3)
                table: pa.Table = await ask(groups_to_table(batch), job)
            for group, reason in zip(
                table_to_groups(table.drop_columns(["parked", "attempts"])), table["parked"].to_pylist(), strict=True
            ):
                done.at.append(self.loop.time())
                if reason is None:
                    done.answered.append((group.question.id, group.prompt_token_ids[1]))
                else:
                    done.parked.append((group.question.id, reason))

        try:
            await asyncio.gather(*(forward(groups[start : start + size]) for start in range(0, len(groups), size)))
        finally:
            await ask.close()
        return done

    def _sizes(self, number: int) -> list[GroupSize]:
        return group_sizes(self.config, self.work[number], self.answered[number])

    def _tokens(self) -> int:
        return sum(sampler.engine.tokens for sampler in self.samplers)

    def _busy_s(self) -> float:
        return sum(sampler.engine.busy_s for sampler in self.samplers)

    async def _watch(self) -> None:
        """The engines' curve."""
        places, interval = len(self.samplers) * self.config.sampling.max_num_seqs, 1.0
        while True:
            self.curve.append((self.loop.time(), sum(sampler.engine.running for sampler in self.samplers) / places))
            if len(self.curve) > 2 * _POINTS:
                self.curve, interval = self.curve[::2], 2 * interval
            await asyncio.sleep(interval)

    def _start_failures(self) -> list[asyncio.Task[None]]:
        """One source of failures for each engine, for the train workers together, and for each node."""
        assumed, (sampling, training) = self.assumed, _gpus(self.config)
        each = sampling // len(self.samplers)
        sources: list[tuple[float, list[tuple[_Breaks, float]], float]] = []
        if assumed.mtbf_hours:
            hour = 3600 * assumed.mtbf_hours
            sources += [(hour / each, [(sampler, assumed.start_s)], 0.0) for sampler in self.samplers]
            sources.append((hour / training, [(self.trainer, assumed.trainer_start_s)], 0.0))
        if assumed.node_mtbf_hours:
            back = assumed.node_back_s
            for node in range(math.ceil((sampling + training) / assumed.gpus_per_node)):
                gpus = range(node * assumed.gpus_per_node, (node + 1) * assumed.gpus_per_node)
                lost = sorted({gpu // each for gpu in gpus if gpu < sampling})
                victims: list[tuple[_Breaks, float]] = [(self.samplers[i], back + assumed.start_s) for i in lost]
                if any(sampling <= gpu < sampling + training for gpu in gpus):
                    victims.append((self.trainer, back + assumed.trainer_start_s))
                sources.append((3600 * assumed.node_mtbf_hours, victims, assumed.notice_s))
        return [
            self.loop.create_task(self._break(np.random.default_rng([self.seed, _EVALUATION, number]), *source))
            for number, source in enumerate(sources)
        ]

    async def _break(
        self,
        rng: np.random.Generator,
        mean_s: float,
        victims: Sequence[tuple[_Breaks, float]],
        noticed_s: float,
    ) -> None:
        while True:
            await asyncio.sleep(rng.exponential(mean_s))
            for victim, back_s in victims:
                victim.fail(noticed_s, back_s)


def peak_tokens_per_s(config: RunConfig, assumed: SimulationAssumptions) -> float:
    """Of one engine with `max_num_seqs` sequences."""
    running = config.sampling.max_num_seqs
    return running / (assumed.step_ms / 1e3 + running * assumed.step_us_per_sequence / 1e6)


def _gpus(config: RunConfig) -> tuple[int, int]:
    """Of all engines and of all train workers. What has none counts one a process, as something that can fail."""
    sampling, training = config.sampling, config.training
    return sampling.samplers * sampling.processes_per_sampler, training.workers


def _questions(config: RunConfig, assumed: SimulationAssumptions) -> list[Group]:
    """The training questions of each task, numbered over all of them."""
    counts: dict[str, int | None] = dict.fromkeys(config.task_configs, assumed.questions)
    for name, entry in config.task_configs.items():
        if assumed.questions is None:
            facts = KNOWN.get(entry.task)
            known = entry.arithmetic.train_size if entry.task == "arithmetic" else facts.train if facts else 0
            counts[name] = entry.train_limit or known or config.rounds.questions_per_round
    prepared: list[Group] = []
    for name, count in counts.items():
        if count is None:
            raise ConfigError(
                f"{config.task_key(name)} does not say how many training questions there are; add "
                f"--assume questions=NUMBER, "
                f"or set {config.task_key(name)}.train_limit"
            )
        prepared += [_group(0, len(prepared) + number, name) for number in range(count)]
    return prepared


def _validation(config: RunConfig, assumed: SimulationAssumptions) -> int:
    """Validation questions that the config knows of."""
    if assumed.validation is not None:
        return assumed.validation
    total = 0
    for entry in config.task_configs.values():
        facts = KNOWN.get(entry.task)
        known = entry.arithmetic.validation_size if entry.task == "arithmetic" else facts.validation if facts else 0
        total += entry.validation_limit or known
    return total


def _group(stage: int, number: int, task: str) -> Group:
    """A question as the simulated engines know it: its stage and its number are its prompt."""
    return Group(stage % _EVALUATION, 0, Question(f"{task}/{number:08d}", "", "", "", task), [stage, number], [0], [])
