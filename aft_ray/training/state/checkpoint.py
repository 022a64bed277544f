"""Checkpoints: the training state from which workers continue, after a round or inside it, on any number of ranks.

Each rank writes its shards to a local disk, and copies them to the run directory while training goes on. Invariants: a
rank reads and writes only its own bytes, and computes their digests meanwhile; a checkpoint counts only with its
manifest, which rank 0 writes when the files of every rank are there; at most one checkpoint is being saved; a save that
fails ends the run; what is loaded has the digests of its manifest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from aft_ray.coordination.coordinator import call
from aft_ray.storage.room import check_room
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.stored_files import StoredFile
from aft_ray.training import deepspeed
from aft_ray.training.process_groups import BackgroundGroup, RankFailed, raise_on_every_rank
from aft_ray.training.state.scratch import WAY_OUT, scratch_directory


class CheckpointFailed(RuntimeError):
    """A training state could not be saved in the run directory. The message names the round, and the step inside it."""


class CheckpointWriter:
    """Saves the training state of one rank after each round and inside rounds, one state at a time.

    All ranks create their writers together and call `start` and `wait` together: `start` for each state, `wait` at the
    end. Rank 0 alone decides with `is_due` when a state is saved inside a round.
    """

    def __init__(self, run_dir: RunDir, rank: int, timeout_s: float, coordinator: Any) -> None:
        self._run_dir, self._rank, self._timeout_s, self._coordinator = run_dir, rank, timeout_s, coordinator
        self._group = BackgroundGroup(timeout_s)
        self._scratch = scratch_directory(run_dir, "checkpoint") / str(rank)
        self._what = ""
        self._saving: Future[None] | None = None
        self._last_s = time.monotonic()

    def begin_round(self) -> None:
        """Is called before the first step of a round that this worker takes: the time to the next state starts now."""
        self._last_s = time.monotonic()

    def is_due(self, every_s: float) -> bool:
        """Whether a state should be saved now, inside a round. While another is being saved, it is put off.

        Args:
            every_s: seconds between two states; 0: none is saved inside a round.
        """
        busy = self._saving is not None and not self._saving.done()
        return 0 < every_s <= time.monotonic() - self._last_s and not busy

    def start(self, engine: Any, round_number: int, on_durable: Callable[[int], None], step: int | None = None) -> None:
        """Starts to save a state. Waits for the one before it, then writes this rank's shards to the local disk.

        When it returns, `engine` may train on; the shards are copied to the run directory in another thread.

        Args:
            on_durable: called on rank 0, in that thread, with the bytes of the checkpoint when it is complete.
            step: optimiser steps of the round that have been taken; None: all of them, and the round is published.

        Raises:
            CheckpointFailed: the state before could not be saved.
        """
        self.wait()
        self._last_s = time.monotonic()
        self._what = f"round {round_number}" if step is None else f"step {step} of round {round_number}"
        what, path = self._what, self._run_dir.checkpoint(round_number, step)
        if self._rank == 0:
            self._run_dir.delete(path)
        dist.barrier()
        shutil.rmtree(self._scratch, ignore_errors=True)
        deepspeed.save_checkpoint(engine, self._scratch, {"round": round_number, "step": step})
        saving: Future[None] = Future()
        self._saving = saving
        storage = ray.train.get_context().get_storage()

        def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            try:
                size = self._upload(checkpoint.path, path)
                if self._rank == 0:
                    on_durable(size)
            except RankFailed as error:
                failure = CheckpointFailed(f"the checkpoint of {what} could not be saved: {error}")
                try:
                    call(self._coordinator.fail, str(failure))
                finally:
                    saving.set_exception(failure)
                raise failure from error
            except BaseException as error:
                # When another rank has ended, the workers are started again: that does not end the run.
                saving.set_exception(error)
                raise
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

    def _upload(self, source: str, path: str) -> int:
        """Copies the files of every rank to the run directory, which is complete then; frees the scratch directory.

        Returns:
            The bytes of the files of all ranks.

        Raises:
            RankFailed: it failed on a rank.
            RuntimeError: another rank ended, or did not come in time.
        """
        written = self._group.on_all_ranks(lambda: self._run_dir.add_files(source, path))

        def complete() -> None:
            if self._rank == 0:
                self._run_dir.write_manifest(path, [file for files in written for file in files])

        self._group.on_all_ranks(complete)
        shutil.rmtree(self._scratch)
        with contextlib.suppress(OSError):  # other ranks of the node may still have files there
            self._scratch.parent.rmdir()
        return sum(file.size for files in written for file in files)

    def wait(self) -> None:
        """Waits until nothing is being saved.

        Raises:
            CheckpointFailed: the save failed, or missed its deadline.
            RuntimeError: another rank ended meanwhile.
        """
        if self._saving is None:
            return
        try:
            self._saving.result(self._timeout_s)
        except TimeoutError:
            raise CheckpointFailed(
                f"the checkpoint of {self._what} did not reach {self._run_dir.uri()} in "
                f"training.timeout_s={self._timeout_s:.0f} s"
            ) from None
        self._saving = None


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this is, of how many, and the same among the ranks of its node."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int

    @classmethod
    def here(cls) -> Place:
        """The place of this process."""
        local, of_node = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        return cls(dist.get_rank(), dist.get_world_size(), local, of_node)


@dataclass(frozen=True, slots=True)
class FetchedState:
    """The files of a training state on this machine, for `deepspeed.load_checkpoint`.

    Attributes:
        universal: they were converted for another number of ranks.
    """

    directory: Path
    universal: bool


@contextlib.contextmanager
def fetched_state(run_dir: RunDir, path: str, timeout_s: float) -> Iterator[FetchedState]:
    """Fetches a checkpoint as far as the ranks of this node need it. All ranks call this together.

    Every rank fetches its own files and compares their digests. If another number of ranks saved the checkpoint, the
    ranks share the files among them, and one converts them: in the run directory if every node mounts it, else on each
    node. The directory exists as long as the context lasts.

    Raises:
        DamagedState: on every rank, if a file is missing or damaged.
        LoadingError: on every rank, if a directory has too little room, or the conversion failed.
    """
    place = Place.here()
    files: list[StoredFile] = []
    raise_on_every_rank(lambda: files.extend(run_dir.read_manifest(path)))
    files = [file for file in files if file.name.endswith(".pt")]
    saved_by = deepspeed.checkpoint_world_size([file.name for file in files])
    universal = saved_by not in (None, place.ranks)
    shared = run_dir.staging() if universal else None
    leads = place.rank == 0 if shared else place.local_rank == 0
    directory = scratch_directory(run_dir, "resume")
    # Nodes may share their scratch directory, so its name has the first rank of the node.
    root = Path(shared, directory.name) if shared else Path(f"{directory}-{place.rank - place.local_rank}")
    try:
        raise_on_every_rank(lambda: _prepare(root, run_dir, files, place, universal) if leads else None)
        wanted = files_to_fetch(files, place, universal, shared is not None)
        raise_on_every_rank(lambda: run_dir.fetch_files(path, wanted, root / "saved"))
        if universal:
            raise_on_every_rank(lambda: _convert(root, timeout_s) if leads else None)
        yield FetchedState(root / ("universal" if universal else "saved"), universal)
        dist.barrier()
    finally:
        if leads:
            shutil.rmtree(root, ignore_errors=True)


def files_to_fetch(files: Sequence[StoredFile], place: Place, universal: bool, shared: bool) -> list[StoredFile]:
    """The files of a checkpoint that one rank fetches. Together the ranks of a node fetch what they load, once.

    Args:
        universal: the files are converted for another number of ranks, which reads all of them.
        shared: the ranks of all nodes fetch into one directory.
    """
    if universal:
        return list(files[place.rank :: place.ranks] if shared else files[place.local_rank :: place.local_ranks])
    owners = [deepspeed.rank_of_file(file.name) for file in files]
    # Every rank loads a file that belongs to none, such as the whole weights of ZeRO stages 0 to 2.
    mine = {place.rank, None} if place.local_rank == 0 else {place.rank}
    return [file for file, owner in zip(files, owners, strict=True) if owner in mine]


def _prepare(root: Path, run_dir: RunDir, files: Sequence[StoredFile], place: Place, universal: bool) -> None:
    """Makes the directory that files are fetched to, without what a killed worker left there. Checks its room."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    needed = 0
    if not run_dir.is_local:  # else it gets links
        first = place.rank - place.local_rank
        of_node = range(first, first + place.local_ranks)
        needed += sum(file.size for file in files if universal or deepspeed.rank_of_file(file.name) in {None, *of_node})
    if universal:
        needed += 2 * sum(file.size for file in files)  # slices of parameters, which are then merged
    check_room(root, needed, "the training state that the run continues from", WAY_OUT)


def _convert(root: Path, timeout_s: float) -> None:
    (root / "universal").mkdir()
    deepspeed.convert_to_universal(root / "saved", root / "universal", timeout_s)
