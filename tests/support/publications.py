"""Publishes the weights of a module through a transport, as a train worker does, without a run."""

from pathlib import Path

import torch

from aft_ray.storage.directories import DirectoryStore
from aft_ray.weights.export import LayerPass, already_whole, describe_model, store_file
from aft_ray.weights.publish import Publication
from aft_ray.weights.version_manifest import VersionManifest


class Written:
    """A model directory that is complete as soon as it is begun."""

    def wait(self) -> float:
        return 0.0


def deliver(
    transport, module, directory, version=1, probes=(), shard_bytes=40_000, offered=None, rank=0, ranks=1,
    gather=already_whole, dtype=torch.float32,
) -> list[VersionManifest]:  # fmt: skip
    """Delivers a version and writes its directory.

    Args:
        offered: is called with each manifest at the moment when it is offered.

    Returns:
        The manifests that were offered.
    """
    layers = LayerPass(module, dtype, shard_bytes, rank, ranks, gather)
    manifests = []

    def offer(manifest: VersionManifest) -> None:
        if rank == 0:
            manifests.append(manifest)
            if offered is not None:
                offered(manifest)

    def store() -> Written:
        Path(directory).mkdir(parents=True, exist_ok=True)
        files = DirectoryStore(directory)
        written = []
        for file in layers.files:
            file.finish()
            written.append(store_file(files, "", file.name, file.content))
        if rank == 0:
            describe_model(module, Path(directory), layers.plan)
        if ranks == 1:
            files.write_manifest("", written)
        return Written()

    manifest = VersionManifest(
        version, str(directory), layers.plan.names, tuple(probes), bytes=layers.plan.bytes, durable=False
    )
    transport.deliver(Publication(manifest, layers, offer, store))
    transport.finish()
    return manifests
