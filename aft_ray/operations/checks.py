"""From what was seen on a cluster to what is wrong with it: pure functions, one a check.

Invariant: every check says something of every node that answered, so that silence is never taken for health.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from aft_ray.operations.findings import CLUSTER, ClusterFacts, Finding, NodeFacts, PingFacts

GIB = 1 << 30
# Seconds that clocks may differ: past the first, logs of a run are out of order; past the second, S3 refuses requests.
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 60.0
# Ray's own advice is 65536; a head with some hundred workers runs out of a thousand.
FILES_WARN, FILES_FAIL = 8192, 1024
SHM_GPU = 8 * GIB
DISK_WARN, DISK_FAIL = 20 * GIB, 1 * GIB
SLOW_BYTES_S = 100e6
# Memory in use on a GPU that Ray has given to nobody.
USED_MIB = 1024


def judge(facts: ClusterFacts) -> list[Finding]:
    """All findings, the good ones too, in the order of the checks."""
    findings = [
        Finding("answers", node, "fail", why, "See Ray's log of that node (ray logs), or remove it from the cluster.")
        for node, why in facts.silent.items()
    ]
    findings += [Finding("answers", node.name, "ok", node.host) for node in facts.nodes]
    checks: list[Callable[[ClusterFacts], Iterable[Finding]]] = [
        versions, gpus, clocks, storage, models, shared_memory, disks, open_files, ports, collectives, upload,
    ]  # fmt: skip
    for check in checks:
        findings += check(facts)
    return findings


def versions(facts: ClusterFacts) -> Iterator[Finding]:
    cure = (
        "Install the same versions on every node: build one image from jobs/kuberay/Dockerfile, or run `make install`."
    )
    for node in facts.nodes:
        wrong = []
        for name, here in facts.here.items():
            there = node.versions.get(name)
            # A head without GPUs may do without an engine, and an engine has another build there.
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
            message = f"driver {node.gpus[0].driver}, others have {', '.join(set(drivers) - {node.gpus[0].driver})}"
            found.append(
                Finding(
                    "gpus", node.name, "warn", message, "Install one driver version; NCCL is not tested across two."
                )
            )
        kinds = sorted({gpu.name for gpu in node.gpus})
        yield from found or [Finding("gpus", node.name, "ok", f"{len(node.gpus)} {' and '.join(kinds)}".strip())]


def _gpus_of(node: NodeFacts) -> Iterator[Finding]:
    def finding(level: str, message: str, cure: str) -> Finding:
        return Finding("gpus", node.name, "fail" if level == "fail" else "warn", message, cure)

    seen, announced = len(node.gpus), node.gpus_announced
    if announced > seen:
        yield finding(
            "fail",
            f"Ray announces {announced:g} and nvidia-smi sees {seen}",
            "Start Ray there without --num-gpus, mend the driver, or give the container its GPUs.",
        )
    elif announced < seen:
        yield finding(
            "warn", f"Ray announces {announced:g} of {seen}", "Start Ray there with --num-gpus, or leave them unused."
        )
    if seen and node.torch_gpus != seen:
        yield finding(
            "fail",
            f"nvidia-smi sees {seen} and torch {'failed' if node.torch_gpus is None else f'sees {node.torch_gpus}'}",
            "Install the CUDA build of torch (extra `gpu`) and a driver that it knows.",
        )
    for index, gpu in enumerate(node.gpus):
        if gpu.ecc:
            yield finding(
                "fail", f"GPU {index} has {gpu.ecc} uncorrected memory errors", "Drain the node and reset it."
            )
        if gpu.used_mib > USED_MIB and node.gpus_free == announced:
            yield finding(
                "warn",
                f"GPU {index} has {gpu.used_mib} MiB in use by no work of Ray's",
                "End the process that `nvidia-smi` names there.",
            )


def clocks(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.clock_s is None:
            yield Finding("clock", node.name, "warn", "could not be read in time", "Run the doctor again.")
            continue
        certain = max(0.0, abs(node.clock_s) - node.clock_error_s)
        message = f"{node.clock_s:+.2f} s, ±{node.clock_error_s:.2f}"
        if certain < CLOCK_WARN_S:
            yield Finding("clock", node.name, "ok", message)
            continue
        level = "fail" if certain >= CLOCK_FAIL_S else "warn"
        yield Finding("clock", node.name, level, message, "Run a time service such as chrony there.")  # type: ignore[arg-type]


def storage(facts: ClusterFacts) -> Iterator[Finding]:
    if facts.storage is None:
        return
    where = facts.storage.storage
    for node in facts.nodes:
        if error := facts.storage.written.get(node.name):
            yield Finding(
                "storage", node.name, "fail", f"cannot write {where}: {error}",
                "Mount it there for writing, or give the node credentials for it.",
            )  # fmt: skip
        elif unseen := facts.storage.unseen.get(node.name):
            yield Finding(
                "storage", node.name, "fail", f"does not see in {where} what {', '.join(unseen)} wrote",
                "Mount the same storage at that path on every node, or use an object store (s3://, gs://).",
            )  # fmt: skip
        else:
            yield Finding("storage", node.name, "ok", f"{where} is written and seen")


def models(facts: ClusterFacts) -> Iterator[Finding]:
    for path in {path: None for node in facts.nodes for path in node.models}:
        sizes = {node.name: node.models.get(path) for node in facts.nodes}
        usual = max((size for size in sizes.values() if size), key=list(sizes.values()).count, default=None)
        for name, size in sizes.items():
            if size is None:
                yield Finding(
                    "model", name, "fail", f"{path} is no model directory with safetensors there",
                    "Put the model on storage that every node mounts, or copy it to the same path.",
                )  # fmt: skip
            elif size != usual:
                yield Finding(
                    "model", name, "fail", f"{path} has {size} bytes of weights, elsewhere {usual}",
                    "Copy it again, whole, from the same source.",
                )  # fmt: skip
            else:
                yield Finding("model", name, "ok", f"{size / GIB:.2f} GiB")


def shared_memory(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.shm_bytes is None:
            yield Finding("shm", node.name, "warn", "there is no /dev/shm", "Mount a tmpfs there.")
        elif node.shm_bytes < node.object_store_bytes:
            yield Finding(
                "shm", node.name, "fail",
                f"/dev/shm has {node.shm_bytes / GIB:.1f} GiB, Ray's object store {node.object_store_bytes / GIB:.1f}",
                "Enlarge it: --shm-size of docker, an emptyDir with medium Memory in Kubernetes.",
            )  # fmt: skip
        elif node.gpus_announced and node.shm_bytes < SHM_GPU:
            yield Finding(
                "shm", node.name, "warn", f"/dev/shm has {node.shm_bytes / GIB:.1f} GiB",
                "Give a GPU node at least 8 GiB: NCCL and vLLM's processes talk through it.",
            )  # fmt: skip
        else:
            yield Finding("shm", node.name, "ok", f"{node.shm_bytes / GIB:.0f} GiB")


def disks(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        found = []
        for path, free in node.free_bytes.items():
            message = f"{free / GIB:.1f} GiB free for {path}"
            if free < DISK_FAIL:
                found.append(Finding("disk", node.name, "fail", message, "Make room there."))
            elif (
                facts.storage_needed and facts.storage and path == facts.storage.storage and free < facts.storage_needed
            ):
                found.append(
                    Finding(
                        "disk",
                        node.name,
                        "warn",
                        f"{message}, and the run wants {facts.storage_needed / GIB:.0f}",
                        "Make room, or lower rounds.count or training.keep_checkpoints.",
                    )
                )
            elif free < DISK_WARN:
                found.append(
                    Finding(
                        "disk", node.name, "warn", message, "Make room: Ray spills objects and logs to local disks."
                    )
                )
        lowest = min(node.free_bytes.values(), default=0)
        yield from found or [Finding("disk", node.name, "ok", f"{lowest / GIB:.0f} GiB free")]


def open_files(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.open_files >= FILES_WARN:
            yield Finding("open files", node.name, "ok", str(node.open_files))
            continue
        level = "fail" if node.open_files < FILES_FAIL else "warn"
        cure = "Run `ulimit -n 65536` before `ray start`, or set the limit of the container."
        yield Finding("open files", node.name, level, f"at most {node.open_files}", cure)  # type: ignore[arg-type]


def ports(facts: ClusterFacts) -> Iterator[Finding]:
    for node in facts.nodes:
        blocked = [f"{to} ({why})" for (at, to), why in facts.blocked.items() if at == node.name]
        if blocked:
            yield Finding(
                "ports", node.name, "fail", f"cannot connect to {', '.join(blocked)}",
                "Open all TCP ports between the nodes: Ray's workers, gloo and NCCL use ports as they come.",
            )  # fmt: skip
        elif len(facts.nodes) > 1:
            yield Finding("ports", node.name, "ok", f"reaches {len(facts.nodes) - 1} others")


def collectives(facts: ClusterFacts) -> Iterator[Finding]:
    for ping in facts.pings:
        yield from _collective(ping, [node.name for node in facts.nodes])


def _collective(ping: PingFacts, names: Sequence[str]) -> Iterator[Finding]:
    cure = "If the network has several interfaces, name one: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on every node."
    for name in ping.absent:
        yield Finding(ping.backend, name, "fail", "did not come to the sum over all nodes in time", cure)
    if ping.absent:
        return  # what the others say is that they waited for these
    for name, error in ping.errors.items():
        yield Finding(ping.backend, name, "fail", error, cure)
    if ping.seconds is None:
        if not ping.errors:
            yield Finding(
                ping.backend, CLUSTER, "warn", "was not tried: no free GPU on every node", "Run it again then."
            )
        return
    # Of a ring over n nodes, every node sends and receives about twice the bytes.
    speed = 2 * ping.bytes / max(ping.seconds, 1e-9)
    message = f"{ping.bytes >> 20} MiB over {len(names)} nodes in {ping.seconds:.3f} s, met in {ping.met_s or 0:.1f} s"
    if speed < SLOW_BYTES_S:
        cure = "Look for a slow link, or for the wrong interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME."
        yield Finding(ping.backend, CLUSTER, "warn", message, cure)
    else:
        yield Finding(ping.backend, CLUSTER, "ok", message)


def upload(facts: ClusterFacts) -> Iterator[Finding]:
    if facts.upload is None:
        return
    size, limit = facts.upload.bytes, facts.upload_limit
    message = f"{facts.upload.directory} is {size / (1 << 20):.1f} MiB in {facts.upload.files} files"
    if size <= limit // 2:
        yield Finding("upload", CLUSTER, "ok", message)
        return
    largest = ", ".join(f"{name} ({bytes / (1 << 20):.1f} MiB)" for name, bytes in facts.upload.largest)
    cure = f"Keep out what jobs do not need, in .rayignore or .gitignore; the largest are {largest}."
    message += f"; Ray takes at most {limit >> 20} MiB compressed"
    yield Finding("upload", CLUSTER, "fail" if size > limit else "warn", message, cure)
