"""Which policy version an engine holds, and how it is brought to another one: for samplers and for the service.

Invariant: from the first moment of an update an engine holds no version, until its scores of the new version's probes
have agreed with the trainer's. An update that fails leaves it without a version.

A sampler's engine runs in a thread of its own (`engine.Engine`), the service's in vLLM's asynchronous client. They
differ in how new weights are received while no request is running and in how a response is scored, which is the
protocol `UpdatableEngine`. They also differ in what follows a failed update, which is therefore left to the caller: a
sampler waits for the next update, the service loads the previous version again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from aft_ray.config.messages import first_line
from aft_ray.inference.update_phases import PhaseTimeout, UpdatePhases
from aft_ray.weights.receive_plan import RECOVERABLE_PHASES, EngineCall, Phase
from aft_ray.weights.version_manifest import VersionManifest, WeightsMissed, WeightUpdateFailed

# What vLLM puts around the error of a worker in another process.
_OTHER_PROCESS = re.compile(
    r"^(Call to collective_rpc method failed: )?(Worker failed with error ')?"
    r"|', please check the stack trace above for the root cause$"
)


class WrongVersion(RuntimeError):
    """The engine holds another policy version than was asked for, or none."""


class WeightTransferFailed(RuntimeError):
    """New weights did not arrive. The engine's weights are undefined now; it works again after the next update."""


class WrongWeights(WeightTransferFailed):
    """New weights arrived and are not what the trainer sent, or were not all loaded. Another update may follow."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """How an engine was brought to a version: seconds of each phase, all zero when it held the version already.

    Attributes:
        probe_difference: largest difference between the engine's and the trainer's scores of the probes, nats per
            token.
    """

    version: int
    rendezvous_s: float = 0.0
    fetch_s: float = 0.0
    load_s: float = 0.0
    verify_s: float = 0.0
    probe_difference: float = 0.0

    @property
    def seconds(self) -> float:
        return self.rendezvous_s + self.fetch_s + self.load_s + self.verify_s


class UpdatableEngine(Protocol):
    """What an engine does for its VersionedEngine. Both methods return at once."""

    def update_weights(
        self, calls: Iterator[EngineCall], enter_phase: Callable[[Phase], None], adapter: int
    ) -> Future[None] | asyncio.Future[None]:
        """Receives new weights with `receive_weights`, while no request is running.

        Args:
            adapter: the number of the LoRA adapter that the calls bring, which later requests carry; 0: there is none.
        """
        ...

    def score(
        self, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]
    ) -> Future[float] | asyncio.Future[float]:
        """Mean token log-probability of a response under the engine's present weights, nats per token."""
        ...


class BlockingClient(Protocol):
    """vLLM's LLMEngine, as far as `receive_weights` uses it."""

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> Any: ...

    def reset_prefix_cache(self) -> bool: ...


class VersionedEngine:
    """An engine with the policy version that it holds. Used from one event loop.

    Attributes:
        name: what messages call the engine.
        version: the version that the engine holds; None: none, or weights that have no number.
    """

    def __init__(self, name: str, engine: UpdatableEngine, version: int | None, timeout_key: str) -> None:
        """
        Args:
            version: the version of the weights that the engine was started with.
            timeout_key: the config key of the deadline of an update's phases, for messages.
        """
        self.name, self.version = name, version
        self._engine, self._timeout_key = engine, timeout_key
        self._phases = UpdatePhases()
        self._updating = asyncio.Lock()

    @property
    def phase(self) -> str:
        """The phase of the present update; "idle" when there is none."""
        return self._phases.name

    def require_version(self, version: int | None) -> None:
        """Raises WrongVersion when the engine does not hold this version."""
        if version != self.version:
            raise WrongVersion(f"{self.name} holds version {self.version}, not {version}")

    async def drop_weights(self, drop: Callable[[], Future[Any]]) -> None:
        """Waits for a running update, then for `drop`, which makes the engine lose its weights."""
        async with self._updating:
            self.version = None
            await asyncio.wrap_future(drop())

    async def update(self, manifest: VersionManifest, tolerance: float, timeout_s: float) -> UpdateReport:
        """Loads a version and verifies its probes. Does nothing when the engine holds the version already.

        Args:
            tolerance: largest allowed difference of a probe's score, nats per token.
            timeout_s: deadline of each phase, seconds.

        Raises:
            PhaseTimeout: a phase did not end by its deadline. The engine must not be used again.
            WeightUpdateFailed: the weights did not arrive, a digest or the probes' scores differ. Another update may
                follow.
            Exception: any other error of the engine, unchanged.
        """
        async with self._updating:
            if self.version == manifest.version:
                return UpdateReport(manifest.version)
            self.version = None
            self._phases = UpdatePhases()
            try:
                report = await self._update(manifest, tolerance, timeout_s)
            except PhaseTimeout as error:
                raise PhaseTimeout(self._failure(manifest, timeout_s, error)) from None
            except WrongWeights as error:
                raise WeightUpdateFailed(
                    f"{self.name} got wrong weights of version {manifest.version}: {error}; it answers nothing"
                ) from None
            except WeightTransferFailed as error:
                raise WeightsMissed(self._failure(manifest, timeout_s, error)) from None
            finally:
                self._phases.leave()
            self.version = manifest.version
            return report

    async def verify_probes(self, manifest: VersionManifest, tolerance: float) -> float:
        """The largest difference between the engine's scores of a version's probes and the trainer's, nats per token.

        Raises:
            WeightUpdateFailed: it is above `tolerance`.
        """
        scores = await self._score_probes(manifest)
        return manifest.verify_probes(scores, tolerance, self.name)

    async def _update(self, manifest: VersionManifest, tolerance: float, timeout_s: float) -> UpdateReport:
        phases = self._phases
        phases.enter("fetch")
        received = self._engine.update_weights(manifest.calls(timeout_s), phases.enter, manifest.adapter)
        await phases.watch(received, timeout_s)
        phases.enter("verify")
        scores = await phases.watch(self._score_probes(manifest), timeout_s)
        difference = manifest.verify_probes(scores, tolerance, self.name)
        phases.leave()
        seconds = phases.seconds
        return UpdateReport(
            manifest.version, seconds["rendezvous"], seconds["fetch"], seconds["load"], seconds["verify"], difference
        )

    def _score_probes(self, manifest: VersionManifest) -> asyncio.Future[list[float]]:
        scores = [self._engine.score(probe.prompt_token_ids, probe.response_token_ids) for probe in manifest.probes]
        return asyncio.gather(*map(asyncio.wrap_future, scores))

    def _failure(self, manifest: VersionManifest, timeout_s: float, error: Exception) -> str:
        return (
            f"{self.name} did not get through phase {self.phase!r} of publishing version {manifest.version}: {error}; "
            f"{self._timeout_key} ({timeout_s:.0f} s a phase) sets the deadline"
        )


def receive_weights(client: BlockingClient, calls: Iterator[EngineCall], enter_phase: Callable[[Phase], None]) -> None:
    """Makes the calls of a receive plan, and drops the prefix cache, which was computed with the old weights.

    It blocks until the weights are in the engine. No request may be running, and the calling thread must not be the
    one that answers `client`.

    Raises:
        WrongWeights: a worker process says that the weights are not those that were sent, or not complete.
        WeightTransferFailed: a phase failed after which the engine can take another update.
        Exception: another phase failed, so that the state of the engine is unknown.
    """
    phase: Phase = "fetch"
    problems: list[str] = []
    enter_phase(phase)
    try:
        for call in calls:
            phase = call.phase
            enter_phase(phase)
            results = client.collective_rpc(call.method, args=call.args)
            problems += [
                _located(one, rank, len(results))
                for rank, one in enumerate(results or [])
                if isinstance(one, str) and one
            ]
    except Exception as error:
        if phase not in RECOVERABLE_PHASES:
            raise
        raise WeightTransferFailed(_reason(error)) from None
    if problems:
        raise WrongWeights(problems[0])
    if not client.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be reset after new weights were loaded")


def _reason(error: Exception) -> str:
    """What a worker process said, without the stack frames that torch adds, and without vLLM's words around it."""
    return _OTHER_PROCESS.sub("", first_line(error))


def _located(problem: object, rank: int, processes: int) -> str:
    return f"{problem}" if processes == 1 else f"{problem}, in its process {rank} of {processes}"
