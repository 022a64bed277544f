"""Progress and metrics of a process: shown to the person who watches, and recorded in the run directory.

Invariant: every event is one line of `metrics.jsonl`, and its numbers are TensorBoard scalars. A terminal shows
progress bars; any other output gets plain lines.
"""

from __future__ import annotations

import json
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from aft_ray.storage.run_dir import METRICS, TENSORBOARD, RunDir

if TYPE_CHECKING:
    from aft_ray.observe.tensorboard import ScalarWriter

# Without a terminal, the least number of seconds between two progress lines of the same work.
_PROGRESS_LINE_INTERVAL_S = 10.0
# On an object store, every append writes the whole object again. Step events are therefore held back for up to this
# many seconds, and written together with the next event.
_STEP_FLUSH_INTERVAL_S = 5.0
# The field of an event that is TensorBoard's step: the first of these that the event has.
_STEP_FIELDS = ("global_step", "round")


class Reporter:
    """Shows the progress and records the metrics of one process. It is thread-safe, and is used as a context manager.

    Without a run directory nothing is recorded. TensorBoard scalars are written only to a mounted filesystem.
    """

    def __init__(self, run_dir: RunDir | None, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._run_dir = run_dir
        self._lock = threading.RLock()
        self._bars: dict[str, TaskID] = {}
        self._started_at: dict[str, float] = {}
        self._last_line_at: dict[str, float] = {}
        self._scalars: ScalarWriter | None = None
        self._unwritten: list[str] = []
        self._written_at = time.monotonic()
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
            from aft_ray.observe.tensorboard import ScalarWriter

            self._scalars = ScalarWriter(self._run_dir.local_path(TENSORBOARD))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._write([])
        if self._scalars is not None:
            self._scalars.close()

    def say(self, text: str) -> None:
        """Prints one line."""
        with self._lock:
            self.console.print(text, markup=False)

    def event(self, name: str, **fields: Any) -> None:
        """Records an event with its fields, which must be JSON values."""
        if self._run_dir is None:
            return
        with self._lock:
            line = json.dumps({"time": round(time.time(), 3), "event": name, **fields})
            recently_written = time.monotonic() - self._written_at < _STEP_FLUSH_INTERVAL_S
            if name == "step" and not self._run_dir.is_local and recently_written:
                self._unwritten.append(line)
            else:
                self._write([line])
            if self._scalars is not None:
                step = next((fields[key] for key in _STEP_FIELDS if key in fields), None)
                for key, value in fields.items():
                    if isinstance(value, int | float) and key not in _STEP_FIELDS and step is not None:
                        self._scalars.add_scalar(f"{name}/{key}", value, step)

    def _write(self, lines: list[str]) -> None:
        lines, self._unwritten = self._unwritten + lines, []
        if lines and self._run_dir is not None:
            self._run_dir.append_line(METRICS, "\n".join(lines))
            self._written_at = time.monotonic()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Shows how much of the work `what` is done. The work has ended when done == total."""
        with self._lock:
            if self.console.is_terminal:
                self._show_bar(what, done, total, note)
            else:
                self._show_line(what, done, total, note)

    def _show_bar(self, what: str, done: int, total: int, note: str) -> None:
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._bars[what], completed=done, total=total, note=note)
        if done >= total:
            self._progress.remove_task(self._bars.pop(what))

    def _show_line(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        started = self._started_at.setdefault(what, now)
        if done >= total:
            del self._started_at[what]
            self._last_line_at.pop(what, None)
        elif now - self._last_line_at.get(what, started) >= _PROGRESS_LINE_INTERVAL_S:
            self._last_line_at[what] = now
            left = (now - started) / max(1, done) * (total - done)
            self.console.print(f"{what}: {done}/{total}, {note + ', ' if note else ''}{left:.0f} s left", markup=False)
