"""What a person sees while a run works, and what is written down about it.

Invariant: every event goes to `metrics.jsonl` as one line and, its numbers, to TensorBoard; the terminal shows the same
events as sentences, with live bars in a terminal and plain lines elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from aft_ray.storage.run_dir import METRICS, TENSORBOARD, RunDir

# Where there is no terminal, a line of progress at most this often.
_PLAIN_SECONDS = 10.0
# Where every line rewrites an object, steps may wait so long for each other. Other events take them along.
_HELD_SECONDS = 5.0
# Which field of an event is TensorBoard's step.
_STEP_FIELDS = ("global_step", "round")


@contextmanager
def chatter_to(log_file: Path) -> Iterator[Console]:
    """Sends all that libraries print in this process to a file; yields a console on the true standard output."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with os.fdopen(os.dup(saved[0]), "w", buffering=1) as terminal:
            os.dup2(log, 1)
            os.dup2(log, 2)
            yield Console(file=terminal, highlight=False, soft_wrap=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.close(log)


class Reporter:
    """Progress and metrics of one process. Thread-safe. Use as a context manager."""

    def __init__(self, run_dir: RunDir | None, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._run_dir = run_dir
        self._lock = threading.RLock()
        self._bars: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._tensorboard: Any = None
        self._held: list[str] = []
        self._wrote = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        if self._run_dir is not None and self._run_dir.is_local:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._run_dir.local_path(TENSORBOARD)))  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._write([])
        if self._tensorboard is not None:
            self._tensorboard.close()

    def say(self, text: str) -> None:
        """One line for the person watching."""
        with self._lock:
            self.console.print(text, markup=False)

    def event(self, name: str, **fields: Any) -> None:
        """Writes an event down."""
        if self._run_dir is None:
            return
        with self._lock:
            line = json.dumps({"time": round(time.time(), 3), "event": name, **fields})
            if name == "step" and not self._run_dir.is_local and time.monotonic() - self._wrote < _HELD_SECONDS:
                self._held.append(line)
            else:
                self._write([line])
            if self._tensorboard is not None:
                step = next((fields[key] for key in _STEP_FIELDS if key in fields), None)
                for key, value in fields.items():
                    if isinstance(value, int | float) and key not in _STEP_FIELDS and step is not None:
                        self._tensorboard.add_scalar(f"{name}/{key}", value, step)

    def _write(self, lines: list[str]) -> None:
        lines, self._held = self._held + lines, []
        if lines and self._run_dir is not None:
            self._run_dir.append_line(METRICS, "\n".join(lines))
            self._wrote = time.monotonic()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """How far some long work is; the work ends when done == total."""
        with self._lock:
            if self.console.is_terminal:
                self._bar(what, done, total, note)
            else:
                self._line(what, done, total, note)

    def _bar(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._bars[what], completed=done, total=total, note=note)
        if done >= total:
            self._progress.remove_task(self._bars.pop(what))

    def _line(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        if done >= total:
            del self._started[what]
            self._said.pop(what, None)
        elif now - self._said.get(what, started) >= _PLAIN_SECONDS:
            self._said[what] = now
            left = (now - started) / max(1, done) * (total - done)
            self.console.print(f"{what}: {done}/{total}, {note + ', ' if note else ''}{left:.0f} s left", markup=False)
