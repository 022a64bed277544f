"""One driver at a time where the operating system has no locks: a lease, kept alive by writing it again and again.

Invariants: no clock is compared with another machine's: a lease is given up when it has not changed while somebody
watched it for `PATIENCE` beats. A holder whose lease is gone learns it within a few beats. Object stores cannot refuse
a write of a driver that came back from the dead, so this keeps two drivers apart, but is no proof against one that was
frozen for longer than that; the ledger still counts each question once then.
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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aft_ray.storage.run_dir import RunDir

LEASE = "lease.json"
# Seconds between two writes of a lease; how many of them a watcher waits; what a new holder waits for a rival's write.
BEAT_S, PATIENCE, SETTLE_S = 10.0, 3, 1.0


class LeaseTaken(Exception):
    """Somebody else holds the lease; the message names it."""


@dataclass(slots=True)
class Hold:
    """A run directory that is ours. `on_lost` is called, in another thread, should it stop being so."""

    on_lost: Callable[[str], None] | None = field(default=None)


@contextmanager
def lease(run_dir: RunDir, say: Callable[[str], None] | None = None) -> Iterator[Hold]:
    """Holds the lease of a run directory. Raises LeaseTaken, after watching one that a dead driver may have left."""
    mark = uuid.uuid4().hex
    if (found := _read(run_dir)) is not None:
        if say is not None:
            say(
                f"{run_dir.uri()} was left in use by {found['who']}: watching for {PATIENCE * BEAT_S:.0f} s whether it "
                "still works"
            )
        _watch(run_dir, found)
    _write(run_dir, mark, 0)
    time.sleep(SETTLE_S)  # a driver that looked at the same moment has written by now, and the last to write holds it
    _check(run_dir, mark)
    hold, ended = Hold(), threading.Event()
    beats = threading.Thread(target=_beat, args=(run_dir, mark, hold, ended), name="lease", daemon=True)
    beats.start()
    try:
        yield hold
    finally:
        ended.set()
        beats.join()
        if (found := _read(run_dir)) is not None and found["mark"] == mark:
            run_dir.delete(LEASE)


def holder(run_dir: RunDir) -> str | None:
    """Who renewed the lease of late, by this machine's clock and the store's: for people to read, not to rely on."""
    found = _read(run_dir)
    if found is None:
        return None
    (info,) = run_dir.filesystem.get_file_info([run_dir.full_path(LEASE)])
    age_s = time.time() - info.mtime.timestamp() if info.mtime is not None else 0.0
    return found["who"] if age_s < (PATIENCE + 1) * BEAT_S else None


def _watch(run_dir: RunDir, found: dict[str, str]) -> None:
    deadline = time.monotonic() + PATIENCE * BEAT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_S / 4))
        now = _read(run_dir)
        if now is None:
            return
        if now != found:
            raise LeaseTaken(now["who"])


def _check(run_dir: RunDir, mark: str) -> None:
    found = _read(run_dir)
    if found is None or found["mark"] != mark:
        raise LeaseTaken(found["who"] if found else "another process")


def _beat(run_dir: RunDir, mark: str, hold: Hold, ended: threading.Event) -> None:
    beat, last = 0, time.monotonic()
    while not ended.wait(BEAT_S):
        beat += 1
        try:
            _check(run_dir, mark)
            _write(run_dir, mark, beat)
            last = time.monotonic()
        except LeaseTaken as taken:
            lost = f"{taken} has taken {run_dir.uri()} over"
        except (OSError, RuntimeError) as error:  # a RunDirError, which says it in a sentence
            if time.monotonic() - last < (PATIENCE - 1) * BEAT_S:
                continue  # others still wait: try again
            lost = f"{error}; meanwhile another driver may have taken it over"
        else:
            continue
        if hold.on_lost is not None:
            hold.on_lost(f"{lost}; this driver stops, start the same command again to go on")
        return


def _read(run_dir: RunDir) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(run_dir.read_bytes(LEASE))
    except FileNotFoundError:
        return None
    return found


def _write(run_dir: RunDir, mark: str, beat: int) -> None:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    run_dir.write_json(LEASE, {"mark": mark, "beat": str(beat), "who": who})
