"""Where the ranks of a weight broadcast meet: the store that rank 0 serves, and who has arrived at it.

Invariant: every wait has the deadline that its caller gives, for broadcasts over NCCL too: vLLM's own way to open a
store has a deadline of 300 s, whatever the run's is.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__


def open_store(timeout_s: float) -> Any:
    """Opens rank 0's store on a free port (`.port`) of this machine. It serves until nothing holds it."""
    # With some versions of libuv the server does not end with its object. vLLM does not use it for the same reason.
    return TCPStore(
        "0.0.0.0", 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, use_libuv=False
    )


def connect_store(address: str, port: int, timeout_s: float) -> Any:
    """Connects another rank to rank 0's store. Raises torch's DistError, a RuntimeError, after `timeout_s`."""
    return TCPStore(
        address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, use_libuv=False
    )


def arrive(store: Any, rank: int, world_size: int, timeout_s: float) -> None:
    """Says that this rank is here, and waits for all others. Raises RuntimeError when one does not arrive in time."""
    store.set(_arrival(rank), b"1")
    store.wait([_arrival(other) for other in range(world_size)], timedelta(seconds=timeout_s))


def missing_ranks(store: Any, world_size: int) -> list[int]:
    """The ranks that have not arrived yet."""
    return [rank for rank in range(world_size) if not store.check([_arrival(rank)])]


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"
