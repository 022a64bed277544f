"""Checkpoints: the training state from which workers continue after a round, on whatever number of ranks.

Each rank writes its shards to a local disk, and they are copied to the run directory while training goes on.
Invariants: a checkpoint counts only with its manifest, which rank 0 writes when the files of every rank are there; at
most one checkpoint is being saved; a save that fails ends the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from aft_ray.coordination.coordinator import call
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.stored_files import StoredFile
from aft_ray.training import deepspeed
from aft_ray.training.loading import LoadingError


class CheckpointFailed(RuntimeError):
    """A training state could not be saved in the run directory. The message names the round."""


class CheckpointWriter:
    """Saves the training state of one rank after each round, one round at a time.

    All ranks create their writers together and call the methods together: `start` after each round, `wait` at the end.
    """

    def __init__(self, run_dir: RunDir, rank: int, timeout_s: float, coordinator: Any) -> None:
        self._run_dir, self._rank, self._timeout_s, self._coordinator = run_dir, rank, timeout_s, coordinator
        # A process group of its own, because training uses the default one in the meantime.
        self._process_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # The name is the same after a restart, so the files that a killed worker left are removed by its successor.
        run = hashlib.sha256(run_dir.uri().encode()).hexdigest()[:16]
        self._scratch = Path(tempfile.gettempdir(), f"aft-ray-checkpoint-{run}-{rank}")
        self._round = 0
        self._saving: Future[None] | None = None

    def start(self, engine: Any, round_number: int, on_durable: Callable[[], None]) -> None:
        """Starts to save a round. Waits for the round before it, then writes this rank's shards to the local disk.

        When it returns, `engine` may train on; the shards are copied to the run directory in another thread.

        Args:
            on_durable: called on rank 0, in that thread, when the checkpoint is complete and has its manifest.

        Raises:
            CheckpointFailed: the round before could not be saved.
        """
        self.wait()
        path = self._run_dir.checkpoint(round_number)
        if self._rank == 0:
            self._run_dir.delete(path)
        dist.barrier()
        shutil.rmtree(self._scratch, ignore_errors=True)
        deepspeed.save_checkpoint(engine, self._scratch, {"round": round_number})
        saving: Future[None] = Future()
        self._round, self._saving = round_number, saving
        storage = ray.train.get_context().get_storage()

        def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            try:
                written = self._gather(self._run_dir.add_files(checkpoint.path, path))
                if written is not None:
                    self._run_dir.write_manifest(path, written)
                    on_durable()
                shutil.rmtree(self._scratch)
            except BaseException as error:
                reason = (str(error).splitlines() or [repr(error)])[0]
                failure = CheckpointFailed(f"the checkpoint of round {round_number} could not be saved: {reason}")
                saving.set_exception(failure)
                call(self._coordinator.fail, str(failure))
                raise failure from error
            saving.set_result(None)
            return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

        ray.train.report(
            {"round": round_number},
            checkpoint=ray.train.Checkpoint.from_directory(self._scratch),
            checkpoint_dir_name=path.removeprefix("rounds/"),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # `upload` deletes it: the next save uses the same directory
        )

    def _gather(self, written: list[StoredFile]) -> list[StoredFile] | None:
        """The files that all ranks have written, on rank 0; None on the others. Names the rank that does not come."""
        dist.monitored_barrier(self._process_group, timeout=timedelta(seconds=self._timeout_s))
        of_all: list[list[StoredFile]] | None = [[]] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object(written, of_all, group=self._process_group)
        return None if of_all is None else [file for files in of_all for file in files]

    def wait(self) -> None:
        """Waits until nothing is being saved. Raises CheckpointFailed if the save failed or missed its deadline."""
        if self._saving is None:
            return
        try:
            self._saving.result(self._timeout_s)
        except TimeoutError:
            raise CheckpointFailed(
                f"the checkpoint of round {self._round} did not reach {self._run_dir.uri()} in "
                f"training.timeout_s={self._timeout_s:.0f} s"
            ) from None
        self._saving = None


@contextlib.contextmanager
def universal_checkpoint(directory: Path, run_dir: RunDir, timeout_s: float) -> Iterator[Path]:
    """Converts a checkpoint for another number of ranks; yields a directory that exists as long as the context lasts.

    If the run directory is on storage that every node mounts, rank 0 converts it there; else one rank on each node
    converts it on the local disk. All ranks call this together.

    Raises:
        LoadingError: on every rank, if the conversion failed on any.
    """
    shared = run_dir.staging()
    converts = dist.get_rank() == 0 if shared else int(os.environ["LOCAL_RANK"]) == 0
    name = f"aft-ray-universal-{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}"
    output = Path(shared or tempfile.gettempdir(), name)
    try:
        _raise_on_every_rank(lambda: _convert(directory, output, timeout_s) if converts else None)
        yield output
        dist.barrier()
    finally:
        if converts:
            shutil.rmtree(output, ignore_errors=True)


def _convert(directory: Path, output: Path, timeout_s: float) -> None:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    deepspeed.convert_to_universal(directory, output, timeout_s)


def _raise_on_every_rank(work: Callable[[], None]) -> None:
    """Calls `work` on every rank. A LoadingError of one rank is raised on all, so that no rank waits for another."""
    message = None
    try:
        work()
    except LoadingError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for failure in filter(None, messages):
        raise LoadingError(failure)
