"""Verifies responses in worker processes, because a response can make its process hang, crash or run out of memory.

Invariant: every request gets a result in bounded time, in order, and from any thread. If a request harms its worker
process, that request alone becomes undecided, with the reason.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from aft_ray.storage.records import Verdict
from aft_ray.verify.answers.compare import error_reason
from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH
from aft_ray.verify.fork_server import LightContext
from aft_ray.verify.result import VerificationResult, undecided

MAX_TEXT_LENGTH = 100_000  # Characters. A longer response is a degenerate sample and is not sent to a worker.
DEADLINE_S = 5.0
MEMORY_BYTES = 1 << 30  # What a worker may allocate in addition to what it starts with.
_CHUNK_SIZE = 64  # Requests that are sent to a worker at once.
_CHUNK_SECONDS = 1.0  # After this time a worker returns the results that it has; the other requests are sent again.
_MAX_CHUNKS_PER_WORKER = 500  # Then a worker is replaced, because the caches of the algebra system grow.
_UNRESPONSIVE_S = 60.0  # Beyond the deadline. If no worker returns anything for so long, the pool is restarted.


class AnswerReader(Protocol):
    """The part of a task that verification uses.

    It is pickled and sent to the workers, so its class must be importable there.
    """

    def extract(self, text: str) -> str | None:
        """The final answer in a response, or None when the response has no final answer."""

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        """The verdict on an extracted answer, compared with the gold answer."""


@dataclass(frozen=True, slots=True)
class VerificationRequest:
    """One response to verify: the task that reads it, its text, and the gold answer."""

    task: AnswerReader
    text: str
    gold: str


@dataclass(frozen=True, slots=True)
class _PendingChunk:
    """Requests that were sent to a worker. The worker returns the results of the first ones, at least one."""

    indices: Sequence[int]
    future: ProcessFuture[list[VerificationResult]]


class Verifier:
    """A bounded pool of light worker processes. The first call of `verify` starts them, and `close` ends them.

    Args:
        workers: The number of processes.
        deadline_s: The time limit of one request, in seconds. A worker outlives a parent that was killed by about
            this time at most.
        memory_bytes: What each worker may allocate in addition to what it starts with.
    """

    def __init__(self, workers: int = 1, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._workers = workers
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._finished_chunks = 0

    def verify(self, requests: Sequence[VerificationRequest]) -> list[VerificationResult]:
        """One result for each request, in order."""
        results = [_reject_oversized(request) for request in requests]
        to_send = [index for index, result in enumerate(results) if result is None]
        size = max(1, min(_CHUNK_SIZE, -(-len(to_send) // self._workers)))
        pending = deque(self._send(requests, to_send[start : start + size]) for start in range(0, len(to_send), size))
        while pending:
            chunk = pending.popleft()
            received, problem = self._receive(chunk)
            for index, result in zip(chunk.indices, received, strict=False):
                results[index] = result
            rest = chunk.indices[len(received) :]
            if problem and len(rest) == 1:
                results[rest[0]] = undecided(problem)
            elif problem:
                # One of these requests caused the problem. Sent alone, it cannot affect the others.
                pending.extend(self._send(requests, [index]) for index in rest)
            elif rest:
                pending.append(self._send(requests, rest))
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Ends the workers. A later call of `verify` starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()

    def _send(self, requests: Sequence[VerificationRequest], indices: Sequence[int]) -> _PendingChunk:
        # The requests are pickled here, so that a task that cannot be unpickled fails inside `_verify_chunk` and does
        # not end the worker. One pickle writes a task that many requests share only once.
        message = pickle.dumps([requests[index] for index in indices])
        limit_s = self._deadline_s if len(indices) == 1 else self._deadline_s + _CHUNK_SECONDS
        with self._lock:
            if self._pool is not None and not self._pool.active:  # Another process killed a worker while it was idle.
                self._pool.join()
                self._pool = None
            if self._pool is None:
                self._pool = ProcessPool(
                    max_workers=self._workers,
                    max_tasks=_MAX_CHUNKS_PER_WORKER,
                    initializer=_limit_this_process,
                    initargs=(self._memory_bytes,),
                    context=LightContext(),
                )
            future = self._pool.schedule(_verify_chunk, (message, self._deadline_s + 1), timeout=limit_s)
        future.add_done_callback(self._count_finished)
        return _PendingChunk(indices, future)

    def _receive(self, chunk: _PendingChunk) -> tuple[list[VerificationResult], str]:
        """The results of the first requests of a chunk, and the problem with the others; empty without a problem."""
        while True:
            finished_before = self._finished_chunks
            try:
                return chunk.future.result(timeout=self._deadline_s + _UNRESPONSIVE_S), ""
            except TimeoutError:
                if chunk.future.done():
                    return [], f"took longer than {self._deadline_s:g} s"
                if self._finished_chunks == finished_before:
                    self.close()
                    return [], "the verification processes did not answer"
            except ProcessExpired as error:
                return [], f"its process died (exit code {error.exitcode})"
            except (BrokenProcessPool, RuntimeError) as error:
                return [], error_reason(error)

    def _count_finished(self, _: object) -> None:
        self._finished_chunks += 1


def shared_verifier() -> Verifier:
    """The verifier of this process. It is made when it is first used and closed when the process ends."""
    global _shared
    with _shared_lock:
        # A forked child has a copy of the object, but not the threads that it needs.
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), Verifier(workers=min(2, os.cpu_count() or 1)))
            # `atexit` would be too late: a process of multiprocessing waits for its children before it calls that.
            Finalize(None, _shared[1].close, exitpriority=1)
        return _shared[1]


_shared: tuple[int, Verifier] | None = None
_shared_lock = threading.Lock()


def _reject_oversized(request: VerificationRequest) -> VerificationResult | None:
    """An undecided result for a request that is too long to send; None for any other."""
    length = max(len(request.text), len(request.gold))
    return undecided(f"the response has {length} characters") if length > MAX_TEXT_LENGTH else None


def _limit_this_process(memory_bytes: int) -> None:
    """Sets the limits of a worker process when it starts."""
    # The pool ends a worker with SIGTERM. A Python handler would not run during a long calculation.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # Other systems do not report the memory in use and do not enforce the limit.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _verify_chunk(message: bytes, deadline_s: float) -> list[VerificationResult]:
    """Runs in a worker. The results of the first requests, at least one and as many as `_CHUNK_SECONDS` allows."""
    requests: list[VerificationRequest] = pickle.loads(message)
    started = time.monotonic()
    results: list[VerificationResult] = []
    try:
        for request in requests:
            # If the parent is killed, nobody else ends this process. The default action of the alarm signal does.
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            results.append(_verify_one(request))
            if time.monotonic() - started > _CHUNK_SECONDS:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return results


def _verify_one(request: VerificationRequest) -> VerificationResult:
    answer: Any = None
    try:
        answer = request.task.extract(request.text)
        if not isinstance(answer, str | None):
            raise TypeError(f"extract gave a {type(answer).__name__} instead of a text")
        result = request.task.same(answer, request.gold)
        answer = answer if answer is None or len(answer) <= MAX_ANSWER_LENGTH else answer[:MAX_ANSWER_LENGTH] + "…"
        return VerificationResult(Verdict(result.verdict), answer, result.reason)
    except BaseException as error:  # Not even SystemExit, which a task may raise, may end this process.
        return undecided(error_reason(error), answer if isinstance(answer, str) else None)
