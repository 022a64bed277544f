"""Runs in driver processes of their own, which tests kill."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from processes import wait_for

# Agents of Ray, which hold no state of a run. They end a minute after the other processes, because they try to report
# their end to the head, which is dead.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
PATIENCE_S = 400


def log_of(run_dir: Path) -> Path:
    return run_dir.parent / f"{run_dir.name}.log"


def begin(file: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "aft_ray.cli", "train", str(file), f"run_dir={run_dir}", *overrides]
    with log_of(run_dir).open("a") as log:
        # It has its own session, so that processes that outlive it can be found.
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, run_dir: Path) -> None:
    assert process.wait(timeout=600) == 0, log_of(run_dir).read_text()[-3000:]


def reach(condition, what: str, process: subprocess.Popen, run_dir: Path) -> None:
    """Waits until a run is so far."""
    wait_for(condition, PATIENCE_S, what, process, log_of(run_dir))


def kill(process: subprocess.Popen) -> None:
    """Kills a driver, and waits until the Ray that it started has ended."""
    process.kill()
    process.wait()
    assert_nothing_is_left(process.pid, but=AGENTS)


def kill_with_its_ray(process: subprocess.Popen) -> None:
    """Kills a driver and all processes of the Ray that it started at once, as the loss of a machine does."""
    for pid in members(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert_nothing_is_left(process.pid)


def kill_a_worker(process: subprocess.Popen) -> None:
    """Kills one train worker of a driver."""
    workers = [pid for pid, line in members(process.pid).items() if "RayTrainWorker" in line]
    os.kill(workers[-1], signal.SIGKILL)


def assert_nothing_is_left(session: int, but: tuple[str, ...] = ()) -> None:
    """Ray's processes notice that their driver died and end by themselves."""
    deadline = time.monotonic() + 120
    while left := [line for line in members(session).values() if not line.startswith(but)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def members(session: int) -> dict[int, str]:
    """The pids and command lines of a session's live processes, whoever their parent is now."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(status[3]) == session and status[0] != "Z":
                found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")[:100]
        except (OSError, ValueError):
            continue
    return found
