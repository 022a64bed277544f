"""Which rank writes which layers of a model directory, and into which files.

Invariants: every rank computes the same plan from the shapes alone; each tensor is in one file and each file has one
owner; the layers are divided so that no rank has more bytes than the mean and one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
# Bytes of an element, and the name of the dtype in a safetensors file.
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A safetensors file of a model directory.

    Attributes:
        name: its file name.
        owner: the rank that writes it.
        tensors: the whole shape of each tensor by name, in the model's order.
    """

    name: str
    owner: int
    tensors: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The files of a model directory in loading order.

    Attributes:
        dtype: the dtype of all tensors, for example "bfloat16".
        owners: the rank that owns each layer, in the model's order.
    """

    dtype: str
    owners: tuple[int, ...]
    shards: tuple[PlannedShard, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files in loading order."""
        return tuple(shard.name for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(_bytes(shape, self.dtype) for shard in self.shards for shape in shard.tensors.values())

    def of_rank(self, rank: int) -> list[PlannedShard]:
        """The files that a rank writes."""
        return [shard for shard in self.shards if shard.owner == rank]

    def weight_map(self) -> dict[str, str]:
        """The file of each tensor, as the index of a model directory has it."""
        return {name: shard.name for shard in self.shards for name in shard.tensors}


def plan_shards(layers: Sequence[Mapping[str, Shape]], dtype: str, ranks: int, shard_bytes: int) -> ShardPlan:
    """Divides the layers of a model among the ranks.

    The largest layers are given away first, each to the rank with the fewest bytes so far (Graham 1969).

    Args:
        layers: the whole shape of each tensor of each layer by name, in the model's order.
        shard_bytes: most bytes of a file that has more than one tensor.
    """
    sizes = [sum(_bytes(shape, dtype) for shape in layer.values()) for layer in layers]
    owners, bytes_of_rank = [0] * len(layers), [0] * ranks
    for number in sorted(range(len(layers)), key=lambda number: -sizes[number]):
        owners[number] = bytes_of_rank.index(min(bytes_of_rank))
        bytes_of_rank[owners[number]] += sizes[number]
    files: list[tuple[int, int, dict[str, Shape]]] = []  # the number of the first layer, the owner, the tensors
    for rank in range(ranks):
        room = 0
        for number, layer in enumerate(layers):
            for name, shape in layer.items() if owners[number] == rank else ():
                size = _bytes(shape, dtype)
                if size > room:
                    files.append((number, rank, {}))
                    room = shard_bytes
                files[-1][2][name] = shape
                room -= size
    files.sort(key=lambda file: file[0])
    shards = tuple(
        PlannedShard(f"model-{number:05d}.safetensors", owner, tensors)
        for number, (_, owner, tensors) in enumerate(files, 1)
    )
    return ShardPlan(dtype, tuple(owners), shards)


def _bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * ELEMENT_BYTES[dtype]
