"""The trainer's end of a publication: one class for each way that weights take to the engines.

Invariant: a transport only adds a faster way. The model directory of a round is written whatever it does, and an engine
that it does not reach takes that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from aft_ray.coordination.broadcast_group import BroadcastFailed, BroadcastGroup
from aft_ray.weights.broadcast.sender import BroadcastStats, GlooSender, NcclSender, Sender, stream
from aft_ray.weights.export import layout_of, live_parameters
from aft_ray.weights.receive_plan import FromDirectory, FromObjects
from aft_ray.weights.version_manifest import VersionManifest


class Transport(Protocol):
    """Every rank has one. `offer` is called on rank 0 alone, the others on all ranks together."""

    def offer(self, shard: Path) -> Any:
        """Offers a shard file that was just written; returns its handle, None for none."""
        ...

    def describe(self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module) -> VersionManifest:
        """The publication with the way that engines are to take."""
        ...

    def deliver(self, module: torch.nn.Module, version: int) -> None:
        """Hands the weights over, once the version was published, where that takes the trainer's part."""
        ...


class SharedStorage:
    """Engines read the model directory from shared storage."""

    def offer(self, shard: Path) -> None:
        del shard

    def describe(self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module) -> VersionManifest:
        del handles, module
        return manifest

    def deliver(self, module: torch.nn.Module, version: int) -> None:
        del module, version


class ObjectStore(SharedStorage):
    """Shards go through Ray's object store: shared memory here, one transfer a node elsewhere."""

    def offer(self, shard: Path) -> Any:
        import ray

        return ray.put(np.fromfile(shard, dtype=np.uint8))

    def describe(self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module) -> VersionManifest:
        del module
        directory = FromDirectory(manifest.model, manifest.shards)
        return replace(manifest, receive_plan=FromObjects(tuple(handles), directory))


class Meetings(Protocol):
    """How the trainer learns of a meeting, and tells of it."""

    def invitation(self, version: int) -> BroadcastGroup | None:
        """Waits until the conductor invites to a version, or goes on without it (None). The same on all ranks."""
        ...

    def open_table(self, version: int, port: int) -> None:
        """Says where rank 0 waits for the engines."""
        ...

    def ended(self, version: int, how: BroadcastStats | BroadcastFailed) -> None: ...


class Broadcast(SharedStorage):
    """Rank 0 streams its live weights to all engines at once, at a meeting: NCCL between GPUs, gloo without.

    What comes after the trainer's part (a late engine, a resumed run) is served by the model directory.
    """

    def __init__(
        self, meetings: Meetings, rank: int, dtype: torch.dtype, bucket_bytes: int, timeout_s: float, gpu: bool
    ) -> None:
        self._meetings, self._rank, self._dtype = meetings, rank, dtype
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._make_hub: type[GlooSender] | type[NcclSender] = NcclSender if gpu else GlooSender
        self._hub: Sender | None = None

    def describe(self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module) -> VersionManifest:
        del handles
        return replace(manifest, broadcast=layout_of(module, self._dtype, self._bucket_bytes))

    def deliver(self, module: torch.nn.Module, version: int) -> None:
        """Takes part in the version's meeting. One that fails is told of, and harms nothing here."""
        invitation = self._meetings.invitation(version)
        if invitation is None or not invitation.guests:
            return
        tensors = live_parameters(module, keep=self._rank == 0)
        try:
            if self._rank == 0:
                layout = layout_of(module, self._dtype, self._bucket_bytes)
                self._close()
                self._hub = self._make_hub(self._timeout_s)
                self._meetings.open_table(version, self._hub.port)
                self._meetings.ended(version, stream(tensors, layout, self._hub, invitation, self._timeout_s))
        except BroadcastFailed as error:
            self._close()  # so that no engine waits for what will not come
            self._meetings.ended(version, error)
        finally:
            # Gathering is a collective: every rank goes through it to the end, whatever became of the stream.
            for _ in tensors:
                pass

    def _close(self) -> None:
        """Ends the last group. Not at once when all is sent: what is under way still needs it."""
        if self._hub is not None:
            self._hub.destroy()
            self._hub = None
