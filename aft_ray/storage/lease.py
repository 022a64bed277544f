"""A lease: keeps drivers apart on an object store, which has no locks.

The holder rewrites the lease file every `RENEWAL_S` seconds.

Invariants: clocks of different machines are never compared: a lease counts as abandoned when it has not changed while
another driver watched it for `MISSED_RENEWALS` renewals. A holder that lost its lease learns it within a few renewals.
An object store cannot refuse a write of a driver that was suspended and resumed, so a lease does not protect against a
driver that was suspended for longer than that. The ledger counts each question once even then.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aft_ray.storage.files import FileStore

LEASE = "lease.json"
# Seconds between two renewals; the renewals after which an unchanged lease counts as abandoned; the seconds that a new
# holder waits for the write of a driver that took the lease at the same moment.
RENEWAL_S, MISSED_RENEWALS, SETTLE_S = 10.0, 3, 1.0


class LeaseTaken(Exception):
    """Another driver holds the lease; the message names it."""


@dataclass(slots=True)
class HeldLock:
    """The lock of a run directory while this process holds it.

    Attributes:
        on_lost: is called with a sentence, in another thread, when the lease is lost. A lock of the operating system
            is never lost.
    """

    on_lost: Callable[[str], None] | None = None


@contextmanager
def renewed_lease(store: FileStore, say: Callable[[str], None] | None = None) -> Iterator[HeldLock]:
    """Takes the lease of a run directory and renews it in a thread until the context is closed.

    A lease that is found is watched first, because a driver that died may have left it.

    Args:
        say: Is called with a sentence before a lease is watched.

    Raises:
        LeaseTaken: Another driver holds the lease.
    """
    token = uuid.uuid4().hex
    if (found := _read(store)) is not None:
        if say is not None:
            say(
                f"{store.uri()} was left in use by {found['who']}: watching for {MISSED_RENEWALS * RENEWAL_S:.0f} s "
                "whether it still works"
            )
        _watch(store, found)
    _write(store, token, 0)
    # A driver that looked at the same moment has written by the end of this wait, and the last one to write holds it.
    time.sleep(SETTLE_S)
    _check_held(store, token)
    held, closed = HeldLock(), threading.Event()
    renewals = threading.Thread(target=_renew, args=(store, token, held, closed), name="lease", daemon=True)
    renewals.start()
    try:
        yield held
    finally:
        closed.set()
        renewals.join()
        if (found := _read(store)) is not None and found["mark"] == token:
            store.delete(LEASE)


def lease_holder(store: FileStore) -> str | None:
    """The driver that renewed the lease recently, as a text for people; None when there is none.

    It compares the clock of this machine with that of the store, so no decision may depend on it.
    """
    found = _read(store)
    if found is None:
        return None
    (info,) = store.filesystem.get_file_info([store.full_path(LEASE)])
    age_s = time.time() - info.mtime.timestamp() if info.mtime is not None else 0.0
    return found["who"] if age_s < (MISSED_RENEWALS + 1) * RENEWAL_S else None


def _watch(store: FileStore, found: dict[str, str]) -> None:
    """Returns when the lease is deleted or stays unchanged for long enough. Raises LeaseTaken when it changes."""
    deadline = time.monotonic() + MISSED_RENEWALS * RENEWAL_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, RENEWAL_S / 4))
        now = _read(store)
        if now is None:
            return
        if now != found:
            raise LeaseTaken(now["who"])


def _check_held(store: FileStore, token: str) -> None:
    found = _read(store)
    if found is None or found["mark"] != token:
        raise LeaseTaken(found["who"] if found else "another process")


def _renew(store: FileStore, token: str, held: HeldLock, closed: threading.Event) -> None:
    """Renews the lease until `closed` is set or the lease is lost."""
    renewal, last = 0, time.monotonic()
    while not closed.wait(RENEWAL_S):
        renewal += 1
        try:
            _check_held(store, token)
            _write(store, token, renewal)
            last = time.monotonic()
        except LeaseTaken as taken:
            lost = f"{taken} has taken {store.uri()} over"
        except (OSError, RuntimeError) as error:  # a RunDirError is a RuntimeError and one sentence
            if time.monotonic() - last < (MISSED_RENEWALS - 1) * RENEWAL_S:
                continue  # another driver would still be watching the lease, so there is time to try again
            lost = f"{error}; meanwhile another driver may have taken it over"
        else:
            continue
        if held.on_lost is not None:
            held.on_lost(f"{lost}; this driver stops, start the same command again to go on")
        return


def _read(store: FileStore) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(store.read_bytes(LEASE))
    except FileNotFoundError:
        return None
    return found


def _write(store: FileStore, token: str, renewal: int) -> None:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    store.write_json(LEASE, {"mark": token, "beat": str(renewal), "who": who})
