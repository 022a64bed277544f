"""How an engine receives a version: the calls that load new weights into it, one class for each transport.

Every call goes to all processes of the engine at once; the caller, vLLM's LLMEngine or AsyncLLM, makes one after the
other. Invariants: the model must not run between the first call and the last; the number of calls does not depend on
the number of parameters; after a failure in one of `RECOVERABLE_PHASES` the engine can take another update.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from aft_ray.storage.run_dir import RunDir, local_model
from aft_ray.weights.adapter import ADAPTER_FILES
from aft_ray.weights.broadcast.buckets import Layout

# rendezvous: the process group of a broadcast forms. fetch: the bytes arrive; in a broadcast they are loaded as they
# arrive. load: the weights are put into the engine's layers. verify: the probes are scored.
Phase = Literal["rendezvous", "fetch", "load", "verify"]
# The phases in which an engine depends on other processes. A failure there leaves its weights unknown and itself sound.
RECOVERABLE_PHASES: tuple[Phase, ...] = ("rendezvous", "fetch")
# The names under which the two weight transfer engines of broadcasts are registered in vLLM: without GPUs, and with.
GLOO_BACKEND, NCCL_BACKEND = "aft_ray_gloo", "aft_ray_nccl"
# Seconds between two looks at a model directory that is being written.
_POLL_S = 0.5
# What vLLM's messages between processes carry unchanged. Its decoder knows no other types inside the arguments of a
# call: a tuple arrives as a list, and so does every object that has fields.
Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"
_PLAIN_VALUES = (type(None), bool, int, float, str)


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A method of every worker process of an engine, its arguments, and the phase that it belongs to.

    The engine's core and its workers may run in other processes than the caller, so every argument is a plain value.
    Lists and dicts must be of exactly these types.

    Raises:
        TypeError: an argument would not arrive as it is given.
    """

    phase: Phase
    method: str
    args: tuple[Plain, ...] = ()

    def __post_init__(self) -> None:
        for index, argument in enumerate(self.args):
            if (part := _not_plain(argument)) is not None:
                raise TypeError(
                    f"argument {index} of {self.method} contains a {type(part).__name__}, which does not reach an "
                    f"engine in another process unchanged; pass numbers, texts, lists, and dicts whose keys are texts"
                )


def _not_plain(value: Any) -> Any:
    """A part of a value that is not `Plain`; None when there is none."""
    if type(value) is dict:
        wrong_keys = [key for key in value if type(key) is not str]
        return wrong_keys[0] if wrong_keys else _not_plain(list(value.values()))
    if type(value) is list:
        return next((part for part in map(_not_plain, value) if part is not None), None)
    return None if type(value) in _PLAIN_VALUES else value


class ReceivePlan(Protocol):
    """How an engine receives the weights of a version. Picklable: it is part of the version manifest."""

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """The calls in order. What the iterator does before a call belongs to phase `fetch`, within `timeout_s`."""
        ...


@dataclass(frozen=True, slots=True)
class FromDirectory:
    """Reads a model directory: local, shared, or a URI. Engines that start later read it, and all others can.

    Attributes:
        durable: whether the directory was complete when the plan was made. If not, an engine waits until it is.
    """

    model: str
    shards: tuple[str, ...]
    durable: bool = True

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """Loads one shard after the other. Raises TimeoutError when the directory is not complete in time."""
        if not self.durable:
            _wait_until_complete(self.model, timeout_s)
        directory = Path(local_model(self.model))
        yield from _load_files(str(directory / shard) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class FromObjects:
    """Reads the shards from Ray's object store, as long as their owner lives, and from the directory afterwards.

    The engine's main process maps the objects and passes one shard at a time to its worker processes, as a file in
    memory.

    Attributes:
        objects: a Ray object reference for each shard file, in loading order.
        fallback: the directory that has the same shards.
    """

    objects: tuple[Any, ...]
    fallback: FromDirectory

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """Loads one shard after the other. Raises TimeoutError when the objects do not reach this node in time."""
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError

        try:
            arrays = ray.get(list(self.objects), timeout=timeout_s)  # mapped, not copied
        except GetTimeoutError:
            raise TimeoutError(
                f"{len(self.objects)} shards did not arrive over the object store in {timeout_s:.0f} s"
            ) from None
        except ObjectLostError:
            yield from self.fallback.calls(timeout_s)
            return
        with tempfile.TemporaryDirectory(prefix="aft-ray-", dir=_memory_dir()) as scratch:
            yield from _load_files(_write(Path(scratch) / "shard.safetensors", array) for array in arrays)


@dataclass(frozen=True, slots=True)
class BroadcastOffer:
    """The trainer's offer to broadcast a version: where its process group's store is, and the layout of the weights."""

    address: str
    port: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class FromBroadcast:
    """Takes part in a weight broadcast, through vLLM's own weight transfer; see `transfer_engines.py`.

    Attributes:
        first_rank: the rank of the engine's first process. The others follow in vLLM's order.
    """

    offer: BroadcastOffer
    first_rank: int
    world_size: int

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """Joins the process group, receives all buckets, and leaves the group; `timeout_s` is each phase's deadline."""
        layout = self.offer.layout
        init_info: dict[str, Plain] = {
            "master_address": self.offer.address,
            "master_port": self.offer.port,
            "rank_offset": self.first_rank,
            "world_size": self.world_size,
            "packed": True,
            "packed_buffer_size_bytes": layout.threshold,
            "timeout_s": timeout_s,
        }
        update_info: dict[str, Plain] = {
            "names": [name for name, _, _ in layout.stream],
            "dtype_names": [dtype for _, _, dtype in layout.stream],
            "shapes": [list(shape) for _, shape, _ in layout.stream],
        }
        yield EngineCall("rendezvous", "init_weight_transfer_engine", (init_info,))
        yield EngineCall("rendezvous", "start_weight_update")
        yield EngineCall("fetch", "update_weights", (update_info,))
        yield EngineCall("load", "finish_weight_update")
        yield EngineCall("load", "verify_broadcast")
        yield EngineCall("load", "shutdown_weight_transfer_engine")


@dataclass(frozen=True, slots=True)
class FromAdapter:
    """Loads a LoRA adapter for the model that the engine was started from, in place of the adapter before.

    Attributes:
        directory: peft's directory on shared storage, or its URI in a run directory on an object store.
        number: the id of the adapter in vLLM; 0: the model alone, without an adapter.
        objects: the files of the directory in Ray's object store, as long as their owner lives.
    """

    directory: str
    number: int
    objects: tuple[Any, ...] = ()

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """Loads the adapter with one call. Raises TimeoutError when the objects do not reach this node in time."""
        if not self.number:
            return
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError

        try:
            arrays = ray.get(list(self.objects), timeout=timeout_s) if self.objects else []
        except GetTimeoutError:
            raise TimeoutError(f"an adapter did not arrive over the object store in {timeout_s:.0f} s") from None
        except ObjectLostError:  # their owner, the trainer, has ended
            arrays = []
        if not arrays:
            yield self._load(local_model(self.directory))
            return
        with tempfile.TemporaryDirectory(prefix="aft-ray-adapter-", dir=_memory_dir()) as scratch:
            for name, array in zip(ADAPTER_FILES, arrays, strict=True):
                array.tofile(Path(scratch, name))
            yield self._load(scratch)

    def _load(self, directory: str) -> EngineCall:
        # Engines have room for one adapter: when this one is loaded, vLLM drops the one before.
        return EngineCall("load", "load_adapter", (self.number, directory))


def _wait_until_complete(model: str, timeout_s: float) -> None:
    """Waits until the train workers have written a model directory. Raises TimeoutError that names it."""
    directory, deadline = RunDir(model), time.monotonic() + timeout_s
    if not directory.is_complete(""):
        print(f"waits until the train workers have written {model}", file=sys.stderr, flush=True)
    while not directory.is_complete(""):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the train workers have not written {model} completely in {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _load_files(paths: Iterator[str]) -> Iterator[EngineCall]:
    yield EngineCall("load", "begin_weights")
    for path in paths:
        yield EngineCall("load", "load_weights_file", (path,))
    yield EngineCall("load", "finish_weights")


def _write(path: Path, array: Any) -> str:
    # A new file each time: the engine may still have the old one mapped.
    path.unlink(missing_ok=True)
    array.tofile(path)
    return str(path)


def _memory_dir() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
