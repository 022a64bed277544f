"""How the trainer publishes a version: the protocol of weight transports, and those that need no broadcast.

`weights/broadcast/sender.py` has the transport that sends live weights. A version is *offered* when engines may begin
to take it, and *durable* when its model directory has its manifest. Invariants: the layers are gathered in one pass; a
transport only adds a faster way to the engines, and the directory of every version is written by all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from aft_ray.weights.export import LayerPass
from aft_ray.weights.receive_plan import FromDirectory, FromObjects
from aft_ray.weights.version_manifest import VersionManifest


class Writing(Protocol):
    """A model directory that is being written in the background."""

    def wait(self) -> float:
        """Waits until the directory is durable. Returns the seconds that writing took; raises why it failed."""
        ...


@dataclass(frozen=True, slots=True)
class Publication:
    """A version that is being published, on one rank.

    Attributes:
        manifest: the manifest of the version, without anything that a transport adds.
        layers: the pass over its layers, which a transport makes exactly once.
        offer: offers the version to the engines, on rank 0; does nothing on the other ranks.
        store: begins to write the model directory with the other ranks, once the pass has been made.
    """

    manifest: VersionManifest
    layers: LayerPass
    offer: Callable[[VersionManifest], None]
    store: Callable[[], Writing]


class Transport(Protocol):
    """How the weights of a version get to the engines. Every train worker has one."""

    def deliver(self, publication: Publication) -> None:
        """Makes the pass, offers the version and begins to store it, in the order that the transport needs.

        All ranks call it together. When it returns, each rank has copied the layers that it owns to CPU memory, so that
        training may go on.
        """
        ...

    def finish(self) -> None:
        """Ends a delivery that waits for the engines, when everything else has been begun. All ranks call it together.

        Most transports have nothing left to do.
        """
        return


class WithoutEngines(Transport):
    """The way of a run in which no engine takes whole weights: it has no engines, or they take adapters."""

    def deliver(self, publication: Publication) -> None:
        """Offers the version at once."""
        publication.offer(publication.manifest)
        publication.layers.run()
        publication.store()


class SharedStorage(Transport):
    """The transport `checkpoint`: engines read the model directory, so that it must be durable before the offer."""

    def deliver(self, publication: Publication) -> None:
        """Writes the directory and then offers the version."""
        publication.layers.run()
        publication.store().wait()
        publication.offer(replace(publication.manifest, durable=True))


class ObjectControl(Protocol):
    """How the train workers bring together the handles of their objects."""

    def gather_objects(self, version: int, objects: Mapping[str, Any]) -> dict[str, Any] | None:
        """The objects of all ranks, on rank 0; None on the others. All ranks call it together.

        Args:
            objects: this rank's Ray object references by file name.
        """
        ...


class ObjectStore(Transport):
    """The transport `object_store`: engines read the files from Ray's object store; a node receives them once."""

    def __init__(self, control: ObjectControl) -> None:
        self._control = control

    def deliver(self, publication: Publication) -> None:
        """Each rank copies its files into the object store; then the version is offered."""
        import ray

        publication.layers.run()
        objects = {}
        for file in publication.layers.files:
            file.finish()
            objects[file.name] = ray.put(file.content)
            file.content = ray.get(objects[file.name])  # mapped from the object store: there is no second copy
        manifest = publication.manifest
        of_all = self._control.gather_objects(manifest.version, objects)
        if of_all is not None:
            directory = FromDirectory(manifest.model, manifest.shards, manifest.durable)
            plan = FromObjects(tuple(of_all[name] for name in manifest.shards), directory)
            publication.offer(replace(manifest, receive_plan=plan))
        publication.store()
