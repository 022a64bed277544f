"""What a stream of weights consists of, and where its buckets end.

The format is that of vLLM's packed broadcast (vllm/distributed/weight_transfer/packed_tensor.py): the bytes of the
tensors one after the other, a bucket ending with the tensor that brings it above a threshold. Invariant: both ends
compute the same buckets from the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and whole shapes of a checkpoint's tensors in the order of the stream, all of one dtype ("bfloat16").

    threshold: a bucket ends with the tensor that brings it above so many bytes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    threshold: int

    @classmethod
    def of(cls, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: str, bucket_bytes: int) -> Layout:
        """The layout whose buckets hold at most `bucket_bytes`.

        Below the threshold there is always room for the largest tensor. With one as large as a bucket or larger the
        threshold is 0, and each tensor travels alone.
        """
        every = cls(tuple(names), tuple(tuple(shape) for shape in shapes), dtype, 0)
        return replace(every, threshold=max(0, bucket_bytes - max(every.sizes, default=0)))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [math.prod(shape) * _BYTES[self.dtype] for shape in self.shapes]

    @property
    def bytes(self) -> int:
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
