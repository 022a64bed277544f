"""Process groups of train workers: their timeout, and work that all ranks do together in the background.

DeepSpeed, and other libraries, make groups without a timeout, which then have torch's default of 10 minutes (NCCL) or
30. Ranks that run ahead of rank 0, which may stream weights for longer, would fail in such a group. Invariants: no
group of a run has less than `training.timeout_s`; when work fails on one rank, no other waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from aft_ray.config.messages import first_line
from aft_ray.storage.run_dir import DamagedFile, RunDirError
from aft_ray.training.model.loading import LoadingError

T = TypeVar("T")


class RankFailed(RuntimeError):
    """What several ranks did together failed on one of them. The message is the first line of that rank's error."""


class DamagedState(LoadingError):
    """A training state has a file that is missing or damaged. The message names the file."""


def set_default_timeout(timeout_s: float) -> None:
    """Gives every process group that this process makes from now on without a timeout this one, in seconds.

    A group that names its own timeout keeps it.
    """
    timeout = timedelta(seconds=timeout_s)
    # `new_group` reads these two module variables, also when it is called by `init_device_mesh` or under another name.
    # torch offers no function for it; a test compares the timeouts of groups with this one.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if not hasattr(distributed_c10d, name):
            raise RuntimeError(f"this version of torch has no {name}, by which groups get training.timeout_s")
        setattr(distributed_c10d, name, timeout)


class BackgroundGroup:
    """A process group for a thread, because training uses the default one in the meantime.

    All ranks create theirs together, and call its method together.
    """

    def __init__(self, timeout_s: float) -> None:
        """
        Args:
            timeout_s: how long the ranks wait for each other, seconds.
        """
        self._timeout = timedelta(seconds=timeout_s)
        self._process_group = dist.new_group(backend="gloo", timeout=self._timeout)

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Calls `work` on every rank; returns what it returned on each.

        Raises:
            RankFailed: on every rank, if `work` raised an exception on any.
            RuntimeError: another rank ended, or did not come in time. The message names it.
        """
        outcome: tuple[T | None, str | None]
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, first_line(error)
        dist.monitored_barrier(self._process_group, timeout=self._timeout)
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._process_group)
        if (reason := next((reason for _, reason in outcomes if reason is not None), None)) is not None:
            raise RankFailed(reason)
        return [result for result, _ in outcomes]


def raise_on_every_rank(work: Callable[[], Any]) -> None:
    """Calls `work` on every rank. An error of one rank is raised on all, so that no rank waits for another.

    Raises:
        DamagedState: all ranks that failed raised DamagedFile; the message is that of the first one.
        LoadingError: a rank raised LoadingError or another RunDirError; the message is that of the first one.
    """
    failure: tuple[bool, str] | None = None
    try:
        work()
    except (LoadingError, RunDirError) as error:
        failure = isinstance(error, DamagedFile), str(error)
    gathered: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, failure)
    failures = sorted(filter(None, gathered), key=lambda one: one[0])  # damage comes last
    for damaged, message in failures[:1]:
        raise DamagedState(message) if damaged else LoadingError(message)
