"""A sampler actor that takes virtual time instead of a GPU: an engine with continuous batching, and its failures.

Invariants: it looks to `Ask` like a handle of `sampling.sampler.Sampler` (same calls, same exceptions); it answers only
with the version it was asked for; a call is answered once, or fails once.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError

from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.inference.versioned_engine import UpdateReport, WrongVersion
from aft_ray.planning.simulation.assumptions import SimulationAssumptions, Work
from aft_ray.sampling.sampler_pool import MAX_RESTARTS
from aft_ray.storage.records import Candidate
from aft_ray.weights.version_manifest import VersionManifest


class _Request:
    """The candidates of one question in an engine."""

    __slots__ = ("done", "left", "prompt", "started")

    def __init__(self, prompt: int, left: int, done: Callable[[], None]) -> None:
        self.prompt, self.left, self.done, self.started = prompt, left, done, False


class SimulatedEngine:
    """Continuous batching: every running sequence advances a token a step, and a step takes a + b x (running) seconds.

    A request's prompt is computed once, when its first sequence is admitted, and holds up decoding meanwhile; the other
    candidates find it in the prefix cache. Sequences are admitted first come, first served, up to `max_num_seqs`.
    Between two events all running sequences advance alike, so an event is needed only where one ends.
    """

    def __init__(self, assumed: SimulationAssumptions, max_num_seqs: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_s, self._per_sequence_s = assumed.step_ms / 1e3, assumed.step_us_per_sequence / 1e6
        self._prefill = assumed.prefill_tokens_per_s
        self._room = max_num_seqs
        self._waiting: deque[tuple[_Request, int]] = deque()
        self._running: list[
            tuple[float, int, _Request, int]
        ] = []  # a heap: the step it ends in, number, request, tokens
        self._step, self._at, self._prefilled_at, self._number = 0.0, self._loop.time(), 0.0, 0
        self._timer: asyncio.TimerHandle | None = None
        self.tokens, self.busy_s = 0, 0.0

    @property
    def running(self) -> int:
        """Sequences running now."""
        return len(self._running)

    def add(self, requests: Sequence[tuple[int, Sequence[int], Callable[[], None]]]) -> None:
        """Requests as (tokens of the prompt, tokens of each candidate, what to call at the end of the last)."""
        self._advance()
        for prompt, lengths, done in requests:
            request = _Request(prompt, len(lengths), done)
            self._waiting.extend((request, length) for length in lengths)
        self._admit_and_wait()

    def stop(self) -> None:
        """Loses everything that waits or runs."""
        self._advance()
        self._waiting.clear()
        self._running.clear()
        self._prefilled_at = 0.0
        if self._timer is not None:
            self._timer.cancel()

    def _seconds_per_step(self) -> float:
        return self._step_s + self._per_sequence_s * len(self._running)

    def _advance(self) -> None:
        now = self._loop.time()
        if self._running:
            self.busy_s += now - self._at
            decoding = now - max(self._at, self._prefilled_at)
            if decoding > 0:
                self._step += decoding / self._seconds_per_step()
        self._at = now

    def _admit_and_wait(self) -> None:
        now = self._loop.time()
        while self._waiting and len(self._running) < self._room:
            request, length = self._waiting.popleft()
            if not request.started:
                request.started = True
                self._prefilled_at = max(self._prefilled_at, now) + request.prompt / self._prefill
            self._number += 1
            heapq.heappush(self._running, (self._step + length, self._number, request, length))
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            left = max(0.0, self._running[0][0] - self._step)
            self._timer = self._loop.call_at(
                max(now, self._prefilled_at) + left * self._seconds_per_step(), self._sequences_end
            )

    def _sequences_end(self) -> None:
        self._timer = None
        self._advance()
        # The timer was set for the first of them; what is left of its step is rounding.
        self._step = max(self._step, self._running[0][0])
        while self._running and self._running[0][0] <= self._step + 1e-6:
            _, _, request, length = heapq.heappop(self._running)
            self.tokens += length
            request.left -= 1
            if request.left == 0:
                request.done()
        self._admit_and_wait()


class _Method:
    """`actor.method.remote(...)`: a future at once."""

    def __init__(self, call: Callable[..., asyncio.Future[Any]]) -> None:
        self.remote = call


class SimulatedSampler:
    """The handle of a sampler actor. A simulated prompt is two tokens, its stage and its question's number in `work`;
    a simulated response is one, its length."""

    def __init__(self, index: int, assumed: SimulationAssumptions, max_num_seqs: int, work: Mapping[int, Work]) -> None:
        self._loop = asyncio.get_running_loop()
        self._name, self._assumed, self._work = f"sampler {index}", assumed, work
        self.engine = SimulatedEngine(assumed, max_num_seqs)
        self.version: int | None = None
        self.failures = 0
        self._life = 0  # counts restarts; what belongs to an earlier life is void
        self._up, self._silent = True, False
        self._loading = asyncio.Lock()
        self._open: dict[asyncio.Future[Any], None] = {}  # ordered, unlike a set
        self.sample, self.load, self.status = _Method(self._sample), _Method(self._load), _Method(self._status)

    def fail(self, noticed_s: float, back_s: float) -> None:
        """The process ends: its calls fail after `noticed_s`, and it answers again after `back_s`."""
        self.failures += 1
        self._life += 1
        self._up, self.version = False, None
        self._silent = noticed_s > 0
        self._loading = asyncio.Lock()
        self.engine.stop()
        life = self._life
        self._loop.call_later(noticed_s, self._noticed, life)
        if not self._gone:
            self._loop.call_later(max(noticed_s, back_s), self._back, life)

    @property
    def _gone(self) -> bool:
        """Ray has restarted it as often as it may."""
        return self.failures > MAX_RESTARTS

    def _noticed(self, life: int) -> None:
        if life == self._life:
            self._silent = False
            for call in list(self._open):
                self._refuse(call)

    def _back(self, life: int) -> None:
        if life == self._life:
            self._up = True

    def _refuse(self, call: asyncio.Future[Any]) -> None:
        self._open.pop(call, None)
        if not call.done():
            call.set_exception(
                ActorDiedError() if self._gone else ActorUnavailableError(f"{self._name} is restarting", None)
            )

    def _call(self) -> asyncio.Future[Any]:
        """A call that an end of the process will fail; one to a process that is known to have ended fails at once."""
        call = self._loop.create_future()
        self._open[call] = None
        call.add_done_callback(lambda done: self._open.pop(done, None))
        if not self._up and not self._silent:
            self._refuse(call)
        return call

    def _status(self) -> asyncio.Future[Any]:
        call = self._call()
        if self._up:
            call.set_result({"version": self.version})
        return call

    def _load(self, manifest: VersionManifest, tolerance: float, timeout_s: float) -> asyncio.Future[Any]:
        call = self._call()
        if self._up:
            task = self._loop.create_task(self._load_in_turn(manifest.version, call, self._life))
            call.add_done_callback(lambda _: task)  # an event loop keeps no reference to its tasks
        return call

    async def _load_in_turn(self, version: int, call: asyncio.Future[Any], life: int) -> None:
        async with self._loading:
            needed = self.version != version
            if needed:
                self.version = None
                await asyncio.sleep(self._assumed.load_s)
            if life != self._life:
                return
            self.version = version
            if not call.done():
                call.set_result(UpdateReport(version, 0.0, self._assumed.load_s if needed else 0.0, 0.0, 0.0))

    def _sample(self, prompts: Sequence[Prompt], how: SamplingSpec, version: int | None) -> asyncio.Future[Any]:
        call = self._call()
        if not self._up:
            return call
        if version != self.version:
            call.set_exception(WrongVersion(f"{self._name} holds version {self.version}, not {version}"))
            return call
        left = len(prompts)
        lengths = [self._lengths(prompt) for prompt in prompts]

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0 and not call.done():
                call.set_result([[Candidate([length], 0.0, "stop", "") for length in of_one] for of_one in lengths])

        sizes = [int(self._work[p.token_ids[0]].prompts[p.token_ids[1]]) for p in prompts]
        self.engine.add([(size, of_one, done) for size, of_one in zip(sizes, lengths, strict=True)])
        return call

    def _lengths(self, prompt: Prompt) -> list[int]:
        stage, number = prompt.token_ids
        lengths: list[int] = self._work[stage].lengths[number].tolist()
        return lengths
