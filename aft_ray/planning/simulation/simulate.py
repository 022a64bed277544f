"""A run in virtual time: the orchestrator and the ledger of real runs, with simulated engines and train workers.

What is real: `run.orchestrator.Orchestrator` with `sampling.round.RoundSampling` and `evaluation.during_run` (the order
of a round, which version samples which round, when too many questions have failed), the ledger (in memory), the
coordinator (without an actor), what `samplers.py` names, and `training.batching.plan_pass`. What is simulated: the time
that engines, train workers, loads and publications take, and what fails.

Invariant: every question of a round is recorded once, answered or failed, or the simulation raises.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow.fs as pafs

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.coordination.client import CoordinatorClient
from aft_ray.coordination.coordinator import Coordinator, PeerFailed
from aft_ray.evaluation.during_run import EvaluationDuringRun, evaluation_name
from aft_ray.planning.simulation.assumptions import SimulationAssumptions, most_sequences
from aft_ray.planning.simulation.failures import fail_repeatedly, failure_sources, gpus_of
from aft_ray.planning.simulation.questions import training_questions
from aft_ray.planning.simulation.result import RoundSamplingTimes, Simulated
from aft_ray.planning.simulation.samplers import SimulatedSamplers
from aft_ray.planning.simulation.trainer import SimulatedTrainer, group_sizes
from aft_ray.planning.simulation.virtual_time import VirtualTimeLoop
from aft_ray.run.orchestrator import Orchestrator
from aft_ray.sampling.round import RoundSampling, RunFailed
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.batching import GroupSize
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed

# Points of the curve of running sequences; when there are twice as many, every second one is dropped.
_POINTS = 1500


def simulate(config: RunConfig, assumed: SimulationAssumptions, seed: int = 0) -> Simulated:
    """The rounds of a run after round 0, from engines that run already to the last publication.

    Raises:
        ConfigError: the run samples nothing or adaptively, or the number of its questions is unknown.
    """
    if not config.samples or not config.rounds.count:
        raise ConfigError(
            "a run without sampled rounds has nothing to schedule; simulate an objective that samples, with "
            "rounds.count of at least 1"
        )
    if config.sampling.adaptive is not None:
        raise ConfigError(
            "simulated questions have no answers that sampling.adaptive could decide by; simulate with "
            "sampling.adaptive=null, which gives every question of every round sampling.k candidates, its upper bound"
        )
    with _run_dir_in_memory() as run_dir, asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        # The orchestrator is ordinary code that calls and waits. Whenever it waits, the event loop runs until what it
        # waits for has happened, and everything else that is simulated goes on in the meantime.
        return _SimulatedRun(config, assumed, seed, run_dir, runner).run()


@contextmanager
def _run_dir_in_memory() -> Iterator[RunDir]:
    memory, path = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    memory.mkdir(path)
    try:
        yield RunDir(path, filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(memory)))
    finally:
        memory.rm(path, recursive=True)


class _SimulatedRun:
    def __init__(
        self, config: RunConfig, assumed: SimulationAssumptions, seed: int, run_dir: RunDir, runner: asyncio.Runner
    ) -> None:
        self._config, self._assumed, self._seed, self._run_dir, self._runner = config, assumed, seed, run_dir, runner
        self._loop = runner.get_loop()
        self._coordinator = Coordinator()
        self._questions = training_questions(config, assumed)
        self._sampled: list[RoundSamplingTimes] = []
        self._curve: list[tuple[float, float]] = []
        self._samplers, self._trainer = runner.run(self._start())

    def run(self) -> Simulated:
        training = self._loop.create_task(self._trainer.run(1, self._config.rounds.count))
        sources = failure_sources(self._config, self._assumed, self._samplers.samplers, self._trainer)
        others = [self._record_curve(), *(fail_repeatedly(s, self._seed, n) for n, s in enumerate(sources))]
        tasks = [self._loop.create_task(other) for other in others]
        stopped = None
        try:
            self._orchestrator().run(first_round=1)
            self._loop.run_until_complete(training)
        except (PeerFailed, RunFailed, SamplersFailed, WeightUpdateFailed) as failed:
            stopped = str(failed)
            if training.done() and not isinstance(training.exception(), PeerFailed | None):
                raise training.exception() or failed from failed
        for task in (training, *tasks):
            task.cancel()
        self._runner.run(self._samplers.health.close())
        sampling_s = sum(one.seconds for one in self._sampled)
        return Simulated(
            sampled=self._sampled,
            trained=self._trainer.rounds,
            seconds=self._loop.time(),
            gpus=sum(gpus_of(self._config)),
            sampler_failures=sum(sampler.failures for sampler in self._samplers.samplers),
            trainer_failures=self._trainer.failures,
            forwarding=self._samplers.forwarder.busy_s / sampling_s if sampling_s else 0.0,
            stopped=stopped,
            curve=self._curve,
        )

    async def _start(self) -> tuple[SimulatedSamplers, SimulatedTrainer]:
        samplers = SimulatedSamplers(
            self._config, self._assumed, self._seed, len(self._questions), self._loop.run_until_complete
        )
        samplers.health.watch()
        return samplers, SimulatedTrainer(self._config, self._assumed, self._coordinator, self._group_sizes)

    def _orchestrator(self) -> Orchestrator:
        client: CoordinatorClient[VersionManifest] = CoordinatorClient(self._call_coordinator)
        ledger = Ledger(self._run_dir)

        def evaluate(manifest: VersionManifest) -> None:
            self._samplers.evaluate(self._run_dir, manifest, evaluation_name(manifest.version))

        return Orchestrator(
            self._config,
            ledger,
            client,
            self._samplers,
            RoundSampling(
                self._config, ledger, self, self._questions, self._samplers.stream, client.check, clock=self._loop.time
            ),
            EvaluationDuringRun(self._config, self._run_dir, evaluate),
            lambda version: VersionManifest(version, "", (), ()),
        )

    def _call_coordinator(self, method: str, *arguments: Any) -> Any:
        return self._loop.run_until_complete(getattr(self._coordinator, method)(*arguments))

    def _group_sizes(self, round_number: int) -> list[GroupSize]:
        return group_sizes(self._config, self._samplers.work[round_number], self._samplers.answered[round_number])

    async def _record_curve(self) -> None:
        """Records at intervals which share of the engines' sequence slots is in use."""
        slots, interval = len(self._samplers.samplers) * most_sequences(self._config, self._assumed), 1.0
        while True:
            running = sum(sampler.engine.running for sampler in self._samplers.samplers)
            self._curve.append((self._loop.time(), running / slots))
            if len(self._curve) > 2 * _POINTS:
                self._curve, interval = self._curve[::2], 2 * interval
            await asyncio.sleep(interval)

    # The methods of `sampling.round.RoundReporter`, which the sampling of a round calls.

    def say(self, text: str) -> None:
        """Does nothing: a simulation shows a table at its end."""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Does nothing: a simulation is too short for progress."""

    def event(self, name: str, **fields: Any) -> None:
        """Keeps the times of a sampled round."""
        if name != "sampled":
            return
        seconds, streamed = fields["seconds"], self._samplers.streamed[fields["round"]]
        engines = len(self._samplers.samplers)
        self._sampled.append(
            RoundSamplingTimes(
                round=fields["round"],
                version=fields["version"],
                staleness=fields["staleness"],
                waited_s=fields["waited_s"],
                load_s=self._samplers.load_s,
                evaluate_s=self._samplers.evaluate_s,
                started=self._loop.time() - seconds,
                ended=self._loop.time(),
                tail_s=streamed.tail_s,
                questions=fields["groups"] + fields["parked"],
                parked=fields["parked"],
                tokens=streamed.tokens,
                full=streamed.tokens / (seconds * engines * peak_tokens_per_s(self._config, self._assumed)),
                busy=streamed.busy_s / (seconds * engines),
            )
        )


def peak_tokens_per_s(config: RunConfig, assumed: SimulationAssumptions) -> float:
    """Tokens that one engine generates in a second when it runs as many sequences as it can."""
    running = most_sequences(config, assumed)
    return running / (assumed.step_ms / 1e3 + running * assumed.step_us_per_sequence / 1e6)
