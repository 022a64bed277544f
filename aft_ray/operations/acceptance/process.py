"""A child process with a deadline, which leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

# Seconds in which a process that was told to end may end its own children.
_GRACE_S = 30.0


def run_to_end(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process group of its own and returns its status and output.

    If it does not end in time, or this process is interrupted, the whole process group is ended.

    Raises:
        TimeoutExpired: it did not end within `timeout_s`.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except BaseException:
        _end_group(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
