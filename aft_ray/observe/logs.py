"""Log files of a run's processes, and keeping the output of other libraries away from the terminal.

Invariant: what vLLM, DeepSpeed, Ray and other libraries print goes to a log file. The terminal shows only this
package's own lines.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from aft_ray.storage.run_dir import LOGS, RunDir, RunDirError


def redirect_output(log_file: str | Path) -> None:
    """Sends stdout and stderr of this process to a file until the process ends.

    The file descriptors themselves are replaced, so output of native code and of child processes is included.
    """
    _flush()
    descriptor = _open_log(Path(log_file))
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextlib.contextmanager
def library_output_to(log_file: Path) -> Iterator[Console]:
    """Sends stdout and stderr of this process to a file; yields a console that still writes to the real stdout."""
    _flush()
    saved = os.dup(1), os.dup(2)
    log = _open_log(log_file)
    try:
        with os.fdopen(os.dup(saved[0]), "w", buffering=1) as terminal:
            os.dup2(log, 1)
            os.dup2(log, 2)
            yield Console(file=terminal, highlight=False, soft_wrap=True)
    finally:
        _flush()
        for target, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.close(log)


def driver_log_path(run_dir: RunDir | None) -> Path:
    """The log file of this process: in the run directory if that is on a mounted filesystem, else a temporary file."""
    if run_dir is not None and run_dir.is_local:
        return run_dir.local_path(f"{LOGS}/driver.log")
    return Path(tempfile.gettempdir()) / f"aft-ray-{os.getpid()}.log"


@contextlib.contextmanager
def upload_log_at_exit(run_dir: RunDir, log: Path) -> Iterator[None]:
    """Uploads the driver's log on leaving, if the run directory is on an object store.

    A failed upload is ignored, so that it cannot hide the error that ended the run; the temporary file then stays.
    """
    try:
        yield
    finally:
        if not run_dir.is_local and log.exists():
            with contextlib.suppress(OSError, RunDirError):
                run_dir.write_bytes(f"{LOGS}/driver-{int(log.stat().st_ctime)}.log", log.read_bytes())
                log.unlink()


def _open_log(log_file: Path) -> int:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
