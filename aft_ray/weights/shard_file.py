"""The contents of a safetensors file, which are put together in CPU memory tensor by tensor.

The format (https://github.com/huggingface/safetensors): the length of the header in 8 bytes, the header in JSON, which
spaces may fill up, and the bytes of the tensors. Invariant: each tensor is copied once, from its device to its place in
the file; its digest, which the header has, is that of the copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from aft_ray.weights.digests import tensor_digest, write_digests
from aft_ray.weights.shard_plan import ELEMENT_BYTES, PlannedShard

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# No digest has more digits: the header's room is computed with it before any digest is known.
_LONGEST_DIGEST = -(1 << 63)


class ShardFile:
    """A safetensors file of a plan. Call `fill` with each of its tensors, then `finish`.

    Memory of the whole file is reserved at once, and used as tensors arrive.

    Attributes:
        content: the bytes of the finished file: a NumPy array, uint8 [bytes]. It may be replaced with another array of
            the same bytes, which frees the memory.
    """

    def __init__(self, planned: PlannedShard, dtype: str) -> None:
        self.name = planned.name
        self.content: Any = None
        self._entries: dict[str, Any] = {}
        end = 0
        for name, shape in planned.tensors.items():
            begin, end = end, end + math.prod(shape) * ELEMENT_BYTES[dtype]
            self._entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        longest = len(self._header(dict.fromkeys(self._entries, _LONGEST_DIGEST)))
        self._data_begin = 8 + -(-longest // 8) * 8  # tensors begin at a multiple of 8 bytes
        self._memory = torch.empty(self._data_begin + end, dtype=torch.uint8)
        self._tensors = {
            name: self._memory[
                self._data_begin + entry["data_offsets"][0] : self._data_begin + entry["data_offsets"][1]
            ]
            .view(getattr(torch, dtype))
            .view(planned.tensors[name])
            for name, entry in self._entries.items()
        }
        self._missing = set(self._tensors)

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copies a tensor of any dtype and device to its place. Raises ValueError when it has another shape."""
        place = self._tensors[name]
        if tensor.shape != place.shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, and {tuple(place.shape)} was planned")
        place.copy_(tensor)
        self._missing.discard(name)

    def finish(self) -> None:
        """Computes the digests and writes the header, once. Raises ValueError when a tensor has not come."""
        if self.content is not None:
            return
        if self._missing:
            raise ValueError(f"{self.name} lacks {sorted(self._missing)[0]}")
        header = self._header({name: tensor_digest(tensor) for name, tensor in self._tensors.items()})
        length = self._data_begin - 8
        header = length.to_bytes(8, "little") + header.ljust(length)
        self._memory[: self._data_begin].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        self.content = self._memory.numpy()
        del self._memory, self._tensors

    def _header(self, digests: Mapping[str, int]) -> bytes:
        metadata = {"format": "pt", **write_digests(digests)}
        return json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
