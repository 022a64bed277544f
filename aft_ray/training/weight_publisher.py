"""The trainer's side of a publication: it scores the probes, writes the model directory, and sends the weights.

Invariants: the probes are scored with the very weights that are written and sent, before anything changes them; the
complete model directory of a version is never replaced, since groups may have been sampled with it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from aft_ray.training.deepspeed import gathered
from aft_ray.training.probes import choose_probes, score_probes
from aft_ray.weights.broadcast.sender import Broadcast, BroadcastFailed, BroadcastStats
from aft_ray.weights.export import write_adapter, write_model
from aft_ray.weights.publish import ObjectStore, SharedStorage, Transport
from aft_ray.weights.version_manifest import VersionManifest, stored_manifest, with_adapter, write_probes


@dataclass(frozen=True)
class CoordinatorControl:
    """The `BroadcastControl` of a run: the driver's announcements and the results go through the coordinator."""

    coordinator: Any
    timeout_s: float
    rank: int
    workers: int

    @property
    def address(self) -> str:
        """The address of this node in the Ray cluster."""
        return str(ray.util.get_node_ip_address())

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


def build_transport(config: RunConfig, coordinator: Any, rank: int) -> Transport:
    """The weight transport of a run. A run without samplers only writes the model directory."""
    if not config.needs_samplers:
        return SharedStorage()

    def broadcast() -> Transport:
        if rank == 0:
            call(coordinator.end_offers)  # those of train workers that ran before these
        return Broadcast(
            CoordinatorControl(coordinator, config.rounds.timeout_s, rank, dist.get_world_size()),
            rank,
            getattr(torch, config.model.dtype),
            config.weights.bucket_mib << 20,
            config.weights.timeout_s,
            gpu=config.training.gpus_per_worker > 0,
            gather=gathered,
        )

    transports: dict[str, Callable[[], Transport]] = {
        "checkpoint": SharedStorage,
        "object_store": ObjectStore,
        "nccl": broadcast,
        "lora": SharedStorage,  # `WeightPublisher.write` adds the adapter, which the engines load
    }
    return transports[config.weights.transport]()


@dataclass(frozen=True)
class WeightPublisher:
    """Publishes the versions of a run. Every rank has one, and calls its methods together with the other ranks."""

    config: RunConfig
    run_dir: RunDir
    tokenizer: Any
    rank: int
    transport: Transport

    def write(self, engine: Any, round_number: int, groups: Sequence[Group]) -> VersionManifest | None:
        """Writes the model directory of the round's version.

        Args:
            engine: the DeepSpeed engine with the new weights.
            groups: the groups of the round, from which probes are made.

        Returns:
            On rank 0 the manifest to publish; on the other ranks None.
        """
        chosen = choose_probes(groups, self.config.weights.probes, self.config.model.max_length)
        probes = score_probes(engine, chosen, self.tokenizer.pad_token_id or 0)
        if self.config.lora is not None:
            self._write_adapter(engine, round_number)
        model_dir = self.run_dir.model(round_number)
        with tempfile.TemporaryDirectory(prefix="aft-ray-model-", dir=self.run_dir.staging()) as scratch:
            directory = Path(scratch) / "model"
            written = write_model(
                engine.module,
                directory,
                self.config.weights.shard_mib << 20,
                self.transport.put_shard,
                self.rank,
                getattr(torch, self.config.model.dtype),
                gathered,
            )
            if self.rank != 0:
                return None
            self.tokenizer.save_pretrained(directory)
            write_probes(directory, probes)
            self.run_dir.store_directory(directory, model_dir)
        manifest = VersionManifest(
            version=round_number,
            model=self.run_dir.uri(model_dir),
            shards=tuple(written.shards),
            probes=tuple(probes),
            bytes=written.bytes,
        )
        if self.config.weights.transport == "lora":
            adapter = self.run_dir.uri(self.run_dir.adapter(round_number))
            return with_adapter(manifest, adapter, share_objects=self.config.needs_samplers)
        return self.transport.add_to_manifest(manifest, written.handles, engine.module)

    def transfer(self, engine: Any, round_number: int) -> None:
        """Sends the weights of a published version to the engines, if the transport needs the trainer for that."""
        self.transport.transfer(engine.module, round_number)

    def is_stored(self, round_number: int) -> bool:
        """Whether the version was written before, so that its round is trained again for the checkpoint alone."""
        stored = [self.run_dir.is_complete(self.run_dir.model(round_number))]
        dist.broadcast_object_list(stored, src=0)
        return stored[0]

    def read(self, version: int) -> VersionManifest:
        """The manifest of a version in the run directory."""
        return stored_manifest(self.config, self.run_dir, version)

    def _write_adapter(self, engine: Any, round_number: int) -> None:
        """Writes the adapter's directory. It comes first, so that a complete model directory always has one."""
        with tempfile.TemporaryDirectory(prefix="aft-ray-adapter-", dir=self.run_dir.staging()) as scratch:
            directory = Path(scratch) / "adapter"
            write_adapter(engine.module, directory, self.rank, gathered)
            if self.rank == 0:
                self.run_dir.store_directory(directory, self.run_dir.adapter(round_number))
