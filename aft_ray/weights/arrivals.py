"""What has arrived of a version in one process of an engine, compared with what the sender said that it sent.

Invariant: nothing is taken for granted. A tensor that arrived without being announced, one that was announced and did
not arrive, one that arrived twice and one whose content changed on the way are all found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from aft_ray.weights.broadcast.buckets import DIGESTS
from aft_ray.weights.digests import device_digest


class Arrivals:
    """The digests of tensors as they arrive, and those that their sender computed."""

    def __init__(self) -> None:
        # Digests stay on the device until they are compared, so that no tensor is waited for.
        self._arrived: list[tuple[str, torch.Tensor]] = []
        self._announced: dict[str, int] = {}
        self._order: list[str] = []

    def announce(self, digests: Mapping[str, int]) -> None:
        """Takes the digests that the sender computed, by the names of the tensors."""
        self._announced |= digests

    def announce_order(self, names: Iterable[str]) -> None:
        """Takes the names of the tensors of a broadcast. Their digests follow as the last tensor of the stream."""
        self._order = [name for name in names if name != DIGESTS]

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, without the digests at the end of a broadcast; notes the digest of each one."""
        for name, tensor in tensors:
            if name == DIGESTS:
                digests = tensor.clone().view(torch.int64).tolist()
                self.announce(dict(zip(self._order, digests, strict=True)))
            else:
                self._arrived.append((name, device_digest(tensor)))
                yield name, tensor

    def problem(self) -> str:
        """The first thing that is wrong, as a sentence; empty when everything arrived as it was sent.

        Files of other programs have no digests. If nothing was announced, nothing is compared.
        """
        if not self._announced and not self._order:
            return ""
        names = [name for name, _ in self._arrived]
        digests = torch.stack([digest for _, digest in self._arrived]).tolist() if names else []
        for name, digest in zip(names, digests, strict=True):
            if name not in self._announced:
                return f"the tensor {name} arrived, of which the trainer sent no digest"
            if digest != self._announced[name]:
                return f"the tensor {name} is not what the trainer sent, since its digest differs"
        arrived = set(names)
        if missing := [name for name in (*self._announced, *self._order) if name not in arrived]:
            return f"the tensor {missing[0]} did not arrive"
        if len(names) > len(arrived):
            twice = next(name for name in names if names.count(name) > 1)
            return f"the tensor {twice} arrived twice"
        return ""
