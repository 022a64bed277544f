"""The trainer's side of a publication, in which a version gets to the engines first and to storage afterwards.

    1. the probes are scored; with LoRA the adapter is written, which is small
    2. the transport makes one pass over the layers: they get to the engines, and each rank copies those that it owns
    3. each rank writes its layers into the model directory, in the background (`model_writer.py`)

Invariants: the probes are scored with the very weights that are sent and written, before anything changes them; the
complete model directory of a version is never replaced, since groups may have been sampled with it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from aft_ray.config.run import RunConfig
from aft_ray.coordination.broadcast_group import BroadcastGroup
from aft_ray.coordination.coordinator import call
from aft_ray.storage.records import Group
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.response_end import response_ends
from aft_ray.training.deepspeed import gathered
from aft_ray.training.publication.model_writer import ModelWriter, Writing
from aft_ray.training.publication.probes import choose_probes, score_probes
from aft_ray.weights.broadcast.sender import Broadcast, BroadcastFailed, BroadcastStats
from aft_ray.weights.export import LayerPass, describe_model, write_adapter
from aft_ray.weights.publish import ObjectStore, Publication, SharedStorage, Transport, WithoutEngines
from aft_ray.weights.version_manifest import VersionManifest, stored_manifest, with_adapter, write_probes


@dataclass(frozen=True)
class CoordinatorControl:
    """The `BroadcastControl` and `ObjectControl` of a run, through the coordinator.

    Attributes:
        timeout_s: deadline of the driver's announcement.
        workers_timeout_s: deadline of a wait for the other train workers.
    """

    coordinator: Any
    timeout_s: float
    rank: int
    workers: int
    workers_timeout_s: float

    @property
    def address(self) -> str:
        """The address of this node in the Ray cluster."""
        return str(ray.util.get_node_ip_address())

    def is_requested(self, version: int) -> bool:
        """Whether the driver asks for a version, or has asked for a later one. Raises PeerFailed."""
        return bool(call(self.coordinator.is_requested, version))

    def wait_group(self, version: int) -> BroadcastGroup | None:
        """The group that the driver announced; None when there is no broadcast of this version. Raises PeerFailed."""
        waiting = version, self.rank, self.workers, self.timeout_s
        group: BroadcastGroup | None = call(self.coordinator.wait_broadcast, *waiting)
        return group

    def report(self, version: int, result: BroadcastStats | BroadcastFailed) -> None:
        """Posts the event `streamed` or `stream_failed`."""
        if isinstance(result, BroadcastFailed):
            print(f"{result}; the engines take the model directory", file=sys.stderr, flush=True)
            call(self.coordinator.post, {"event": "stream_failed", "version": version, "reason": str(result)})
        else:
            call(self.coordinator.post, {"event": "streamed", "version": version, **asdict(result)})

    def gather_objects(self, version: int, objects: Mapping[str, Any]) -> dict[str, Any] | None:
        """The objects of all train workers, on rank 0. Raises PeerFailed.

        References travel as arguments and values of calls: pickled in any other way, Ray would never free the objects.
        """
        call(self.coordinator.give_objects, version, self.rank, dict(objects))
        if self.rank != 0:
            return None
        taken: dict[str, Any] = call(self.coordinator.take_objects, version, self.workers, self.workers_timeout_s)
        return taken


def build_transport(config: RunConfig, coordinator: Any, rank: int) -> Transport:
    """The weight transport of a run."""
    control = CoordinatorControl(
        coordinator, config.rounds.timeout_s, rank, dist.get_world_size(), config.training.timeout_s
    )

    def broadcast() -> Transport:
        bucket_bytes, gpu = config.weights.bucket_mib << 20, config.training.gpus_per_worker > 0
        return Broadcast(control, bucket_bytes, config.weights.timeout_s, gpu)

    transports: dict[str, Callable[[], Transport]] = {
        "checkpoint": SharedStorage,
        "object_store": partial(ObjectStore, control),
        "nccl": broadcast,
        "lora": WithoutEngines,  # `WeightPublisher` adds the adapter, which the engines load
    }
    return transports[config.weights.transport]() if config.needs_samplers else WithoutEngines()


@dataclass(frozen=True, slots=True)
class Published:
    """A version that training has published.

    Attributes:
        bytes: size of the weights; 0 when the version was published before.
        writing: its model directory, which is being written; None when it was complete before.
    """

    bytes: int
    writing: Writing | None


class WeightPublisher:
    """Publishes the versions of a run. Every rank has one, and calls its methods together with the other ranks."""

    def __init__(
        self, config: RunConfig, run_dir: RunDir, tokenizer: Any, rank: int, transport: Transport, coordinator: Any
    ) -> None:
        self._config, self._run_dir, self._tokenizer, self._rank = config, run_dir, tokenizer, rank
        self._transport, self._coordinator = transport, coordinator
        self._end_ids = response_ends(config, tokenizer).ids
        self._writer = ModelWriter(run_dir, rank, config.training.timeout_s, coordinator)

    def publish(self, engine: Any, round_number: int, groups: Sequence[Group]) -> Published:
        """Brings the weights of a round to the engines, and begins to write them into the run directory.

        Waits for the version before, until its directory is durable. A version whose directory is complete already,
        from before a restart, is only offered: its round is trained again for the training state alone.

        Args:
            engine: the DeepSpeed engine with the new weights.
            groups: those of the round from which probes are made, the same on every rank.

        Raises:
            ModelWriteFailed: the version before could not be written.
        """
        if self._is_stored(round_number):
            if self._rank == 0:
                self._offer(self.read(round_number))
            return Published(0, None)
        chosen = choose_probes(groups, self._config.weights.probes, self._config.model.max_length)
        probes = score_probes(engine, chosen)
        self._writer.wait()
        if self._config.lora is not None:
            self._write_adapter(engine, round_number)
        layers = LayerPass(
            engine.module,
            getattr(torch, self._config.model.dtype),
            self._config.weights.shard_mib << 20,
            self._rank,
            dist.get_world_size(),
            gathered,
        )
        path = self._run_dir.model(round_number)
        manifest = VersionManifest(
            version=round_number,
            model=self._run_dir.uri(path),
            shards=layers.plan.names,
            probes=tuple(probes),
            bytes=layers.plan.bytes,
            durable=False,
        )
        if self._config.weights.transport == "lora" and self._rank == 0:
            adapter = self._run_dir.uri(self._run_dir.adapter(round_number))
            manifest = with_adapter(manifest, adapter, share_objects=self._config.needs_samplers)

        def describe(directory: Path) -> None:
            describe_model(layers.module, directory, layers.plan, self._end_ids)
            self._tokenizer.save_pretrained(directory)
            write_probes(directory, probes)

        def on_durable() -> None:
            call(self._coordinator.set_durable, round_number)

        store = partial(self._writer.start, round_number, path, layers.files, describe, on_durable)
        self._transport.deliver(Publication(manifest, layers, self._offer, store))
        return Published(manifest.bytes, self._writer.writing)

    def finish(self) -> None:
        """Sends the weights to engines that were busy when the version was published, if there are any."""
        self._transport.finish()

    def wait_durable(self) -> None:
        """Waits until the model directory of the last version is durable. Raises what `Writing.wait` raises."""
        self._writer.wait()

    def _offer(self, manifest: VersionManifest) -> None:
        """Offers a version to the engines, on rank 0."""
        if self._rank == 0:
            call(self._coordinator.publish, manifest)

    def _is_stored(self, round_number: int) -> bool:
        """Whether the model directory of a version is complete. All ranks call this together."""
        stored = [self._run_dir.is_complete(self._run_dir.model(round_number))]
        dist.broadcast_object_list(stored, src=0)
        return stored[0]

    def read(self, version: int) -> VersionManifest:
        """The manifest of a version in the run directory."""
        return stored_manifest(self._config, self._run_dir, version)

    def _write_adapter(self, engine: Any, round_number: int) -> None:
        """Writes the adapter's directory. It comes first, so that a complete model directory always has one."""
        with tempfile.TemporaryDirectory(prefix="aft-ray-adapter-", dir=self._run_dir.staging()) as scratch:
            directory = Path(scratch) / "adapter"
            write_adapter(engine.module, directory, self._rank, gathered)
            if self._rank == 0:
                self._run_dir.store_directory(directory, self._run_dir.adapter(round_number))
