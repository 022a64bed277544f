"""A child process with a deadline, which leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress

# Seconds in which a process that was told to end may end its own children.
_GRACE_S = 30.0


def run_to_end(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process group of its own and returns its status and output.

    When it has ended, or not in time, or this process is interrupted, the whole process group is ended.

    Raises:
        TimeoutExpired: it did not end within `timeout_s`.
    """
    # Files and not pipes: a pipe stays open as long as any child of the process, such as an engine's core.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            process.wait(timeout_s)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), errors.read())
