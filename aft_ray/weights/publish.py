"""How the trainer publishes a version: the protocol of weight transports, and the two that send files.

`weights/broadcast/sender.py` has the transport that sends live weights. Invariant: a transport only adds a faster way
to the engines. The model directory of a round is always written, and an engine that the transport does not reach reads
that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from aft_ray.weights.receive_plan import FromDirectory, FromObjects
from aft_ray.weights.version_manifest import VersionManifest


class Transport(Protocol):
    """How the weights of a version get to the engines. Every train worker has one."""

    def put_shard(self, shard: Path) -> Any:
        """Takes a shard file that was just written; returns a handle of it, None for none. Called on rank 0."""
        ...

    def add_to_manifest(
        self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module
    ) -> VersionManifest:
        """Adds to a manifest how the engines are to receive the weights. Called on rank 0, before it is published."""
        ...

    def transfer(self, module: torch.nn.Module, version: int) -> None:
        """Sends the weights of a published version, if the trainer must. Called on all ranks together."""
        ...


class SharedStorage:
    """The transport `checkpoint`: engines read the model directory from shared storage."""

    def put_shard(self, shard: Path) -> Any:
        """Does nothing."""
        del shard

    def add_to_manifest(
        self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module
    ) -> VersionManifest:
        """The manifest as it is."""
        del handles, module
        return manifest

    def transfer(self, module: torch.nn.Module, version: int) -> None:
        """Does nothing."""
        del module, version


class ObjectStore(SharedStorage):
    """The transport `object_store`: engines read the shards from Ray's object store; a node receives them once."""

    def put_shard(self, shard: Path) -> Any:
        """Copies the file into the object store; returns the reference."""
        import ray

        return ray.put(np.fromfile(shard, dtype=np.uint8))

    def add_to_manifest(
        self, manifest: VersionManifest, handles: list[Any], module: torch.nn.Module
    ) -> VersionManifest:
        """Adds the references."""
        del module
        directory = FromDirectory(manifest.model, manifest.shards)
        return replace(manifest, receive_plan=FromObjects(tuple(handles), directory))
