"""A simulated sampler: it takes virtual time where a real one takes a GPU, batches continuously, and can fail.

Invariants: it has the methods and raises the exceptions of the handle of a `sampling.sampler.Sampler` actor, as far as
`sampling.sample_stage.SampleStage` uses them; it answers only with the policy version that a call names; a call is
answered once, or fails once.
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


class _SimulatedRequest:
    """The candidates of one question in an engine."""

    __slots__ = ("done", "left", "prompt", "started")

    def __init__(self, prompt: int, left: int, done: Callable[[], None]) -> None:
        self.prompt, self.left, self.done, self.started = prompt, left, done, False


class SimulatedEngine:
    """An engine with continuous batching.

    In each step every running sequence gets one token, and a step takes a + b x (running sequences) seconds. The prompt
    of a request is computed once, when its first sequence is admitted, and decoding stops meanwhile; the other
    candidates find it in the prefix cache. Sequences are admitted first come, first served, up to `max_num_seqs`. All
    running sequences advance by the same number of steps, so an event is needed only when a sequence ends.
    """

    def __init__(self, assumed: SimulationAssumptions, max_num_seqs: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_s, self._per_sequence_s = assumed.step_ms / 1e3, assumed.step_us_per_sequence / 1e6
        self._prefill = assumed.prefill_tokens_per_s
        self._room = max_num_seqs
        self._waiting: deque[tuple[_SimulatedRequest, int]] = deque()
        self._running: list[
            tuple[float, int, _SimulatedRequest, int]
        ] = []  # a heap of (step in which the sequence ends, number, request, tokens)
        self._step, self._at, self._prefilled_at, self._number = 0.0, self._loop.time(), 0.0, 0
        self._timer: asyncio.TimerHandle | None = None
        self.tokens, self.busy_s = 0, 0.0

    @property
    def running(self) -> int:
        """Sequences that are running now."""
        return len(self._running)

    def add(self, requests: Sequence[tuple[int, Sequence[int], Callable[[], None]]]) -> None:
        """Adds requests, given as (tokens of the prompt, tokens of each candidate, function to call at the end)."""
        self._advance()
        for prompt, lengths, done in requests:
            request = _SimulatedRequest(prompt, len(lengths), done)
            self._waiting.extend((request, length) for length in lengths)
        self._admit_and_wait()

    def stop(self) -> None:
        """Drops every sequence that waits or runs."""
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
        # The timer was set for the sequence that ends first; what is left of its step is a rounding error.
        self._step = max(self._step, self._running[0][0])
        while self._running and self._running[0][0] <= self._step + 1e-6:
            _, _, request, length = heapq.heappop(self._running)
            self.tokens += length
            request.left -= 1
            if request.left == 0:
                request.done()
        self._admit_and_wait()


class _Method:
    """A method of an actor handle: `remote(...)` returns a future at once."""

    def __init__(self, call: Callable[..., asyncio.Future[Any]]) -> None:
        self.remote = call


class SimulatedSampler:
    """The handle of a simulated sampler actor.

    The prompt of a simulated question is two token ids, its stage and its number in `work` (see `questions.py`). A
    simulated response is one token id, which is the response's length.
    """

    def __init__(self, index: int, assumed: SimulationAssumptions, max_num_seqs: int, work: Mapping[int, Work]) -> None:
        self._loop = asyncio.get_running_loop()
        self._name, self._assumed, self._work = f"sampler {index}", assumed, work
        self.engine = SimulatedEngine(assumed, max_num_seqs)
        self.version: int | None = None
        self.failures = 0
        self._process = 0  # the number of the present process; callbacks of an earlier one do nothing
        self._up, self._silent = True, False
        self._loading = asyncio.Lock()
        self._open: dict[asyncio.Future[Any], None] = {}  # ordered, unlike a set
        self.sample, self.load, self.status = _Method(self._sample), _Method(self._load), _Method(self._status)

    def fail(self, noticed_s: float, back_s: float) -> None:
        """The process ends now. Its calls fail after `noticed_s`; it answers again after `back_s`."""
        self.failures += 1
        self._process += 1
        self._up, self.version = False, None
        self._silent = noticed_s > 0
        self._loading = asyncio.Lock()
        self.engine.stop()
        process = self._process
        self._loop.call_later(noticed_s, self._noticed, process)
        if not self._gone:
            self._loop.call_later(max(noticed_s, back_s), self._back, process)

    @property
    def _gone(self) -> bool:
        """Whether Ray has restarted the actor as often as it may."""
        return self.failures > MAX_RESTARTS

    def _noticed(self, process: int) -> None:
        if process == self._process:
            self._silent = False
            for call in list(self._open):
                self._refuse(call)

    def _back(self, process: int) -> None:
        if process == self._process:
            self._up = True

    def _refuse(self, call: asyncio.Future[Any]) -> None:
        self._open.pop(call, None)
        if not call.done():
            call.set_exception(
                ActorDiedError() if self._gone else ActorUnavailableError(f"{self._name} is restarting", None)
            )

    def _call(self) -> asyncio.Future[Any]:
        """A new call. It fails when the process ends, and at once when the process is known to have ended."""
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
            task = self._loop.create_task(self._load_in_turn(manifest.version, call, self._process))
            call.add_done_callback(lambda _: task)  # an event loop keeps no reference to its tasks
        return call

    async def _load_in_turn(self, version: int, call: asyncio.Future[Any], process: int) -> None:
        async with self._loading:
            needed = self.version != version
            if needed:
                self.version = None
                await asyncio.sleep(self._assumed.load_s)
            if process != self._process:
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
