"""The two ends of a stream of weights: how buckets are filled, sent, received and emptied.

Invariants: each end holds two buckets, and of the weights nothing else: no bucket is larger than the layout's largest.
What comes out is what went in, name by name, in the layout's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol

import torch

from aft_ray.weights.broadcast.layout import Layout

# Waits until an operation on a bucket is through. Raises what the group raises.
Wait = Callable[[], None]


class ProcessGroup(Protocol):
    """Those who share the stream; rank 0 sends."""

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        """Begins to fill the bucket on every other rank from rank 0's. It must not be touched before the wait ends."""
        ...


def send(
    tensors: Iterator[tuple[str, torch.Tensor]], layout: Layout, group: ProcessGroup, device: torch.device
) -> None:
    """Rank 0's end: packs tensors, in any dtype, straight into two buckets in turn; one is filled as the other travels.

    Takes exactly the layout's tensors from the iterator. Raises ValueError when they are not those of the layout.
    """
    slots = _Slots(layout, device)
    for number, indices in enumerate(slots.buckets):
        bucket = slots.free(number)
        pieces = islice(tensors, len(indices))
        for index, view in slots.views(number):
            name, tensor = next(pieces, ("nothing", bucket))
            if (name, tuple(tensor.shape)) != (layout.names[index], layout.shapes[index]):
                raise ValueError(
                    f"the weights changed their layout: {layout.names[index]} {layout.shapes[index]} was announced, "
                    f"and {name} {tuple(tensor.shape)} came"
                )
            view.copy_(tensor)
        slots.waits[number % 2] = group.broadcast(bucket)
    slots.drain()


def receive(
    layout: Layout,
    group: ProcessGroup,
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object],
    device: torch.device,
) -> None:
    """The other end: calls `load` with the tensors of each bucket, as copies, while the next bucket travels."""
    slots = _Slots(layout, device)
    if slots.buckets:
        slots.waits[0] = group.broadcast(slots.free(0))
    for number in range(len(slots.buckets)):
        if number + 1 < len(slots.buckets):
            slots.waits[(number + 1) % 2] = group.broadcast(slots.free(number + 1))
        slots.free(number)
        # vLLM keeps tensors until a fused layer is whole, longer than the bucket lives.
        load((layout.names[index], view.clone()) for index, view in slots.views(number))


class _Slots:
    """The two buckets of one end, and what is under way in them."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.sizes, self.buckets = layout, layout.sizes, layout.buckets()
        self.bytes = [sum(self.sizes[index] for index in indices) for indices in self.buckets]
        self.waits: list[Wait | None] = [None, None]
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        largest = max(self.bytes, default=0)
        self._storage = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(self.buckets)))
        ]

    def free(self, number: int) -> torch.Tensor:
        """The place of bucket `number`, once nothing is under way there."""
        slot = number % 2
        if (wait := self.waits[slot]) is not None:
            self.waits[slot] = None
            wait()
        return self._storage[slot][: self.bytes[number]]

    def views(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensors of bucket `number`, by index, as views."""
        offset = 0
        for index in self.buckets[number]:
            piece = self._storage[number % 2][offset : offset + self.sizes[index]]
            yield index, piece.view(self._dtype).view(self.layout.shapes[index])
            offset += self.sizes[index]

    def drain(self) -> None:
        for slot, wait in enumerate(self.waits):
            if wait is not None:
                self.waits[slot] = None
                wait()
