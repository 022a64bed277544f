"""One of two ranks that hold a model in ZeRO-3 shards and write it: `zero3_main.py RANK PORT MODEL OUTPUT`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from aft_ray.config import ModelConfig, TrainingConfig
from aft_ray.training import deepspeed
from aft_ray.weights.source import write_model
from aft_ray.weights.transport import Checkpoint


def keep_nothing_gathered(training, dtype, made=deepspeed.ds_config):
    """DeepSpeed keeps parameters below a size whole on every rank, which would be all those of a tiny model."""
    config = made(training, dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def main(rank: int, port: str, model: str, output: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    engine = deepspeed.build_engine(model, ModelConfig(name=model, dtype="float32"), TrainingConfig(zero_stage=3))
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    written = write_model(engine.module, output, 40_000, Checkpoint().offer, rank, torch.float32)
    assert (written.shards == []) is (rank == 1)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
