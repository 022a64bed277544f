"""The checks of `aft-ray doctor`: pure functions from facts to findings, one per check.

Invariant: every check of nodes reports every node that answered, so a missing finding is never taken for a good one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from aft_ray.operations import network
from aft_ray.operations.findings import CLUSTER, ClusterFacts, Finding, Level, NodeFacts

GIB = 1 << 30
# Limits of the clock difference in seconds. Above the first, log lines of a run are out of order. S3 refuses requests
# from clocks that are wrong by 15 minutes.
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 60.0
# Limits of open files per process. Ray recommends 65536; a head with a few hundred workers needs more than 1024.
FILES_WARN, FILES_FAIL = 8192, 1024
SHM_GPU = 8 * GIB
DISK_WARN, DISK_FAIL = 20 * GIB, 1 * GIB
# MiB that may be in use on a GPU that Ray has not assigned.
USED_MIB = 1024
# By the major version of CUDA: the oldest branch of NVIDIA's driver that runs programs built for it.
DRIVERS = {11: 450, 12: 525, 13: 580}


def check_all(facts: ClusterFacts) -> list[Finding]:
    """All findings, including good ones, in the order of the checks."""
    findings = [
        Finding(
            "answers",
            node,
            "fail",
            why,
            "Read Ray's logs of that node (`ray logs`), or remove the node from the cluster.",
        )
        for node, why in facts.silent.items()
    ]
    findings += [Finding("answers", node.name, "ok", node.host) for node in facts.nodes]
    checks: list[Callable[[ClusterFacts], Iterable[Finding]]] = [
        versions, gpus, operators, clocks, storage, models, shared_memory, disks, open_files, ports, network.rdma,
        network.all_reduces, upload,
    ]  # fmt: skip
    for check in checks:
        findings += check(facts)
    return findings


def versions(facts: ClusterFacts) -> Iterator[Finding]:
    cure = "Install the same versions on every node: use one image from jobs/kuberay/Dockerfile, or run `make install`."
    for node in facts.nodes:
        wrong = []
        for name, here in facts.here.items():
            there = node.versions.get(name)
            # A node without GPUs runs no engine and no trainer, so it may lack vLLM and DeepSpeed.
            if there == here or (there is None and name in {"vllm", "deepspeed"} and not node.gpus_announced):
                continue
            wrong.append(f"{name} {there or 'missing'}, here {here or 'missing'}")
        if wrong:
            yield Finding("versions", node.name, "fail", "; ".join(wrong), cure)
        else:
            yield Finding("versions", node.name, "ok", f"ray {node.versions.get('ray')}")


def gpus(facts: ClusterFacts) -> Iterator[Finding]:
    drivers = sorted({gpu.driver for node in facts.nodes for gpu in node.gpus})
    for node in facts.nodes:
        found = list(_gpus_of(node))
        if len(drivers) > 1 and node.gpus:
            message = (
                f"driver {node.gpus[0].driver}, other nodes have {', '.join(set(drivers) - {node.gpus[0].driver})}"
            )
            found.append(
                Finding(
                    "gpus",
                    node.name,
                    "warn",
                    message,
                    "Install the same driver version on all nodes; NCCL is not tested across versions.",
                )
            )
        kinds = sorted({gpu.name for gpu in node.gpus})
        yield from found or [Finding("gpus", node.name, "ok", f"{len(node.gpus)} {' and '.join(kinds)}".strip())]


def _gpus_of(node: NodeFacts) -> Iterator[Finding]:
    def finding(level: Level, message: str, cure: str) -> Finding:
        return Finding("gpus", node.name, level, message, cure)

    seen, announced = len(node.gpus), node.gpus_announced
    if announced > seen:
        yield finding(
            "fail",
            f"Ray announces {announced:g} and nvidia-smi sees {seen}",
            "Start Ray there without --num-gpus, repair the driver, or give the container access to its GPUs.",
        )
    elif announced < seen:
        yield finding(
            "warn",
            f"Ray announces {announced:g} of {seen}",
            f"Start Ray there with --num-gpus={seen}, unless the others must stay unused.",
        )
    if seen and node.torch_gpus != seen:
        yield old_driver(node) or finding(
            "fail",
            f"nvidia-smi sees {seen} and torch {'failed' if node.torch_gpus is None else f'sees {node.torch_gpus}'}",
            "Install the CUDA build of torch (extra `gpu`) and a driver that supports it.",
        )
    for index, gpu in enumerate(node.gpus):
        if gpu.ecc:
            yield finding(
                "fail",
                f"GPU {index} has {gpu.ecc} uncorrected memory errors",
                "Move all work off the node, then reset the GPU.",
            )
        if gpu.used_mib > USED_MIB and node.gpus_free == announced:
            yield finding(
                "warn",
                f"GPU {index} has {gpu.used_mib} MiB in use by processes that Ray did not start",
                "Run `nvidia-smi` there and end the process that it lists.",
            )


def old_driver(node: NodeFacts) -> Finding | None:
    """The finding for a driver that is older than the CUDA version of torch needs; None if it is new enough.

    It is asked for only where torch fails: NVIDIA's compatibility packages let some older drivers work.
    """
    needed = DRIVERS.get(int((node.torch_cuda or "0").partition(".")[0]))
    branch = re.match(r"\d+", node.gpus[0].driver)
    if needed is None or branch is None or int(branch.group()) >= needed:
        return None
    return Finding(
        "gpus",
        node.name,
        "fail",
        f"driver {node.gpus[0].driver} is too old for torch {node.versions.get('torch')}, which is built for CUDA "
        f"{node.torch_cuda}",
        f"Install driver R{needed} or newer on the machine; no change of the container helps.",
    )


def operators(facts: ClusterFacts) -> Iterator[Finding]:
    """Whether GPU nodes can compile the operators of DeepSpeed that the config needs."""
    for node in facts.nodes:
        for name, error in node.operators.items():
            if error is None:
                yield Finding("operators", node.name, "ok", f"{name} compiles")
                continue
            cure = (
                "Install g++ and ninja there, or delete a lock file that an interrupted compilation has left in "
                "~/.cache/torch_extensions."
            )
            if "CUDA" in error or "nvcc" in error:
                cure = f"Install the CUDA toolkit (nvcc) {node.torch_cuda}, the version that torch was built for."
            yield Finding("operators", node.name, "fail", f"{name} does not compile: {error}", cure)


def clocks(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.clock_s is None:
            yield Finding("clock", node.name, "warn", "could not be read in time", "Run `aft-ray doctor` again.")
            continue
        certain = max(0.0, abs(node.clock_s) - node.clock_error_s)
        message = f"{node.clock_s:+.2f} s, ±{node.clock_error_s:.2f} s"
        if certain < CLOCK_WARN_S:
            yield Finding("clock", node.name, "ok", message)
            continue
        level: Level = "fail" if certain >= CLOCK_FAIL_S else "warn"
        yield Finding("clock", node.name, level, message, "Run a time service such as chrony on that node.")


def storage(facts: ClusterFacts) -> Iterator[Finding]:
    if facts.storage is None:
        return
    where = facts.storage.storage
    for node in facts.nodes:
        if error := facts.storage.written.get(node.name):
            yield Finding(
                "storage", node.name, "fail", f"cannot write {where}: {error}",
                "Mount it there with write access, or give the node credentials for it.",
            )  # fmt: skip
        elif unseen := facts.storage.unseen.get(node.name):
            yield Finding(
                "storage", node.name, "fail", f"cannot read in {where} what {', '.join(unseen)} wrote",
                "Mount the same storage at that path on every node, or use an object store (s3://, gs://).",
            )  # fmt: skip
        else:
            yield Finding("storage", node.name, "ok", f"{where} is writable and shared")


def models(facts: ClusterFacts) -> Iterator[Finding]:
    for path in {path: None for node in facts.nodes for path in node.models}:
        sizes = {node.name: node.models.get(path) for node in facts.nodes}
        usual_size = max((size for size in sizes.values() if size), key=list(sizes.values()).count, default=None)
        for name, size in sizes.items():
            if size is None:
                yield Finding(
                    "model", name, "fail", f"{path} is no model directory with safetensors there",
                    "Put the model on storage that every node mounts, or copy it to the same path on every node.",
                )  # fmt: skip
            elif size != usual_size:
                yield Finding(
                    "model", name, "fail", f"{path} has {size} bytes of weights there, elsewhere {usual_size}",
                    "Copy the whole model again from the same source.",
                )  # fmt: skip
            else:
                yield Finding("model", name, "ok", f"{size / GIB:.2f} GiB")


def shared_memory(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.shm_bytes is None:
            yield Finding("shm", node.name, "warn", "there is no /dev/shm", "Mount a tmpfs at /dev/shm.")
        elif node.shm_bytes < node.object_store_bytes:
            yield Finding(
                "shm", node.name, "fail",
                f"/dev/shm has {node.shm_bytes / GIB:.1f} GiB, Ray's object store {node.object_store_bytes / GIB:.1f}",
                "Enlarge it: with --shm-size for docker, with an emptyDir of medium Memory in Kubernetes.",
            )  # fmt: skip
        elif node.gpus_announced and node.shm_bytes < SHM_GPU:
            yield Finding(
                "shm", node.name, "warn", f"/dev/shm has {node.shm_bytes / GIB:.1f} GiB",
                "Give a GPU node at least 8 GiB: NCCL and the processes of vLLM exchange data through it.",
            )  # fmt: skip
        else:
            yield Finding("shm", node.name, "ok", f"{node.shm_bytes / GIB:.0f} GiB")


def disks(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        found = []
        for path, free in node.free_bytes.items():
            message = f"{free / GIB:.1f} GiB free for {path}"
            if free < DISK_FAIL:
                found.append(Finding("disk", node.name, "fail", message, "Free some space on that disk."))
            elif (
                facts.storage_needed and facts.storage and path == facts.storage.storage and free < facts.storage_needed
            ):
                found.append(
                    Finding(
                        "disk",
                        node.name,
                        "warn",
                        f"{message}, and the run wants {facts.storage_needed / GIB:.0f}",
                        "Free some space, or lower rounds.count or training.keep_checkpoints.",
                    )
                )
            elif free < DISK_WARN:
                found.append(
                    Finding(
                        "disk",
                        node.name,
                        "warn",
                        message,
                        "Free some space: Ray writes logs and spilled objects to local disks.",
                    )
                )
        lowest = min(node.free_bytes.values(), default=0)
        yield from found or [Finding("disk", node.name, "ok", f"{lowest / GIB:.0f} GiB free")]


def open_files(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.open_files >= FILES_WARN:
            yield Finding("open files", node.name, "ok", str(node.open_files))
            continue
        level: Level = "fail" if node.open_files < FILES_FAIL else "warn"
        cure = "Run `ulimit -n 65536` before `ray start`, or raise the limit of the container."
        yield Finding("open files", node.name, level, f"at most {node.open_files} per process", cure)


def ports(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        blocked = [f"{to} ({why})" for (at, to), why in facts.blocked.items() if at == node.name]
        if blocked:
            yield Finding(
                "ports", node.name, "fail", f"cannot connect to {', '.join(blocked)}",
                "Allow all TCP ports between the nodes: Ray's workers, gloo and NCCL choose free ports.",
            )  # fmt: skip
        elif len(facts.nodes) > 1:
            yield Finding("ports", node.name, "ok", f"connects to {len(facts.nodes) - 1} other nodes")


def upload(facts: ClusterFacts) -> Iterator[Finding]:
    if facts.upload is None:
        return
    size, limit = facts.upload.bytes, facts.upload_limit
    message = f"{facts.upload.directory} is {size / (1 << 20):.1f} MiB in {facts.upload.files} files"
    if size <= limit // 2:
        yield Finding("upload", CLUSTER, "ok", message)
        return
    largest = ", ".join(f"{name} ({bytes / (1 << 20):.1f} MiB)" for name, bytes in facts.upload.largest)
    cure = f"Exclude files that jobs do not need, in .rayignore or .gitignore; the largest are {largest}."
    message += f"; Ray accepts at most {limit >> 20} MiB compressed"
    yield Finding("upload", CLUSTER, "fail" if size > limit else "warn", message, cure)
