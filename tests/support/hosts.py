"""Several hosts on one machine. Each is a network namespace with its own hostname, address and /tmp/ray.

The hosts communicate over a virtual network. They need root and iproute2; `hosts_missing` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOSTS_FILES = Path("/etc/netns")  # `ip netns exec NAME` shows the files below NAME in /etc.


@dataclass(frozen=True)
class Host:
    """A host: its namespace, its hostname, its address, and the directory that only it sees as /tmp/ray."""

    namespace: str
    name: str
    address: str
    ray_directory: str

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs a command on this host."""
        script = f'hostname {self.name} && mount --bind {self.ray_directory} /tmp/ray && exec "$@"'
        shell = ["sh", "-c", script, "sh", *arguments]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", *shell]


def hosts_missing() -> str | None:
    """Why this machine cannot have such hosts; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not all(map(shutil.which, ("ip", "unshare"))):
        return "there is no iproute2 or no unshare"
    name = f"probe-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts on their own network, 10.77.0.0/24. The caller must end the processes that it starts on them."""
    mark = uuid.uuid4().hex[:6]
    bridge = f"br-{mark}"
    Path("/tmp/ray").mkdir(exist_ok=True)
    made: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
            made.append(Host(f"h{number}-{mark}", f"host{number}", f"10.77.0.{number}", directory))
        addresses = "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            files = HOSTS_FILES / host.namespace
            files.mkdir(parents=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
            outside = f"v{host.namespace}"[:15]
            _ip("netns", "add", host.namespace)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", outside, "master", bridge, "up")
            for arguments in (
                ("link", "set", "lo", "up"),
                ("addr", "add", f"{host.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                # Ray finds its own address by the default route.
                ("route", "add", "default", "dev", "eth0"),
            ):
                _ip("-netns", host.namespace, *arguments)
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)
            shutil.rmtree(HOSTS_FILES / host.namespace, ignore_errors=True)
            shutil.rmtree(host.ray_directory, ignore_errors=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
