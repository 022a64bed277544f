"""One of two ranks that write and broadcast a model of DeepSpeed: `publishing_main.py RANK PORT MODEL OUTPUT STAGE`.

Each rank writes the names and sizes of its files to OUTPUT/files-RANK.json.
"""

import json
import os
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from publications import deliver
from safetensors.torch import load_file

from aft_ray.config.run import ModelConfig, TrainingConfig
from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.storage.run_dir import RunDir, RunDirError
from aft_ray.training import deepspeed
from aft_ray.training.publication import model_writer
from aft_ray.weights.broadcast.buckets import DIGESTS, receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup
from aft_ray.weights.broadcast.rendezvous import connect_store
from aft_ray.weights.broadcast.sender import Broadcast, BroadcastFailed
from aft_ray.weights.export import LayerPass, describe_model
from aft_ray.weights.receive_plan import BroadcastOffer


def keep_nothing_gathered(training, dtype, ds_config=deepspeed.ds_config):
    """A config that also partitions small parameters. By default DeepSpeed keeps them whole, here the whole model."""
    config = ds_config(training, dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


class Control:
    """The control of two broadcasts: an engine, in a thread of rank 0, receives version 1; none joins version 2."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self.manifests, self.received, self.results = {}, {}, {}
        self.threads: list[threading.Thread] = []

    def is_requested(self, version: int) -> bool:
        return version == 2  # version 1 comes while the engines are busy: its broadcast is a second pass

    def wait_group(self, version: int) -> BroadcastGroup:
        if version == 1 and version in self.manifests:  # rank 0
            self.threads.append(threading.Thread(target=self.engine, args=(self.manifests[version].broadcast,)))
            self.threads[0].start()
        return BroadcastGroup(version, (Receiver("sampler 0", 1),))

    def engine(self, offer: BroadcastOffer) -> None:
        group = GlooGroup(connect_store(offer.address, offer.port, 60), 1, 2, 60)
        receive(offer.layout, group, self.received.update, torch.device("cpu"))

    def report(self, version: int, result: object) -> None:
        self.results[version] = result


def stream(module: torch.nn.Module, rank: int, output: Path) -> None:
    """Each of two broadcasts writes the model directory in the same pass, whether engines join or not."""
    control = Control()
    for version, timeout_s in ((1, 60), (2, 2)):
        deliver(
            Broadcast(control, 40_000, timeout_s, False),
            module,
            output / str(version),
            version,
            offered=lambda manifest: control.manifests.update({manifest.version: manifest}),
            rank=rank,
            ranks=2,
            gather=deepspeed.gathered,
        )
        dist.barrier()
    if rank == 0:
        control.threads[0].join()
        written, second = {}, {}
        for file in (output / "1").glob("*.safetensors"):
            written |= load_file(file)
            second |= load_file(output / "2" / file.name)
        assert written.keys() == second.keys()
        assert all(torch.equal(written[name], second[name]) for name in written)
        control.received.pop(DIGESTS)
        assert written.keys() == control.received.keys()
        assert all(torch.equal(written[name], control.received[name]) for name in written)
        assert control.results[1].bytes == sum(tensor.nbytes for tensor in written.values())
        assert isinstance(control.results[2], BroadcastFailed)


class Coordinator:
    """Writes down what it is told, without an actor."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def fail(self, reason: str) -> None:
        self.failures.append(reason)


class FullOnRank1(RunDir):
    """A run directory to which rank 1 cannot write."""

    def create_file(self, path, name):
        if dist.get_rank() == 1:
            raise RunDirError(f"cannot write {name}: No space left on device")
        return super().create_file(path, name)


def write_in_background(module: torch.nn.Module, rank: int, output: Path) -> None:
    """Both ranks write a version, in place of what a killed run left; then one of them cannot, and both hear why."""
    model_writer.call = lambda method, *arguments: method(*arguments)
    run_dir, coordinator, durable = RunDir(output / "run"), Coordinator(), []
    if rank == 0:
        run_dir.write_bytes("model/model-99999.safetensors", b"of a run that was killed")
    dist.barrier()

    def start(storage: RunDir, path: str) -> model_writer.Writing:
        layers = LayerPass(module, torch.float32, 40_000, rank, 2, deepspeed.gathered)
        layers.run()
        files = layers.files
        writer = model_writer.ModelWriter(storage, rank, 60, coordinator)
        describe = partial(describe_model, module, plan=layers.plan)
        return writer.start(5, path, files, describe, lambda: durable.append(storage.is_complete(path)))

    assert start(run_dir, "model").wait() < 60
    assert durable == ([True] if rank == 0 else [])
    assert run_dir.verify_manifest("model") == []  # every rank sees it complete
    assert not run_dir.exists("model/model-99999.safetensors")
    sentence = r"^the model directory of version 5 could not be written: cannot write model-\d+\.safetensors: No space"
    with pytest.raises(model_writer.ModelWriteFailed, match=sentence) as failure:
        start(FullOnRank1(output / "run"), "full").wait()
    assert coordinator.failures == [str(failure.value)]
    assert not run_dir.is_complete("full")


def main(rank: int, port: str, model: str, output: Path, stage: int) -> None:
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    engine = deepspeed.build_engine(model, ModelConfig(name=model, dtype="float32"), TrainingConfig(zero_stage=stage))
    assert all((parameter.numel() == 0) is (stage == 3) for parameter in engine.module.parameters())
    stream(engine.module, rank, output)
    assert all((parameter.numel() == 0) is (stage == 3) for parameter in engine.module.parameters())
    write_in_background(engine.module, rank, output)
    layers = LayerPass(engine.module, torch.float32, 40_000, rank, 2, deepspeed.gathered)
    layers.run()
    for file in layers.files:
        file.finish()
    (output / f"files-{rank}.json").write_text(json.dumps({file.name: len(file.content) for file in layers.files}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
