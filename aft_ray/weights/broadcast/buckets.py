"""The format of a weight broadcast: which tensors it consists of, and how both ends send and receive them in buckets.

The format is that of vLLM's packed broadcast (vllm/distributed/weight_transfer/packed_tensor.py): a bucket is the bytes
of consecutive tensors, and ends with the tensor that brings it above a threshold. After the weights the stream has one
more tensor, `DIGESTS`: the 64-bit digests of all weights as they were sent, in their order. It is declared as bytes
(uint8, 8 for each weight), because it may begin at any byte of its bucket.

Invariants: both ends compute the same buckets from the same layout; each end holds two buckets and, apart from them, no
copy of the weights; what is received equals what was sent, name by name, in the layout's dtype. The driver reads
layouts, so that torch is imported only where buckets are allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# The name of the last tensor of a stream.
DIGESTS = "aft_ray.digests"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}

# A tensor of the stream: its name, shape and dtype.
Entry = tuple[str, tuple[int, ...], str]

# Waits until an operation on a bucket has ended. Raises what the process group raises.
Wait = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a checkpoint in the order in which they are sent; the digests that follow them are not listed.

    Attributes:
        names: names of the parameters in the Hugging Face checkpoint.
        shapes: the whole shape of each tensor.
        dtype: the dtype of all these tensors, for example "bfloat16".
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

    @classmethod
    def of_stream(cls, entries: Sequence[Entry], threshold: int) -> Layout:
        """The layout of a stream whose tensors, with the digests at the end, are given."""
        weights = entries[:-1]
        return cls(
            tuple(name for name, _, _ in weights),
            tuple(tuple(shape) for _, shape, _ in weights),
            weights[0][2] if weights else "float32",
            threshold,
        )

    @property
    def stream(self) -> list[Entry]:
        """Everything that is sent: the weights, and their digests; nothing when there are no weights."""
        weights = [(name, shape, self.dtype) for name, shape in zip(self.names, self.shapes, strict=True)]
        return [*weights, (DIGESTS, (8 * len(weights),), "uint8")] if weights else []

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor of the stream."""
        return [math.prod(shape) * _BYTES[dtype] for _, shape, dtype in self.stream]

    @property
    def bytes(self) -> int:
        """Bytes of all weights together, without their digests."""
        return sum(self.sizes[:-1])

    def buckets(self) -> list[list[int]]:
        """The indices of the stream's tensors in each bucket."""
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
    """Sends the weights and their digests from rank 0: fills one bucket while the other one is being sent.

    Takes exactly the layout's tensors from the iterator, in any dtype.

    Raises:
        ValueError: the tensors are not those of the layout.
    """
    import torch

    from aft_ray.weights.digests import device_digest

    pair = _BucketPair(layout, device)
    digests: list[torch.Tensor] = []
    for number in range(len(pair.buckets)):
        bucket = pair.wait_free(number)
        for index, view in pair.views(number):
            if index == len(layout.names):
                view.copy_(torch.stack(digests).view(torch.uint8))
                continue
            name, tensor = next(tensors, ("nothing", bucket))
            if (name, tuple(tensor.shape)) != (layout.names[index], layout.shapes[index]):
                raise ValueError(
                    f"the weights changed their layout: {layout.names[index]} {layout.shapes[index]} was announced, "
                    f"and {name} {tuple(tensor.shape)} was sent"
                )
            view.copy_(tensor)
            digests.append(device_digest(view))
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
        load: called once for each bucket, with its tensors by name, which are copies. The last one is `DIGESTS`.
    """
    pair = _BucketPair(layout, device)
    if pair.buckets:
        pair.waits[0] = group.broadcast(pair.wait_free(0))
    for number in range(len(pair.buckets)):
        if number + 1 < len(pair.buckets):
            pair.waits[(number + 1) % 2] = group.broadcast(pair.wait_free(number + 1))
        pair.wait_free(number)
        # vLLM keeps tensors until a fused layer is complete, by which time the bucket holds others.
        load((pair.stream[index][0], view.clone()) for index, view in pair.views(number))


class _BucketPair:
    """The two buckets of one end; bucket number n of the broadcast uses the memory of number n - 2."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        import torch

        self.stream, self.sizes, self.buckets = layout.stream, layout.sizes, layout.buckets()
        self.bytes = [sum(self.sizes[index] for index in indices) for indices in self.buckets]
        self.waits: list[Wait | None] = [None, None]
        self._dtypes: list[torch.dtype] = [getattr(torch, dtype) for _, _, dtype in self.stream]
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
        """The tensors of bucket `number` as views of its memory, with their indices in the stream."""
        offset = 0
        for index in self.buckets[number]:
            piece = self._memory[number % 2][offset : offset + self.sizes[index]]
            yield index, piece.view(self._dtypes[index]).view(self.stream[index][1])
            offset += self.sizes[index]

    def wait_all(self) -> None:
        """Waits until no operation is running."""
        for index, wait in enumerate(self.waits):
            if wait is not None:
                self.waits[index] = None
                wait()
