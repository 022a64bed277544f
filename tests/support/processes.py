"""What tests need to know of ports, servers and processes."""

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
    request_queue_size = 128  # with the default of 5 a busy machine drops connections


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in threads of this process, until the end. Yields its URL, without a slash at its end."""
    with _Server(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def wait_for(condition: Callable[[], bool], seconds: float, what: str, process: subprocess.Popen, log: Path) -> None:
    """Waits for what a process is to do. Fails with the end of its log when it ends first, or not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        said = log.read_text()[-3000:]
        assert process.poll() is None, f"it ended before {what}: {said}"
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {said}"
        time.sleep(0.05)


def carriers(mark: str) -> list[int]:
    """The live processes that inherited a mark in their environment."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def descendants(name: str) -> list[int]:
    """The live processes of this process's own Ray that carry a name, as Ray and vLLM give them one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if name in process.name() or name in "".join(process.cmdline()):
                found.append(process.pid)
    return found
