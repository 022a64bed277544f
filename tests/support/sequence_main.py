"""One rank of training over gloo: `sequence_main.py RANK RANKS PORT WORK_DIR SIZE`, SIZE ranks to a row.

Rank 0 writes sequence-RANKS-SIZE.pt there: for each ZeRO stage what it scored and measured, and all gradients.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from training_helpers import batches_of, plan, random_groups

from aft_ray.config.run import ModelConfig, TrainingConfig
from aft_ray.objectives import build_objective
from aft_ray.training import deepspeed, step
from aft_ray.training.forward.scoring import response_logprobs

OBJECTIVE, GROUPS, BUDGET = build_objective("aft_boundary"), 8, 18


def build(work, stage, ranks, size, checkpointing):
    training = TrainingConfig(
        workers=ranks, sequence_parallel_size=size, zero_stage=stage, activation_checkpointing=checkpointing
    )
    return deepspeed.build_engine(work / "model", ModelConfig(name="model", dtype="float32"), training)


def results(work, stage, rank, ranks, size):
    from deepspeed.utils import safe_get_full_grad

    groups = random_groups(GROUPS)
    ((chosen, planned),) = plan(groups, OBJECTIVE, ranks=ranks // size, budget=BUDGET)
    assert planned.score_passes  # a group is split over several passes
    batches = batches_of(groups, chosen, planned, rank // size, OBJECTIVE)
    # One row with all groups, which is no multiple of the ranks.
    (whole,) = plan(groups, OBJECTIVE, ranks=1, budget=1000)
    (batch,) = batches_of(groups, *whole, 0, OBJECTIVE)
    engine = build(work, stage, ranks, size, "full" if stage else "none")
    with torch.no_grad():
        scores = response_logprobs(engine, batch.row)
    step.compute_gradients(engine, batches, planned, OBJECTIVE, 0.7)
    gradients = {name: safe_get_full_grad(one).clone() for name, one in engine.module.named_parameters()}
    engine = build(work, stage, ranks, size, "none")
    stats = [asdict(step.train_step(engine, batches, planned, OBJECTIVE, 0.7, 1e-3)) for _ in range(2)]
    return {"scores": scores, "gradients": gradients, "stats": stats}


def main():
    rank, ranks, port, work, size = (*map(int, sys.argv[1:4]), Path(sys.argv[4]), int(sys.argv[5]))
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found = {stage: results(work, stage, rank, ranks, size) for stage in ((0, 3) if ranks > 1 else (0,))}
    if rank == 0:
        torch.save(found, work / f"sequence-{ranks}-{size}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
