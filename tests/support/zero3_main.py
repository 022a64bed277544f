"""One of two ranks that hold a model in ZeRO-3 shards, write and stream it: `zero3_main.py RANK PORT MODEL OUTPUT`."""

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from aft_ray.config.run import ModelConfig, TrainingConfig
from aft_ray.coordination.broadcast_group import BroadcastFailed, BroadcastGroup, Receiver
from aft_ray.training import deepspeed
from aft_ray.weights.broadcast.buckets import receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup, reach_store
from aft_ray.weights.broadcast.layout import Layout
from aft_ray.weights.export import layout_of, write_model
from aft_ray.weights.publish import Broadcast, SharedStorage


def keep_nothing_gathered(training, dtype, made=deepspeed.ds_config):
    """DeepSpeed keeps parameters below a size whole on every rank, which would be all those of a tiny model."""
    config = made(training, dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


class Meetings:
    """To version 1 an engine comes, in a thread of rank 0's; to version 2 none does."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.received, self.ends = layout, {}, {}
        self.threads: list[threading.Thread] = []

    def invitation(self, version: int) -> BroadcastGroup:
        return BroadcastGroup(version, (Receiver("sampler 0", 1),))

    def open_table(self, version: int, port: int) -> None:
        if version == 1:
            self.threads.append(threading.Thread(target=self.engine, args=(port,)))
            self.threads[0].start()

    def engine(self, port: int) -> None:
        group = GlooGroup(reach_store("127.0.0.1", port, 60), 1, 2, 60)
        receive(self.layout, group, self.received.update, torch.device("cpu"))

    def ended(self, version: int, how: object) -> None:
        self.ends[version] = how


def stream(module: torch.nn.Module, rank: int, output: Path) -> None:
    meetings = Meetings(layout_of(module, torch.float32, 40_000))
    Broadcast(meetings, rank, torch.float32, 40_000, 60, gpu=False).deliver(module, 1)
    Broadcast(meetings, rank, torch.float32, 40_000, 2, gpu=False).deliver(module, 2)
    if rank == 0:
        meetings.threads[0].join()
        written = {}
        for file in output.glob("*.safetensors"):
            written |= load_file(file)
        assert written.keys() == meetings.received.keys()
        assert all(torch.equal(written[name], meetings.received[name]) for name in written)
        assert meetings.ends[1].bytes == sum(tensor.nbytes for tensor in written.values())
        assert isinstance(meetings.ends[2], BroadcastFailed)


def main(rank: int, port: str, model: str, output: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    engine = deepspeed.build_engine(model, ModelConfig(name=model, dtype="float32"), TrainingConfig(zero_stage=3))
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    written = write_model(engine.module, output, 40_000, SharedStorage().offer, rank, torch.float32)
    assert (written.shards == []) is (rank == 1)
    stream(engine.module, rank, output)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
