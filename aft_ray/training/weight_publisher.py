"""The trainer's side of a publication: probes scored, the model directory made whole, the weights handed over.

Invariants: the probes are scored by the weights that are written and streamed, before anything changes them; a version
whose model directory is complete stays what it is, since groups may have been sampled with it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from aft_ray.cluster.connect import needs_samplers
from aft_ray.config.run import RunConfig
from aft_ray.coordination.broadcast_group import BroadcastFailed, BroadcastGroup, StoreAddress
from aft_ray.coordination.coordinator import call
from aft_ray.objectives import build_objective
from aft_ray.storage.records import Group
from aft_ray.storage.run_dir import RunDir
from aft_ray.training import step
from aft_ray.training.collate import collate
from aft_ray.weights.adapter import stored_manifest, with_adapter, write_adapter
from aft_ray.weights.broadcast.sender import BroadcastStats
from aft_ray.weights.export import write_model
from aft_ray.weights.publish import Broadcast, ObjectStore, SharedStorage, Transport
from aft_ray.weights.version_manifest import Probe, VersionManifest, write_probes


@dataclass(frozen=True)
class CoordinatorBroadcasts:
    """A trainer's meetings, arranged on the board."""

    coordinator: Any
    timeout_s: float

    def invitation(self, version: int) -> BroadcastGroup | None:
        invitation: BroadcastGroup | None = call(self.coordinator.wait_invitation, version, self.timeout_s)
        return invitation

    def open_table(self, version: int, port: int) -> None:
        call(self.coordinator.open_table, version, StoreAddress(ray.util.get_node_ip_address(), port))

    def ended(self, version: int, how: BroadcastStats | BroadcastFailed) -> None:
        if isinstance(how, BroadcastFailed):
            print(f"{how}; the engines take the model directory", file=sys.stderr, flush=True)
            call(self.coordinator.post, {"event": "stream_failed", "version": version, "reason": str(how)})
        else:
            call(self.coordinator.post, {"event": "streamed", "version": version, **asdict(how)})


def build_transport(config: RunConfig, coordinator: Any, rank: int) -> Transport:
    """The transport of a run. Nothing is offered where nobody takes it."""
    if not needs_samplers(config):
        return SharedStorage()

    def broadcast() -> Transport:
        return Broadcast(
            CoordinatorBroadcasts(coordinator, config.rounds.timeout_s),
            rank,
            getattr(torch, config.model.dtype),
            config.weights.bucket_mib << 20,
            config.weights.timeout_s,
            gpu=config.training.gpus_per_worker > 0,
        )

    transports: dict[str, Callable[[], Transport]] = {
        "checkpoint": SharedStorage,
        "object_store": ObjectStore,
        "nccl": broadcast,
        "lora": SharedStorage,  # what engines take is the adapter; see `WeightPublisher.write`
    }
    return transports[config.weights.transport]()


@dataclass(frozen=True)
class WeightPublisher:
    """What one rank needs to publish the weights that it trains a share of."""

    config: RunConfig
    run_dir: RunDir
    tokenizer: Any
    rank: int
    transport: Transport

    def deliver(self, engine: Any, round_number: int) -> None:
        """Hands a published version to the engines, where that takes the trainer. All ranks call it together."""
        self.transport.deliver(engine.module, round_number)

    def write(self, engine: Any, round_number: int, groups: Sequence[Group]) -> VersionManifest | None:
        """Makes the round's model directory. All ranks call it together; rank 0 gets what it may offer on the board."""
        probes = self._probes(engine, self._probe_texts(groups))
        if self.config.lora is not None:
            self._write_adapter(engine, round_number)
        model_dir = self.run_dir.model(round_number)
        with tempfile.TemporaryDirectory(prefix="aft-ray-model-", dir=self.run_dir.staging()) as scratch:
            directory = Path(scratch) / "model"
            written = write_model(
                engine.module,
                directory,
                self.config.weights.shard_mib << 20,
                self.transport.offer,
                self.rank,
                getattr(torch, self.config.model.dtype),
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
            return with_adapter(manifest, adapter, offered=needs_samplers(self.config))
        return self.transport.describe(manifest, written.handles, engine.module)

    def is_stored(self, round_number: int) -> bool:
        """Whether the round was published already, and is trained again because its checkpoint was lost."""
        stored = [self.run_dir.is_complete(self.run_dir.model(round_number))]
        dist.broadcast_object_list(stored, src=0)
        return stored[0]

    def read(self, version: int) -> VersionManifest:
        """The publication of a version that is on disk."""
        return stored_manifest(self.config, self.run_dir, version)

    def _write_adapter(self, engine: Any, round_number: int) -> None:
        """Before the model directory, which is thus never there without it."""
        with tempfile.TemporaryDirectory(prefix="aft-ray-adapter-", dir=self.run_dir.staging()) as scratch:
            directory = Path(scratch) / "adapter"
            write_adapter(engine.module, directory, self.rank)
            if self.rank == 0:
                self.run_dir.store_directory(directory, self.run_dir.adapter(round_number))

    def _probe_texts(self, groups: Sequence[Group]) -> list[Group]:
        """Sequences of this round to prove its publication by, each as a group whose reference is the response."""
        texts = [
            replace(group, reference_token_ids=group.candidates[0].token_ids, candidates=[])
            if group.candidates
            else group
            for group in groups
        ]
        # The engine that scores a probe must have room to answer with one more token.
        room = self.config.model.max_length
        fitting = [t for t in texts if len(t.prompt_token_ids) + len(t.reference_token_ids) < room]
        return fitting[: self.config.weights.probes]

    def _probes(self, engine: Any, texts: list[Group]) -> list[Probe]:
        """The probes under the new weights. Every rank scores them, since ZeRO-3 gathers weights on all."""
        batch = collate(texts, build_objective("vft"), self.tokenizer.pad_token_id or 0).to(engine.device)
        engine.eval()
        with torch.no_grad():
            scores = step.score_groups(engine, batch).reference_scores
        engine.train()
        assert scores is not None
        return [
            Probe(text.prompt_token_ids, text.reference_token_ids, score)
            for text, score in zip(texts, scores.tolist(), strict=True)
        ]
