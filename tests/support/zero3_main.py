"""One of two ranks that write and broadcast a model in ZeRO-3 shards: `zero3_main.py RANK PORT MODEL OUTPUT`."""

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from aft_ray.config.run import ModelConfig, TrainingConfig
from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.training import deepspeed
from aft_ray.weights.broadcast.buckets import receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup, connect_store
from aft_ray.weights.broadcast.sender import Broadcast, BroadcastFailed
from aft_ray.weights.export import write_model
from aft_ray.weights.publish import SharedStorage
from aft_ray.weights.receive_plan import BroadcastOffer
from aft_ray.weights.version_manifest import VersionManifest


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
    control = Control()
    for version, timeout_s in ((1, 60), (2, 2)):
        transport = Broadcast(control, rank, torch.float32, 40_000, timeout_s, False, deepspeed.gathered)
        if rank == 0:
            manifest = VersionManifest(version, str(output), (), ())
            control.manifests[version] = transport.add_to_manifest(manifest, [], module)
        transport.transfer(module, version)
    if rank == 0:
        control.threads[0].join()
        written = {}
        for file in output.glob("*.safetensors"):
            written |= load_file(file)
        assert written.keys() == control.received.keys()
        assert all(torch.equal(written[name], control.received[name]) for name in written)
        assert control.results[1].bytes == sum(tensor.nbytes for tensor in written.values())
        assert isinstance(control.results[2], BroadcastFailed)


def main(rank: int, port: str, model: str, output: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    engine = deepspeed.build_engine(model, ModelConfig(name=model, dtype="float32"), TrainingConfig(zero_stage=3))
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    written = write_model(
        engine.module, output, 40_000, SharedStorage().put_shard, rank, torch.float32, deepspeed.gathered
    )
    assert (written.shards == []) is (rank == 1)
    stream(engine.module, rank, output)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
