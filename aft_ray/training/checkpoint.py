"""The training state of a round: what a worker group needs to go on after it, wherever it starts again.

Each rank writes its shards to a local disk and goes on training while they are copied to the run directory.
Invariants: a checkpoint counts only with its manifest, which rank 0 writes when every rank's files are there; one save
is under way at most; a save that fails ends the run.
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
from aft_ray.training import deepspeed
from aft_ray.training.loading import LoadingError


class CheckpointFailed(RuntimeError):
    """A training state that did not reach the run directory. Names the round."""


class Saver:
    """Saves the rounds of one rank, one after the other. All ranks make theirs, and call it, together."""

    def __init__(self, run_dir: RunDir, rank: int, timeout_s: float, coordinator: Any) -> None:
        self._run_dir, self._rank, self._timeout_s, self._coordinator = run_dir, rank, timeout_s, coordinator
        # A group of its own, since training talks over the default one meanwhile.
        self._peers = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # A killed worker leaves its files behind; whoever has its rank next removes them.
        run = hashlib.sha256(run_dir.uri().encode()).hexdigest()[:16]
        self._scratch = Path(tempfile.gettempdir(), f"aft-ray-checkpoint-{run}-{rank}")
        self._round = 0
        self._under_way: Future[None] | None = None

    def begin(self, engine: Any, round_number: int, durable: Callable[[], None]) -> None:
        """Returns when this rank's shards are in local files, which `engine` may then outrun.

        durable: called on rank 0, in another thread, when the checkpoint has its manifest.
        """
        self.wait()
        path = self._run_dir.checkpoint(round_number)
        if self._rank == 0:
            self._run_dir.delete(path)
        dist.barrier()
        shutil.rmtree(self._scratch, ignore_errors=True)
        deepspeed.save(engine, self._scratch, {"round": round_number})
        under_way: Future[None] = Future()
        self._round, self._under_way = round_number, under_way
        storage = ray.train.get_context().get_storage()

        def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            try:
                self._run_dir.add_files(checkpoint.path, path)
                dist.monitored_barrier(self._peers)
                if self._rank == 0:
                    self._run_dir.write_manifest(path)
                    durable()
                shutil.rmtree(self._scratch)
            except BaseException as error:
                reason = (str(error).splitlines() or [repr(error)])[0]
                failure = CheckpointFailed(f"the checkpoint of round {round_number} could not be saved: {reason}")
                under_way.set_exception(failure)
                call(self._coordinator.fail, str(failure))
                raise failure from error
            under_way.set_result(None)
            return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

        ray.train.report(
            {"round": round_number},
            checkpoint=ray.train.Checkpoint.from_directory(self._scratch),
            checkpoint_dir_name=path.removeprefix("rounds/"),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # `upload` does: the next save begins in the same place
        )

    def wait(self) -> None:
        """Until no save is under way. Raises CheckpointFailed when it failed, or did not end in time."""
        if self._under_way is None:
            return
        try:
            self._under_way.result(self._timeout_s)
        except TimeoutError:
            raise CheckpointFailed(
                f"the checkpoint of round {self._round} did not reach {self._run_dir.uri()} in "
                f"training.timeout_s={self._timeout_s:.0f} s"
            ) from None
        self._under_way = None


@contextlib.contextmanager
def for_any_number(directory: Path, run_dir: RunDir, timeout_s: float) -> Iterator[Path]:
    """A checkpoint as a directory that any number of ranks can load, for as long as the context lasts.

    Made once where the run directory is mounted everywhere, else once on each node. All ranks call it together. Raises
    LoadingError on all of them.
    """
    staging = run_dir.staging()
    makes = dist.get_rank() == 0 if staging else int(os.environ["LOCAL_RANK"]) == 0
    name = f"aft-ray-universal-{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}"
    output = Path(staging or tempfile.gettempdir(), name)
    try:
        _together(lambda: _convert(directory, output, timeout_s) if makes else None)
        yield output
        dist.barrier()
    finally:
        if makes:
            shutil.rmtree(output, ignore_errors=True)


def _convert(directory: Path, output: Path, timeout_s: float) -> None:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    deepspeed.to_universal(directory, output, timeout_s)


def _together(work: Callable[[], None]) -> None:
    """Works on every rank, and raises on every rank the first LoadingError of any, so that none waits for another."""
    failure = None
    try:
        work()
    except LoadingError as error:
        failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for sentence in filter(None, failures):
        raise LoadingError(sentence)
