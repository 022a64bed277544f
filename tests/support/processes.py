"""Helpers for tests that use ports, servers and processes."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # With the default of 5, a busy machine drops connections.


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in threads of this process. Yields its URL, which has no slash at its end."""
    with _Server(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def wait_for(condition: Callable[[], bool], seconds: float, what: str, process: subprocess.Popen, log: Path) -> None:
    """Waits for a condition. Fails with the end of the log when the process ends first or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        end_of_log = log.read_text()[-3000:]
        assert process.poll() is None, f"it ended before {what}: {end_of_log}"
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {end_of_log}"
        time.sleep(0.05)


def marked_processes(mark: str) -> list[int]:
    """The pids of the live processes that have a mark in their environment."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def descendants(name: str) -> list[int]:
    """The pids of this process's live descendants that have `name` in their name or command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # The process has ended.
            if name in process.name() or name in "".join(process.cmdline()):
                found.append(process.pid)
    return found
