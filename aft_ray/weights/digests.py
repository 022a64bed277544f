"""Digests of tensors, by which trainer and engines agree that the same weights were sent and received.

A digest is computed on the tensor's own device, in about the time that a few reads of its memory take. It is no
cryptographic hash: it finds damage and mistakes, and no forgery. Invariant: the digest depends on the bits of the
elements in their logical order, on the dtype and on the shape, and on nothing else. The device, the strides and the
size of the steps in which it is computed do not change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np
import torch

# Where the metadata of a safetensors file has the digests of its tensors: a JSON object from name to digest.
METADATA_KEY = "digests"

# Words of 32 bits in a row. The sum of a row weighs each word by its place in the row. Part of the digest's definition.
_ROW = 1 << 14
# Rows that are computed at once. On a CPU the products stay in its cache; a GPU needs more work in each kernel.
_ROWS_AT_ONCE = {"cpu": 4, "cuda": 256}
# Any odd number whose powers differ: the weight of a row is a power of it.
_BASE = 0x9E3779B97F4A7C15


def tensor_digest(tensor: torch.Tensor) -> int:
    """The digest of a tensor of any shape and dtype: a signed 64-bit integer.

    One changed element always changes it. Any other change, such as two swapped elements or a transposition, leaves it
    the same with a chance of less than one in 2^30. A tensor that is not contiguous is copied first.
    """
    return int(device_digest(tensor).item())


def device_digest(tensor: torch.Tensor) -> torch.Tensor:
    """The same as an int64 tensor of shape [] on the tensor's device, which no caller waits for."""
    words = _words(tensor.detach())
    row_weights = _row_weights(words.device)
    whole = len(words) // _ROW
    rows = words[: whole * _ROW].view(whole, _ROW)
    step = _ROWS_AT_ONCE.get(words.device.type, 256)
    # A product of int32 and int64 is int64. Overflow drops the high bits, on every device alike.
    sums = [(rows[first : first + step] * row_weights).sum(1) for first in range(0, whole, step)]
    tail = words[whole * _ROW :]
    sums.append((tail * row_weights[: len(tail)]).sum().unsqueeze(0))
    row_sums = torch.cat(sums)
    return (row_sums * _powers(len(row_sums), words.device)).sum() + _kind(tensor)


def write_digests(digests: Mapping[str, int]) -> dict[str, str]:
    """The metadata of a safetensors file with the digests of its tensors by name."""
    return {METADATA_KEY: json.dumps(dict(digests))}


def read_digests(metadata: Mapping[str, str] | None) -> dict[str, int]:
    """The digests in the metadata of a safetensors file; empty when it has none, as files of other programs."""
    return {str(name): int(digest) for name, digest in json.loads((metadata or {}).get(METADATA_KEY, "{}")).items()}


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in the logical order of its elements, as int32 of shape [words], filled up with zeros."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    if rest := content.numel() % 4:
        content = torch.cat([content, content.new_zeros(4 - rest)])
    elif content.storage_offset() % 4:
        content = content.clone()
    return content.view(torch.int32)


def _kind(tensor: torch.Tensor) -> int:
    """A number for the dtype and the shape of a tensor."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return int.from_bytes(hashlib.blake2b(kind, digest_size=8).digest(), "little", signed=True)


@cache
def _row_weights(device: torch.device) -> torch.Tensor:
    """The weights of the words of a row: int64 [_ROW], odd, and without any pattern (SplitMix64)."""
    weights = np.arange(1, _ROW + 1, dtype=np.uint64) * np.uint64(_BASE)
    weights = (weights ^ (weights >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    weights = (weights ^ (weights >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _on_device((weights ^ (weights >> np.uint64(31))) | np.uint64(1), device)


@lru_cache(maxsize=64)  # a model has tensors of a few sizes
def _powers(count: int, device: torch.device) -> torch.Tensor:
    """The first powers of the base, modulo 2^64: int64 [count]."""
    powers = np.ones(count, dtype=np.uint64)
    have = 1
    while have < count:  # the known powers times the next one are as many new ones
        new = min(have, count - have)
        powers[have : have + new] = powers[:new] * np.uint64(pow(_BASE, have, 1 << 64))
        have += new
    return _on_device(powers, device)


def _on_device(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """The bits of uint64 numbers as int64, for use by every stream of the device."""
    tensor = torch.from_numpy(numbers.view(np.int64)).to(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return tensor
