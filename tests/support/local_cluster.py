"""A Ray cluster of several nodes on this machine: separate `ray start` processes, each in its own environment."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from processes import free_ports, marked_processes, wait_for

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_S = 400
# `ray start --block` writes this when the node is up.
_UP = "--block"


@dataclass
class LocalCluster:
    """A running cluster.

    Attributes:
        gcs: The address of the head's GCS.
        dashboard: The address of the head's dashboard.
        environment: The environment variables for processes that use the cluster.
        mark: The name of a variable in the environment of every process of the cluster.
    """

    gcs: str
    dashboard: str
    environment: dict[str, str]
    temporary: str
    mark: str
    head: subprocess.Popen
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def add_node(self, *prefix: str, **environment: str) -> subprocess.Popen:
        """Starts a worker node with the command `prefix` before its own command, and with additional variables."""
        agent, metrics, runtime, grpc = free_ports(4)
        start = [
            "start", "--block", f"--address={self.gcs}", "--node-ip-address=127.0.0.1", "--num-cpus=1",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
            f"--runtime-env-agent-port={runtime}", f"--dashboard-agent-grpc-port={grpc}",
            f"--object-store-memory={80 << 20}", "--disable-usage-stats",
        ]  # fmt: skip
        log = Path(self.temporary, f"node-{len(self.nodes)}.log")
        with open(log, "w") as output:
            node = subprocess.Popen(
                [*prefix, *RAY, *start],
                env=self.environment | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.nodes.append(node)
        wait_for(lambda: _UP in log.read_text(), START_S, "the node", node, log)
        return node


@contextlib.contextmanager
def local_cluster(num_cpus: int) -> Iterator[LocalCluster]:
    """Starts a head node with `num_cpus` CPUs. At the end, all processes and files of the cluster are removed."""
    mark = f"AFT_RAY_TEST_{uuid.uuid4().hex}"
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Socket paths must be short.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    environment |= {
        mark: "1",
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    gcs, dashboard, agent, client, metrics, runtime, grpc = free_ports(7)
    start = [
        "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}", "--node-ip-address=127.0.0.1",
        f"--dashboard-agent-grpc-port={grpc}", f"--num-cpus={num_cpus}", f"--object-store-memory={256 << 20}",
        "--disable-usage-stats", f"--temp-dir={temporary}",
    ]  # fmt: skip
    log = Path(temporary, "start.log")
    with open(log, "w") as output:
        head = subprocess.Popen(RAY + start, env=environment, stdout=output, stderr=output, start_new_session=True)
    cluster = LocalCluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment, temporary, mark, head)
    try:
        wait_for(lambda: _UP in log.read_text(), START_S, "the head", head, log)
        yield cluster
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            for process in marked_processes(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, stop)
            time.sleep(2)
        for one in (head, *cluster.nodes):
            one.wait(30)
        assert marked_processes(mark) == []
        shutil.rmtree(temporary, ignore_errors=True)
