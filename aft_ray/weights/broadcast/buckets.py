"""The format of a weight broadcast: which tensors it consists of, and how both ends send and receive them in buckets.

The format is that of vLLM's packed broadcast (vllm/distributed/weight_transfer/packed_tensor.py): a bucket is the bytes
of consecutive tensors, and ends with the tensor that brings it above a threshold. Invariants: both ends compute the
same buckets from the same layout; each end holds two buckets and, apart from them, no copy of the weights; what is
received equals what was sent, name by name, in the layout's dtype. The driver reads layouts, so that torch is imported
only where buckets are allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Waits until an operation on a bucket has ended. Raises what the process group raises.
Wait = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a checkpoint in the order in which they are sent.

    Attributes:
        names: names of the parameters in the Hugging Face checkpoint.
        shapes: the whole shape of each tensor.
        dtype: the dtype of all tensors, for example "bfloat16".
        threshold: bytes; a bucket ends with the tensor that brings it above them.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    threshold: int

    @classmethod
    def of(cls, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: str, bucket_bytes: int) -> Layout:
        """The layout whose buckets hold at most `bucket_bytes`.

        The threshold leaves room for the largest tensor. If that one is as large as a bucket or larger, the threshold
        is 0 and each tensor is sent in a bucket of its own.
        """
        layout = cls(tuple(names), tuple(tuple(shape) for shape in shapes), dtype, 0)
        return replace(layout, threshold=max(0, bucket_bytes - max(layout.sizes, default=0)))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [math.prod(shape) * _BYTES[self.dtype] for shape in self.shapes]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.sizes)

    def buckets(self) -> list[list[int]]:
        """The indices of the tensors in each bucket."""
        buckets: list[list[int]] = []
        room = -1
        for index, size in enumerate(self.sizes):
            if room < 0:
                buckets.append([])
                room = self.threshold
            buckets[-1].append(index)
            room -= size
        return buckets


class ProcessGroup(Protocol):
    """The process group of a broadcast, as one of its ranks uses it. Rank 0 sends."""

    def broadcast(self, bucket: torch.Tensor) -> Wait:
        """Starts to copy the bucket of rank 0 into the bucket of every other rank.

        The bucket must not be used before the returned function has returned.
        """
        ...


def send(
    tensors: Iterator[tuple[str, torch.Tensor]], layout: Layout, group: ProcessGroup, device: torch.device
) -> None:
    """Sends the weights from rank 0: fills one bucket while the other one is being sent.

    Takes exactly the layout's tensors from the iterator, in any dtype.

    Raises:
        ValueError: the tensors are not those of the layout.
    """
    pair = _BucketPair(layout, device)
    for number, indices in enumerate(pair.buckets):
        bucket = pair.wait_free(number)
        next_tensors = islice(tensors, len(indices))
        for index, view in pair.views(number):
            name, tensor = next(next_tensors, ("nothing", bucket))
            if (name, tuple(tensor.shape)) != (layout.names[index], layout.shapes[index]):
                raise ValueError(
                    f"the weights changed their layout: {layout.names[index]} {layout.shapes[index]} was announced, "
                    f"and {name} {tuple(tensor.shape)} was sent"
                )
            view.copy_(tensor)
        pair.waits[number % 2] = group.broadcast(bucket)
    pair.wait_all()


def receive(
    layout: Layout,
    group: ProcessGroup,
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object],
    device: torch.device,
) -> None:
    """Receives the weights on a rank other than 0: loads one bucket while the next one is being received.

    Args:
        load: called once for each bucket, with its tensors by name, which are copies.
    """
    pair = _BucketPair(layout, device)
    if pair.buckets:
        pair.waits[0] = group.broadcast(pair.wait_free(0))
    for number in range(len(pair.buckets)):
        if number + 1 < len(pair.buckets):
            pair.waits[(number + 1) % 2] = group.broadcast(pair.wait_free(number + 1))
        pair.wait_free(number)
        # vLLM keeps tensors until a fused layer is complete, by which time the bucket holds others.
        load((layout.names[index], view.clone()) for index, view in pair.views(number))


class _BucketPair:
    """The two buckets of one end; bucket number n of the broadcast uses the memory of number n - 2."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        import torch

        self.layout, self.sizes, self.buckets = layout, layout.sizes, layout.buckets()
        self.bytes = [sum(self.sizes[index] for index in indices) for indices in self.buckets]
        self.waits: list[Wait | None] = [None, None]
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        largest = max(self.bytes, default=0)
        self._memory = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(self.buckets)))
        ]

    def wait_free(self, number: int) -> torch.Tensor:
        """The memory of bucket `number` (its bytes, uint8), once the last operation on it has ended."""
        if (wait := self.waits[number % 2]) is not None:
            self.waits[number % 2] = None
            wait()
        return self._memory[number % 2][: self.bytes[number]]

    def views(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensors of bucket `number` as views of its memory, with their indices."""
        offset = 0
        for index in self.buckets[number]:
            piece = self._memory[number % 2][offset : offset + self.sizes[index]]
            yield index, piece.view(self._dtype).view(self.layout.shapes[index])
            offset += self.sizes[index]

    def wait_all(self) -> None:
        """Waits until no operation is running."""
        for index, wait in enumerate(self.waits):
            if wait is not None:
                self.waits[index] = None
                wait()
