"""Writes the model directory of a version from all ranks, in the background, while the next round trains.

Each rank writes the files of the layers that it owns. Invariants: a directory counts only with its manifest, which rank
0 writes when the files of every rank are there; at most one directory is being written; a write that fails ends the
run.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.coordination.coordinator import call
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.stored_files import StoredFile
from aft_ray.training.process_groups import BackgroundGroup, RankFailed
from aft_ray.weights.export import store_file
from aft_ray.weights.shard_file import ShardFile

# Seconds of waiting after which a worker says in its log what it waits for.
_QUIET_S = 30.0


class ModelWriteFailed(RuntimeError):
    """A model directory could not be written in the run directory. The message names the version."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A model directory that is being written."""

    version: int
    timeout_s: float
    ended: Future[float]

    def wait(self) -> float:
        """Waits until the directory is durable. Returns the seconds that writing took.

        Raises:
            ModelWriteFailed: it could not be written, or not in time.
            RuntimeError: another rank ended meanwhile.
        """
        quiet_s = min(_QUIET_S, self.timeout_s)
        if not wait([self.ended], quiet_s).done:
            print(f"waits until the model directory of version {self.version} is written", file=sys.stderr, flush=True)
        if not wait([self.ended], self.timeout_s - quiet_s).done:
            raise ModelWriteFailed(_too_late(self.version, self.timeout_s))
        return self.ended.result()


class ModelWriter:
    """Writes the model directories of a run, one at a time. All ranks create theirs together, and call it together.

    Attributes:
        writing: the directory that was begun last, until `wait` has returned.
    """

    def __init__(self, run_dir: RunDir, rank: int, timeout_s: float, coordinator: Any) -> None:
        self._run_dir, self._rank, self._timeout_s, self._coordinator = run_dir, rank, timeout_s, coordinator
        self._group = BackgroundGroup(timeout_s)
        self.writing: Writing | None = None

    def start(
        self,
        version: int,
        path: str,
        files: list[ShardFile],
        describe: Callable[[Path], None],
        on_durable: Callable[[], None],
    ) -> Writing:
        """Begins to write a directory in another thread, after the one before. An incomplete directory is replaced.

        Args:
            path: the directory, relative to the run directory.
            files: the files of this rank, which are freed as they are written.
            describe: writes the other files of the directory into a local one. Called on rank 0, in the thread.
            on_durable: called on rank 0, in the thread, when the directory is complete and has its manifest.
        """
        self.wait()
        writing = Writing(version, self._timeout_s, Future())
        self.writing = writing

        def write() -> None:
            started = time.monotonic()
            try:
                self._write(version, path, files, describe)
                if self._rank == 0:
                    on_durable()
            except BaseException as error:
                failure = error
                if isinstance(error, RankFailed):
                    failure = ModelWriteFailed(
                        f"the model directory of version {version} could not be written: {error}"
                    )
                elif time.monotonic() - started >= self._timeout_s:
                    failure = ModelWriteFailed(_too_late(version, self._timeout_s))
                try:
                    # When another rank has ended, the workers are started again: that does not end the run.
                    if isinstance(failure, ModelWriteFailed):
                        call(self._coordinator.fail, str(failure))
                finally:
                    writing.ended.set_exception(failure)
            else:
                writing.ended.set_result(time.monotonic() - started)

        threading.Thread(target=write, name=f"model directory {version}", daemon=True).start()
        return writing

    def wait(self) -> None:
        """Waits until nothing is being written. Raises what `Writing.wait` raises."""
        if self.writing is not None:
            self.writing.wait()
            self.writing = None

    def _write(self, version: int, path: str, files: list[ShardFile], describe: Callable[[Path], None]) -> None:
        """Writes the directory with the other ranks; it is durable on all of them when this returns on one."""

        def delete_incomplete() -> None:
            if self._rank == 0:
                self._run_dir.delete(path)

        def write_files() -> list[StoredFile]:
            written = []
            while files:
                file = files.pop(0)
                file.finish()
                written.append(store_file(self._run_dir, path, file.name, file.content))
                file.content = None  # frees the memory
            return written

        def complete() -> None:
            if self._rank == 0:
                with tempfile.TemporaryDirectory(prefix="aft-ray-model-") as scratch:
                    describe(Path(scratch))
                    described = self._run_dir.add_files(scratch, path)
                of_layers = [file for of_rank in written for file in of_rank]
                self._run_dir.write_manifest(path, [*of_layers, *described])

        self._group.on_all_ranks(delete_incomplete)
        written = self._group.on_all_ranks(write_files)
        self._group.on_all_ranks(complete)


def _too_late(version: int, timeout_s: float) -> str:
    return f"the model directory of version {version} was not written in training.timeout_s={timeout_s:.0f} s"
