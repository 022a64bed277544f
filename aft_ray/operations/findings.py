"""Records of the doctor: facts about a cluster, and findings.

Invariant: facts are observations only. A finding is the result of a check; if it is not "ok", it has a cure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warn", "fail"]
# Takes the place of a node's name in findings that concern no single node.
CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check on one node.

    Attributes:
        message: a short phrase that says what was observed.
        cure: what to do about it, in one or two sentences; empty if all is well.
    """

    check: str
    node: str
    level: Level
    message: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU according to nvidia-smi.

    Attributes:
        ecc: uncorrected memory errors since the driver started; None: not counted.
    """

    name: str
    driver: str
    total_mib: int
    used_mib: int
    ecc: int | None


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What was observed on one node.

    Attributes:
        head: whether it is Ray's head node.
        gpus_announced, gpus_free: GPUs that the node has according to Ray, and those that no work uses.
        object_store_bytes: size of Ray's object store.
        torch_gpus: GPUs that torch can use; None if torch failed or the node has no nvidia-smi.
        torch_cuda: the CUDA version that torch was built for, such as "13.0"; None for a CPU build, or without torch.
        rdma: the RDMA devices (EFA, InfiniBand or RoCE adapters) that processes of Ray can see there.
        memlock_bytes: how much memory a process may lock; None: all of it.
        operators: the operators of DeepSpeed that were compiled there, and why one could not be; None: it was.
        shm_bytes: size of /dev/shm; None if there is none.
        free_bytes: free bytes of the disk of each checked path.
        open_files: how many files a process may open.
        models: bytes of the weights in each model directory; None if it is missing.
        clock_s: seconds that its clock is ahead of the doctor's, within `clock_error_s`; None: not measured.
    """

    name: str
    head: bool
    gpus_announced: float
    gpus_free: float
    object_store_bytes: int
    host: str
    versions: Mapping[str, str | None]
    gpus: Sequence[Gpu]
    torch_gpus: int | None
    torch_cuda: str | None
    rdma: Sequence[str]
    memlock_bytes: int | None
    operators: Mapping[str, str | None]
    shm_bytes: int | None
    free_bytes: Mapping[str, int]
    open_files: int
    models: Mapping[str, int | None]
    clock_s: float | None
    clock_error_s: float


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """A test of the shared storage.

    Attributes:
        written: by node, the error of writing a file; None: the file was written.
        unseen: by node, the nodes whose files it cannot read.
    """

    storage: str
    written: Mapping[str, str | None]
    unseen: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class AllReduceFacts:
    """An all-reduce over all nodes.

    Attributes:
        backend: gloo or nccl.
        bytes: size of the tensor.
        ranks: processes that took part.
        errors: by node, what failed there.
        absent: nodes that died or did not answer.
        met_s: seconds until the first all-reduce was done, which includes forming the process group.
        seconds: duration of a later all-reduce; None if it did not run.
    """

    backend: str
    bytes: int
    ranks: int = 0
    errors: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    met_s: float | None = None
    seconds: float | None = None

    @property
    def bus_bandwidth(self) -> float | None:
        """GB/s (10^9 bytes), as nccl-tests defines it: bytes / seconds x 2 (ranks - 1) / ranks. None if it did not run.

        It is the speed of the slowest link on which the ranks exchange data, whatever their number: in an all-reduce of
        S bytes every rank sends and receives 2 S (ranks - 1) / ranks bytes.
        """
        if self.seconds is None or self.ranks < 2:
            return None
        return self.bytes / max(self.seconds, 1e-9) * 2 * (self.ranks - 1) / self.ranks / 1e9


@dataclass(frozen=True, slots=True)
class BandwidthNeed:
    """The bandwidth between nodes that the training of a config needs.

    Attributes:
        gb_s: bus bandwidth, GB/s.
        workers: its train workers, with a GPU each. If one node holds them all, the network does not matter.
        why: a clause that says where the number comes from.
    """

    gb_s: float
    workers: int
    why: str


@dataclass(frozen=True, slots=True)
class Upload:
    """The working directory that Ray would upload: bytes before compression, number of files, and the largest files."""

    directory: str
    bytes: int
    files: int
    largest: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Everything that was observed on a cluster.

    Attributes:
        silent: nodes on which no probe could run, and why.
        here: versions of packages where the doctor runs.
        blocked: why a node cannot connect to another, by pairs (from, to).
        upload_limit: bytes that Ray accepts as a working directory.
        storage_needed: bytes that the run will write; None: unknown.
        bandwidth_needed: what the training needs between nodes; None: nothing, or it is not known.
    """

    nodes: Sequence[NodeFacts]
    silent: Mapping[str, str] = field(default_factory=dict)
    here: Mapping[str, str | None] = field(default_factory=dict)
    storage: StorageFacts | None = None
    blocked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    pings: Sequence[AllReduceFacts] = ()
    upload: Upload | None = None
    upload_limit: int = 0
    storage_needed: int | None = None
    bandwidth_needed: BandwidthNeed | None = None
