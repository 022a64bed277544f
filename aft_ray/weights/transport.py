"""How the shards of a publication get from rank 0 of training to an engine's process.

A shard always arrives as a local safetensors file, the one form that every vLLM worker process can map. The trainer
offers shards as it writes them; the engine opens them one at a time. A collective transport (NCCL) would implement
the same two ends over buckets.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aft_ray.weights.publication import Publication


class Offer(Protocol):
    """The trainer's end: offers one shard file, returns what the engine needs to open it (None: its name is enough)."""

    def __call__(self, shard: Path) -> Any: ...


def offer_checkpoint(shard: Path) -> None:
    """Nothing to do: engines read the model directory from shared storage."""
    del shard


def offer_object(shard: Path) -> Any:
    """Puts the shard into Ray's object store: shared memory here, one transfer a node elsewhere."""
    import ray

    return ray.put(np.fromfile(shard, dtype=np.uint8))


OFFERS: dict[str, Offer] = {"checkpoint": offer_checkpoint, "object_store": offer_object}


@contextlib.contextmanager
def opened(publication: Publication, timeout_s: float) -> Iterator[list[Callable[[], str]]]:
    """The engine's end: one call a shard, each making the shard a local file and returning its path.

    Objects whose owner died with the trainer are replaced by the model directory, which holds the same bytes.
    Raises TimeoutError when the objects do not reach this node within `timeout_s`.
    """
    from_disk = [_constant(str(Path(publication.model) / name)) for name in publication.shards]
    if not publication.objects:
        yield from_disk
        return
    import ray
    from ray.exceptions import GetTimeoutError, ObjectLostError

    try:
        arrays = ray.get(list(publication.objects), timeout=timeout_s)  # mapped, not copied
    except GetTimeoutError:
        raise TimeoutError(
            f"{len(publication.objects)} shards did not arrive over the object store in {timeout_s:.0f} s"
        ) from None
    except ObjectLostError:
        yield from_disk
        return
    with tempfile.TemporaryDirectory(prefix="aft-ray-", dir=_memory_dir()) as scratch:
        path = Path(scratch) / "shard.safetensors"
        yield [_written(path, array) for array in arrays]


def _constant(value: str) -> Callable[[], str]:
    return lambda: value


def _written(path: Path, array: np.ndarray[Any, Any]) -> Callable[[], str]:
    def write() -> str:
        # A new file each time: the old one may still be mapped by the engine.
        path.unlink(missing_ok=True)
        array.tofile(path)
        return str(path)

    return write


def _memory_dir() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
