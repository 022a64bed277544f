"""Shards reach an engine over the object store, and from disk when the object store has lost them."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from transformers import AutoModelForCausalLM

from aft_ray.storage.run_dir import MANIFEST
from aft_ray.weights.publish import ObjectStore, SharedStorage
from aft_ray.weights.version_manifest import VersionManifest

pytestmark = pytest.mark.usefixtures("ray_here")


class OneRank:
    """The control of a trainer of one rank."""

    def gather_objects(self, version, objects):
        return dict(objects)


@ray.remote(num_cpus=0)
class Trainer:
    """Owns the objects that it publishes, as a train worker does."""

    def publish(
        self,
        deliver: Callable[..., list[VersionManifest]],
        source: str,
        directory: str,
        transport: str,
        shard_bytes: int,
    ) -> list[VersionManifest]:
        used = SharedStorage() if transport == "checkpoint" else ObjectStore(OneRank())
        model = AutoModelForCausalLM.from_pretrained(source)
        return deliver(used, model, directory, shard_bytes=shard_bytes, offered=self.note_directory)

    def note_directory(self, manifest: VersionManifest) -> None:
        self.complete_when_offered = (Path(manifest.model) / MANIFEST).exists()

    def was_complete_when_offered(self) -> bool:
        return self.complete_when_offered


def publish(model, directory, transport, shard_bytes=40_000):
    import publications

    ray.cloudpickle.register_pickle_by_value(publications)  # actors cannot import modules of the tests
    trainer = Trainer.remote()
    published = trainer.publish.remote(publications.deliver, str(model), str(directory), transport, shard_bytes)
    (manifest,) = ray.get(published, timeout=120)
    return trainer, manifest


def contents(manifest) -> tuple[list[str], list[bytes]]:
    """The paths that the engine is given, and the content of each file at that moment."""
    paths, data, methods = [], [], []
    for call in manifest.calls(30):
        methods.append(call.method)
        if call.method == "load_weights_file":
            paths.append(call.args[0])
            data.append(Path(paths[-1]).read_bytes())
    assert methods == ["begin_weights", *["load_weights_file"] * len(manifest.shards), "finish_weights"]
    return paths, data


def on_disk(manifest) -> list[bytes]:
    return [(Path(manifest.model) / name).read_bytes() for name in manifest.shards]


def test_shards_come_over_the_object_store_one_at_a_time_and_leave_nothing(tiny_model, tmp_path):
    trainer, manifest = publish(tiny_model, tmp_path / "model", "object_store")
    assert not ray.get(trainer.was_complete_when_offered.remote())
    paths, data = contents(manifest)
    assert data == on_disk(manifest)
    assert len(paths) > 3
    assert len(set(paths)) == 1
    assert not Path(paths[0]).is_relative_to(tmp_path)
    assert not Path(paths[0]).parent.exists()


def test_shards_come_from_shared_storage(tiny_model, tmp_path):
    trainer, manifest = publish(tiny_model, tmp_path / "model", "checkpoint")
    assert manifest.receive_plan is None
    assert ray.get(trainer.was_complete_when_offered.remote())
    paths, data = contents(manifest)
    assert data == on_disk(manifest)
    assert paths == [str(tmp_path / "model" / name) for name in manifest.shards]


def test_shards_whose_owner_died_come_from_disk(tiny_model, tmp_path):
    # In one shard: smaller ones travel inside their references.
    trainer, manifest = publish(tiny_model, tmp_path / "model", "object_store", 1 << 30)
    ray.kill(trainer)
    deadline = time.monotonic() + 60
    while True:  # until Ray has noticed
        (path,), data = contents(manifest)
        assert data == on_disk(manifest)
        if path == str(tmp_path / "model" / manifest.shards[0]):
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_engine_that_reads_a_directory_waits_until_it_is_complete(tiny_model, tmp_path):
    _trainer, manifest = publish(tiny_model, tmp_path / "model", "checkpoint")
    (tmp_path / "model" / MANIFEST).rename(tmp_path / "later")
    early = replace(manifest, durable=False)
    with pytest.raises(TimeoutError, match=f"have not written {tmp_path}/model completely in 1 s"):
        next(early.calls(1))
    completing = threading.Timer(0.5, (tmp_path / "later").rename, [tmp_path / "model" / MANIFEST])
    completing.start()
    assert contents(early)[1] == on_disk(manifest)
    completing.join()
