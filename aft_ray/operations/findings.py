"""What the doctor knows of a cluster, and what it says of it.

Invariant: facts are what was seen, without judgement; a finding is a judgement, and every one that is not good has a
cure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warn", "fail"]
# The column of what concerns no single node.
CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check on one node. message: what was seen, a short phrase. cure: what to do, one sentence."""

    check: str
    node: str
    level: Level
    message: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A row of nvidia-smi. ecc: uncorrected memory errors since the driver started; None where the GPU counts none."""

    name: str
    driver: str
    total_mib: int
    used_mib: int
    ecc: int | None


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What was seen on one node.

    head: whether Ray's head runs there. gpus_announced, gpus_free: what Ray says. torch_gpus: None where it was not
    asked or failed. shm_bytes: of /dev/shm. object_store_bytes: of Ray's. free_bytes: of the disk below each path.
    models: bytes of weights of each model directory; None: it is not there. clock_s: ahead of the doctor's clock,
    measured to within `clock_error_s`; None: not measured. labels of `free_bytes` and `models` are the paths asked for.
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
    shm_bytes: int | None
    free_bytes: Mapping[str, int]
    open_files: int
    models: Mapping[str, int | None]
    clock_s: float | None
    clock_error_s: float


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """written: per node, what was wrong with writing there, None: nothing. unseen: per node, whose files it misses."""

    storage: str
    written: Mapping[str, str | None]
    unseen: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class PingFacts:
    """A sum over all nodes. errors: per node, what went wrong there. absent: nodes that did not answer at all.

    met_s: until all had met. seconds: of one sum of `bytes` bytes; None: there was none.
    """

    backend: str
    bytes: int
    errors: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    met_s: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """A working directory as Ray would send it: bytes before compression, and its largest files."""

    directory: str
    bytes: int
    files: int
    largest: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All that was seen. silent: nodes on which no check could run, and why. blocked: pairs that cannot connect."""

    nodes: Sequence[NodeFacts]
    silent: Mapping[str, str] = field(default_factory=dict)
    here: Mapping[str, str | None] = field(default_factory=dict)
    storage: StorageFacts | None = None
    blocked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    pings: Sequence[PingFacts] = ()
    upload: Upload | None = None
    upload_limit: int = 0
    storage_needed: int | None = None
