"""Verifies responses in worker processes that may hang, crash or run out of memory without doing harm.

Invariant: every item gets an outcome in bounded time, in order, from any thread; what an item does to its worker makes
that item undecided, with the reason, and no other.
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
from aft_ray.verify.answers.compare import failure
from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH
from aft_ray.verify.fork_server import LightContext
from aft_ray.verify.result import VerificationResult, undecided

MAX_TEXT_LENGTH = 100_000  # characters; a longer response is no answer to anything, and costs to send
DEADLINE_S = 5.0
MEMORY_BYTES = 1 << 30  # what a worker may allocate beyond what it starts with
_CHUNK = 64  # items sent at once
_CHUNK_S = 1.0  # a worker gives back what it has after so long, and gets the rest anew
_CHUNKS_PER_WORKER = 500  # then it is replaced: caches of the algebra system grow
_SILENCE_S = 60.0  # beyond the deadlines, without a sign of life from any worker


class Reader(Protocol):
    """The part of a task that is applied. It is sent to the workers pickled: its class must be importable there."""

    def extract(self, text: str) -> str | None: ...

    def same(self, answer: str | None, gold: str) -> VerificationResult: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One response to verify: how it is read, its text, and the gold answer."""

    task: Reader
    text: str
    gold: str


_Sent = tuple[
    Sequence[int], ProcessFuture[list[VerificationResult]]
]  # which items, and what comes of the first of them


class Verifier:
    """A bounded pool of light processes. The first call starts them, `close` ends them.

    workers: processes. deadline_s: per item; also about the longest that a worker outlives a parent that was killed.
    """

    def __init__(self, workers: int = 1, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._workers = workers
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._finished = 0

    def verify(self, items: Sequence[Item]) -> list[VerificationResult]:
        """One outcome an item, in order."""
        outcomes = [_oversized(item) for item in items]
        todo = [index for index, outcome in enumerate(outcomes) if outcome is None]
        size = max(1, min(_CHUNK, -(-len(todo) // self._workers)))
        waiting = deque(self._send(items, todo[at : at + size]) for at in range(0, len(todo), size))
        while waiting:
            indices, future = waiting.popleft()
            done, problem = self._receive(future)
            for index, outcome in zip(indices, done, strict=False):
                outcomes[index] = outcome
            rest = indices[len(done) :]
            if problem and len(rest) == 1:
                outcomes[rest[0]] = undecided(problem)
            elif problem:
                waiting.extend(self._send(items, [index]) for index in rest)
            elif rest:
                waiting.append(self._send(items, rest))
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """Ends the workers. A later call of `verify` starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()

    def _send(self, items: Sequence[Item], indices: Sequence[int]) -> _Sent:
        # Pickled here, so that a task which cannot be unpickled fails inside the call and not the worker.
        # Within one pickle, a task that many items share is written once.
        message = pickle.dumps([items[index] for index in indices])
        limit = self._deadline_s if len(indices) == 1 else self._deadline_s + _CHUNK_S
        with self._lock:
            if self._pool is not None and not self._pool.active:  # a worker was killed from outside while it was idle
                self._pool.join()
                self._pool = None
            if self._pool is None:
                self._pool = ProcessPool(
                    max_workers=self._workers,
                    max_tasks=_CHUNKS_PER_WORKER,
                    initializer=_bound_this_process,
                    initargs=(self._memory_bytes,),
                    context=LightContext(),
                )
            future = self._pool.schedule(_verify_chunk, (message, self._deadline_s + 1), timeout=limit)
        future.add_done_callback(self._count)
        return indices, future

    def _receive(self, future: ProcessFuture[list[VerificationResult]]) -> tuple[list[VerificationResult], str]:
        """The outcomes of the first items of a chunk, and what became of the one after them, if anything did."""
        while True:
            before = self._finished
            try:
                return future.result(timeout=self._deadline_s + _SILENCE_S), ""
            except TimeoutError:
                if future.done():
                    return [], f"took longer than {self._deadline_s:g} s"
                if self._finished == before:
                    self.close()
                    return [], "the verification processes did not answer"
            except ProcessExpired as error:
                return [], f"its process died (exit code {error.exitcode})"
            except (BrokenProcessPool, RuntimeError) as error:
                return [], failure(error)

    def _count(self, _: object) -> None:
        self._finished += 1


def shared_verifier() -> Verifier:
    """The verifier of this process: made on first use, closed at exit."""
    global _shared
    with _shared_lock:
        # A forked child has the object but none of the threads behind it.
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), Verifier(workers=min(2, os.cpu_count() or 1)))
            # Not atexit: a process that multiprocessing started waits for its children before that is called.
            Finalize(None, _shared[1].close, exitpriority=1)
        return _shared[1]


_shared: tuple[int, Verifier] | None = None
_shared_lock = threading.Lock()


def _oversized(item: Item) -> VerificationResult | None:
    length = max(len(item.text), len(item.gold))
    return undecided(f"the response has {length} characters") if length > MAX_TEXT_LENGTH else None


def _bound_this_process(memory_bytes: int) -> None:
    """Runs in a worker as it starts."""
    # The pool ends a worker with SIGTERM, which a handler in Python would not see during a long calculation.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere the limit is not kept, and what is used is not told
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _verify_chunk(message: bytes, deadline_s: float) -> list[VerificationResult]:
    """Runs in a worker: the outcomes of the first items, as many as there is time for, at least one."""
    items: list[Item] = pickle.loads(message)
    started = time.monotonic()
    outcomes: list[VerificationResult] = []
    try:
        for item in items:
            # Should the parent be killed, nobody else ends this process; the kernel's default for the alarm does.
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            outcomes.append(_verify_one(item))
            if time.monotonic() - started > _CHUNK_S:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcomes


def _verify_one(item: Item) -> VerificationResult:
    answer: Any = None
    try:
        answer = item.task.extract(item.text)
        if not isinstance(answer, str | None):
            raise TypeError(f"extract gave a {type(answer).__name__} instead of a text")
        said = item.task.same(answer, item.gold)
        answer = answer if answer is None or len(answer) <= MAX_ANSWER_LENGTH else answer[:MAX_ANSWER_LENGTH] + "…"
        return VerificationResult(Verdict(said.verdict), answer, said.reason)
    except BaseException as error:  # SystemExit of a task must not end the caller's process
        return undecided(failure(error), answer if isinstance(answer, str) else None)
