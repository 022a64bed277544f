"""The layout of a run directory: where each file of a run is.

Invariant: no other module spells out a path below a run directory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from aft_ray.storage.directories import DirectoryStore
from aft_ray.storage.driver_lock import driver_lock, lock_holder
from aft_ray.storage.files import MANIFEST as MANIFEST
from aft_ray.storage.files import DamagedFile as DamagedFile
from aft_ray.storage.files import RunDirError as RunDirError
from aft_ray.storage.lease import HeldLock

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LEDGER = "ledger"
ROUNDS = "rounds"
EVALUATIONS = "evaluations"
LOGS = "logs"
TENSORBOARD = "tensorboard"


class RunDir(DirectoryStore):
    """The directory that one run reads and writes, on a local disk or an object store."""

    def round(self, number: int) -> str:
        """The directory of a round."""
        return f"{ROUNDS}/{number:04d}"

    def groups(self, round: int) -> str:
        """The directory of the group files of a round."""
        return f"{self.round(round)}/groups"

    def checkpoint(self, round: int, step: int | None = None) -> str:
        """The directory of the sharded training state after a round, or after so many of its optimiser steps."""
        return f"{self.round(round)}/checkpoint" + ("" if step is None else f"-{step:06d}")

    def checkpoints(self) -> list[str]:
        """The directories of all training states that are there, complete or not."""
        rounds = [f"{ROUNDS}/{name}" for name in self.listdir(ROUNDS) if name.isdigit()]
        return [
            f"{path}/{name}" for path in rounds for name in self.listdir(path) if name.partition("-")[0] == "checkpoint"
        ]

    def model(self, round: int) -> str:
        """The Hugging Face model directory of the version that a round publishes."""
        return f"{self.round(round)}/model"

    def adapter(self, round: int) -> str:
        """The directory of the LoRA adapter that a round publishes."""
        return f"{self.round(round)}/adapter"

    def evaluation(self, name: str) -> str:
        """The JSON file of an evaluation."""
        return f"{EVALUATIONS}/{name}.json"

    def staging(self) -> str | None:
        """Where files are written that are moved into the run directory when they are finished.

        Returns:
            A directory on the same disk where the run directory is mounted, else None: any temporary directory will do.
        """
        if not self.is_local:
            return None
        staging = self.local_path("tmp")
        staging.mkdir(parents=True, exist_ok=True)
        return str(staging)

    def lock(self, say: Callable[[str], None] | None = None) -> AbstractContextManager[HeldLock]:
        """Keeps other drivers out of the run directory while the context is open.

        Args:
            say: Is called with a sentence when the lock has to be waited for.

        Raises:
            RunDirError: Another driver holds the lock; the message names it.
        """
        return driver_lock(self, say)

    def in_use_by(self) -> str | None:
        """The driver that holds the lock, as a text for people; None when there is none."""
        return lock_holder(self)


def local_model(name: str) -> str:
    """The local directory of a model.

    A URI of a run on an object store is downloaded and verified. A local path or a hub name is returned as it is.

    Raises:
        RunDirError: The download failed.
    """
    return str(RunDir(name).fetch_directory("")) if "://" in name else name
