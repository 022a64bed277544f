"""The engine's end of a publication: which calls bring the weights into an engine, one after the other.

Every call goes to all processes of the engine at once; who makes it (vLLM's LLMEngine or AsyncLLM) is the caller's
business. Invariants: between the first call and the last the model must not be run; the number of calls does not
depend on the number of parameters; an engine that failed in a phase of `RECOVERABLE_PHASES` takes another delivery afterwards.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from aft_ray.coordination.broadcast_group import BroadcastMembership
from aft_ray.storage.run_dir import local_model

# rendezvous: the group of a meeting forms. fetch: the bytes come (at a meeting they are loaded as they come). load:
# they are put into the engine's layers. prove: the probes are scored.
Phase = Literal["rendezvous", "fetch", "load", "prove"]
# Phases in which an engine depends on others. What they fail leaves its weights unknown, but the engine sound.
RECOVERABLE_PHASES: tuple[Phase, ...] = ("rendezvous", "fetch")
# The names under which vLLM knows the two receiving ends of a meeting: without GPUs, and with.
GLOO, NCCL = "aft_ray_gloo", "aft_ray_nccl"


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A method of every worker process of an engine, its arguments, and the phase that it is part of."""

    phase: Phase
    method: str
    args: tuple[Any, ...] = ()


class ReceivePlan(Protocol):
    """How an engine gets the weights. Picklable: it travels with the publication."""

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """What comes before the first call, and between two, is the phase `fetch`, within `timeout_s`."""
        ...


@dataclass(frozen=True, slots=True)
class FromDirectory:
    """From a model directory, local or shared, or its URI: always there, for engines that come late too."""

    model: str
    shards: tuple[str, ...]

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        del timeout_s
        directory = Path(local_model(self.model))
        yield from _loading(str(directory / shard) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class FromObjects:
    """From Ray's object store: the shards as references, while their owner lives; then from the directory.

    An engine maps the objects and hands its processes one shard at a time as a file in memory.
    """

    objects: tuple[Any, ...]
    otherwise: FromDirectory

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """Raises TimeoutError when the objects do not reach this node in time."""
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError

        try:
            arrays = ray.get(list(self.objects), timeout=timeout_s)  # mapped, not copied
        except GetTimeoutError:
            raise TimeoutError(
                f"{len(self.objects)} shards did not arrive over the object store in {timeout_s:.0f} s"
            ) from None
        except ObjectLostError:
            yield from self.otherwise.calls(timeout_s)
            return
        with tempfile.TemporaryDirectory(prefix="aft-ray-", dir=_memory_dir()) as scratch:
            yield from _loading(_written(Path(scratch) / "shard.safetensors", array) for array in arrays)


@dataclass(frozen=True, slots=True)
class FromBroadcast:
    """Streamed by train worker 0, through vLLM's own weight transfer; see `transfer_engines.py`."""

    place: BroadcastMembership

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        place, layout = self.place, self.place.layout
        group = {
            "master_address": place.table.address,
            "master_port": place.table.port,
            "rank_offset": place.first_rank,
            "world_size": place.world_size,
            "packed": True,
            "packed_buffer_size_bytes": layout.threshold,
            "timeout_s": timeout_s,
        }
        described = {
            "names": list(layout.names),
            "dtype_names": [layout.dtype] * len(layout.names),
            "shapes": [list(shape) for shape in layout.shapes],
        }
        yield EngineCall("rendezvous", "init_weight_transfer_engine", (group,))
        yield EngineCall("rendezvous", "start_weight_update")
        yield EngineCall("fetch", "update_weights", (described,))
        yield EngineCall("load", "finish_weight_update")
        yield EngineCall("load", "shutdown_weight_transfer_engine")


def _loading(paths: Iterator[str]) -> Iterator[EngineCall]:
    yield EngineCall("load", "begin_weights")
    for path in paths:
        yield EngineCall("load", "load_weights_file", (path,))
    yield EngineCall("load", "finish_weights")


def _written(path: Path, array: Any) -> str:
    # A new file each time: the old one may still be mapped by the engine.
    path.unlink(missing_ok=True)
    array.tofile(path)
    return str(path)


def _memory_dir() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
