"""Lets one driver at a time work on a run directory.

Invariant: on a mounted filesystem the lock is one of the operating system, which releases it when the process dies. On
an object store, which has no locks, it is a lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator

from aft_ray.storage.files import FileStore, RunDirError, explain_errors
from aft_ray.storage.lease import HeldLock, LeaseTaken, lease_holder, renewed_lease

LOCK = ".lock"


@contextlib.contextmanager
def driver_lock(store: FileStore, say: Callable[[str], None] | None = None) -> Iterator[HeldLock]:
    """Holds the lock of a run directory.

    Args:
        say: Is called with a sentence when the lease of another driver has to be watched first.

    Raises:
        RunDirError: Another driver holds the lock; the message names it.
    """
    if not store.is_local:
        try:
            with renewed_lease(store, say) as held:
                yield held
        except LeaseTaken as taken:
            raise _in_use(store, str(taken)) from None
        return
    target = store.local_path(LOCK)
    with explain_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(store, file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield HeldLock()


def _in_use(store: FileStore, by: str) -> RunDirError:
    return RunDirError(f"{store.uri()} is in use by {by}; wait until it ends, or stop it, or choose another run_dir")


def lock_holder(store: FileStore) -> str | None:
    """The driver that holds the lock, as a text for people; None when there is none."""
    if not store.is_local:
        return lease_holder(store)
    try:
        with driver_lock(store):
            return None
    except RunDirError as busy:
        return str(busy).partition(" is in use by ")[2].partition(";")[0]
