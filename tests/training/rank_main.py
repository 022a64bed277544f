"""One rank of a DeepSpeed run over gloo: `rank_main.py RANK RANKS PORT WORK_DIR`. Rank 0 writes results.pt there."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_helpers import PAD, plan, poisoned_group, random_groups

from aft_ray.config import ModelConfig, TrainingConfig
from aft_ray.objectives import build_objective
from aft_ray.training import deepspeed, step
from aft_ray.training.collate import collate

OBJECTIVE, GROUPS, PER_STEP, RATE, WEIGHT = build_objective("aft_boundary"), 22, 8, 1e-3, 0.7


def build(model_dir, stage, dtype="float32", **options):
    training = TrainingConfig(zero_stage=stage, max_grad_norm=0.5, weight_decay=0.01, **options)
    engine = deepspeed.build_engine(model_dir, ModelConfig(name=str(model_dir), dtype=dtype), training)
    sharded = [p.numel() == 0 for p in engine.module.parameters()]
    assert all(sharded) if stage == 3 else not any(sharded)
    return engine


def keep_nothing_gathered(training, dtype, made=deepspeed.ds_config):
    """DeepSpeed keeps parameters below a size whole on every rank, which would be all those of a tiny model."""
    config = made(training, dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def take(engine, groups, steps, rank, ranks):
    """Trains on some steps of two epochs; the last step of an epoch is smaller than the others."""
    planned = [s for epoch in plan(groups, OBJECTIVE, ranks=ranks, groups_per_step=PER_STEP, epochs=2) for s in epoch]
    made = []
    for number in steps:
        batches = [collate([groups[i] for i in b], OBJECTIVE, PAD) for b in planned[number].shares[rank]]
        totals = planned[number].totals
        made.append(step.train_step(engine, batches, OBJECTIVE, WEIGHT, totals, RATE / (number + 1)))
    return made


def weights(engine):
    """All weights in full, on every rank."""
    from deepspeed.runtime import zero

    parameters = dict(engine.module.named_parameters())
    with zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def fault(engine, rank, ranks):
    """The ids that a step on a poisoned group names, and whether the weights stayed as they were."""
    groups = [*random_groups(7), poisoned_group()]
    before = weights(engine)
    try:
        take(engine, groups, [0], rank, ranks)
    except step.NonFiniteLoss as error:
        after = weights(engine)
        same = all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
        return {"ids": error.question_ids, "message": str(error), "unchanged": same}
    return None


def main(rank, ranks, port, work):
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    groups = random_groups(GROUPS)
    results = {}
    for stage in range(4):
        engine = build(work / "model", stage)
        stats = take(engine, groups, range(3), rank, ranks)
        deepspeed.save(engine, work / f"checkpoint{stage}", {"round": 7})
        stats += take(engine, groups, range(3, 6), rank, ranks)
        results[f"stage{stage}"] = {"stats": stats, "weights": weights(engine)}
        engine.destroy()

        resumed = build(work / "model", stage)
        state = deepspeed.load(resumed, work / f"checkpoint{stage}")
        stats = take(resumed, groups, range(3, 6), rank, ranks)
        results[f"resumed{stage}"] = {"stats": stats, "weights": weights(resumed), "state": state}
        resumed.destroy()

        half = build(work / "model", stage, dtype="bfloat16", activation_checkpointing=True)
        results[f"bfloat16_{stage}"] = {"stats": take(half, groups, range(6), rank, ranks), "weights": weights(half)}
        half.destroy()

        poisoned = build(work / "poisoned", stage)
        faults = [None] * ranks
        dist.all_gather_object(faults, fault(poisoned, rank, ranks))
        results[f"fault{stage}"] = faults
        poisoned.destroy()
    everyone = [None] * ranks
    dist.all_gather_object(everyone, {name: r["stats"] for name, r in results.items() if "stats" in r})
    results["all_ranks"] = everyone
    if rank == 0:
        torch.save(results, work / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
