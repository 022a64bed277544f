"""One rank that trains with an option of the trainer and resumes: `options_main.py RANK RANKS PORT WORK_DIR CASES`.

CASES is a JSON object: name -> [ZeRO stage, dtype, LoRA options or null, options of `training`]. Rank 0 writes
options.pt there: for each case the steps, the same steps after a resumption, and the weights of both. The model
directory of a case is in WORK_DIR under its name.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rank_main import GROUPS, build, export, keep_nothing_gathered, resume, save, take, weights
from training_helpers import random_groups

from aft_ray.config.run import LoraConfig, TrainingConfig
from aft_ray.training import deepspeed


def train_and_resume(work, name, rank, ranks, stage, dtype, lora, options):
    """Takes four steps, and the last two again from a training state; returns the losses and weights of both."""
    groups = random_groups(GROUPS)
    given = {"dtype": dtype, "lora": None if lora is None else LoraConfig(**lora), **options}
    engine = build(work / "model", stage, **given)
    losses = [stats.loss for stats in take(engine, groups, range(2), rank, ranks)]
    save(engine, work, stage, name, rank, ranks)
    losses += [stats.loss for stats in take(engine, groups, range(2, 4), rank, ranks)]
    trained = weights(engine)
    export(engine, work / name, rank)
    engine.destroy()
    resumed, _, _ = resume(work, stage, name, work / "model", **given)
    again = [stats.loss for stats in take(resumed, groups, range(2, 4), rank, ranks)]
    result = {"losses": losses, "again": again, "weights": trained, "weights_again": weights(resumed)}
    resumed.destroy()
    return result


def main(rank, ranks, port, work, cases):
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    timeout = timedelta(seconds=TrainingConfig().timeout_s)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timeout)
    results = {name: train_and_resume(work, name, rank, ranks, *case) for name, case in cases.items()}
    if rank == 0:
        torch.save(results, work / "options.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), json.loads(sys.argv[5]))
