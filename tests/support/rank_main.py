"""One rank of a DeepSpeed run over gloo: `rank_main.py RANK RANKS PORT WORK_DIR`. Rank 0 writes results-RANKS.pt there.

Two ranks run everything. Another number of ranks continues from the checkpoints of two.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_helpers import PAD, plan, poisoned_group, random_groups

from aft_ray.config.run import LoraConfig, ModelConfig, TrainingConfig
from aft_ray.objectives import build_objective
from aft_ray.training import deepspeed, step
from aft_ray.training.collate import collate
from aft_ray.weights.adapter import is_adapter
from aft_ray.weights.export import write_adapter, write_model
from aft_ray.weights.publish import SharedStorage

OBJECTIVE, GROUPS, PER_STEP, RATE, WEIGHT = build_objective("aft_boundary"), 22, 8, 1e-3, 0.7
LORA = LoraConfig(rank=4, alpha=6, targets=["q_proj", "v_proj", "up_proj", "lm_head"])


def build(model_dir, stage, dtype="float32", lora=None, adapter=None, universal=False, **options):
    training = TrainingConfig(zero_stage=stage, max_grad_norm=0.5, weight_decay=0.01, **options)
    model = ModelConfig(name=str(model_dir), dtype=dtype)
    engine = deepspeed.build_engine(model_dir, model, training, lora=lora, adapter=adapter, universal=universal)
    sharded = [p.numel() == 0 for p in engine.module.parameters()]
    assert all(sharded) if stage == 3 else not any(sharded)
    return engine


def keep_nothing_gathered(training, dtype, ds_config=deepspeed.ds_config):
    """A config that also partitions small parameters. By default DeepSpeed keeps them whole, here the whole model."""
    config = ds_config(training, dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def take(engine, groups, steps, rank, ranks):
    """Takes some of the steps of two epochs. The last step of an epoch is smaller than the others."""
    planned = [s for epoch in plan(groups, OBJECTIVE, ranks=ranks, groups_per_step=PER_STEP, epochs=2) for s in epoch]
    taken = []
    for number in steps:
        batches = [collate([groups[i] for i in b], OBJECTIVE, PAD) for b in planned[number].shares[rank]]
        totals = planned[number].totals
        taken.append(step.train_step(engine, batches, OBJECTIVE, WEIGHT, totals, RATE / (number + 1)))
    return taken


def weights(engine):
    """All weights in full, on every rank."""
    from deepspeed.runtime import zero

    parameters = dict(engine.module.named_parameters())
    with zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def export(engine, directory, rank):
    """Writes the merged model and the adapter, as a round does."""
    write_model(
        engine.module, directory / "model", 40_000, SharedStorage().put_shard, rank, torch.float32, deepspeed.gathered
    )
    write_adapter(engine.module, directory / "adapter", rank, deepspeed.gathered)


def train_adapters(work, stage, groups, rank, ranks):
    """Takes six steps, and the last three again from a checkpoint. Returns statistics and weights."""
    options = {"lora": LORA, "adapter": work / "adapter", "activation_checkpointing": stage == 3}
    engine = build(work / "model", stage, **options)
    before = {name: tensor for name, tensor in weights(engine).items() if not is_adapter(name)}
    stats = take(engine, groups, range(3), rank, ranks)
    deepspeed.save_checkpoint(engine, work / f"adapters{stage}", {"round": 7})
    stats += take(engine, groups, range(3, 6), rank, ranks)
    export(engine, work / f"exported{stage}", rank)
    after = weights(engine)
    kept = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    trained = {name: tensor for name, tensor in after.items() if is_adapter(name)}
    engine.destroy()

    resumed = build(work / "model", stage, **options)
    deepspeed.load_checkpoint(resumed, work / f"adapters{stage}")
    again = take(resumed, groups, range(3, 6), rank, ranks)
    resumed.destroy()
    return {"stats": stats, "weights": trained, "again": again, "kept": kept}


def fault(engine, rank, ranks):
    """Trains on a group whose loss is NaN. Returns the ids that the error names and whether the weights changed."""
    groups = [*random_groups(7), poisoned_group()]
    before = weights(engine)
    try:
        take(engine, groups, [0], rank, ranks)
    except step.NonFiniteLoss as error:
        after = weights(engine)
        same = all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
        return {"ids": error.question_ids, "message": str(error), "unchanged": same}
    return None


def continue_from_two(rank, ranks, work):
    """Takes the last three steps from the checkpoints that two ranks saved after the first three."""
    groups, results = random_groups(GROUPS), {}
    for name, stage, options in (
        ("stage2", 2, {}),
        ("stage3", 3, {"activation_checkpointing": True}),
        ("adapters3", 3, {"lora": LORA}),
    ):
        engine = build(work / "model", stage, universal=True, **options)
        state = deepspeed.load_checkpoint(engine, work / f"universal-{name}")
        stats = take(engine, groups, range(3, 6), rank, ranks)
        results[name] = {"stats": stats, "weights": weights(engine), "state": state}
        engine.destroy()
    return results


def do_everything(rank, ranks, work):
    groups = random_groups(GROUPS)
    results = {}
    for stage in range(4):
        engine = build(work / "model", stage)
        stats = take(engine, groups, range(3), rank, ranks)
        deepspeed.save_checkpoint(engine, work / f"checkpoint{stage}", {"round": 7})
        stats += take(engine, groups, range(3, 6), rank, ranks)
        results[f"stage{stage}"] = {"stats": stats, "weights": weights(engine)}
        engine.destroy()

        resumed = build(work / "model", stage)
        state = deepspeed.load_checkpoint(resumed, work / f"checkpoint{stage}")
        stats = take(resumed, groups, range(3, 6), rank, ranks)
        results[f"resumed{stage}"] = {"stats": stats, "weights": weights(resumed), "state": state}
        resumed.destroy()

        bf16 = build(work / "model", stage, dtype="bfloat16", activation_checkpointing=True)
        results[f"bfloat16_{stage}"] = {"stats": take(bf16, groups, range(6), rank, ranks), "weights": weights(bf16)}
        bf16.destroy()
        results[f"adapters{stage}"] = train_adapters(work, stage, groups, rank, ranks)

        poisoned = build(work / "poisoned", stage)
        faults = [None] * ranks
        dist.all_gather_object(faults, fault(poisoned, rank, ranks))
        results[f"fault{stage}"] = faults
        poisoned.destroy()
    for stage in (2, 3):
        options = {"offload_optimizer": True, "offload_parameters": stage == 3}
        offloaded = build(work / "model", stage, **options)
        stats = take(offloaded, groups, range(6), rank, ranks)
        results[f"offloaded{stage}"] = {"stats": stats, "weights": weights(offloaded)}
        offloaded.destroy()

        # Continue from a checkpoint that was saved without offloading.
        offloaded = build(work / "model", stage, **options)
        deepspeed.load_checkpoint(offloaded, work / f"checkpoint{stage}")
        stats = take(offloaded, groups, range(3, 6), rank, ranks)
        results[f"moved{stage}"] = {"stats": stats, "weights": weights(offloaded)}
        offloaded.destroy()

        offloaded = build(work / "model", stage, dtype="bfloat16", activation_checkpointing=True, **options)
        stats = take(offloaded, groups, range(6), rank, ranks)
        results[f"bfloat16_offloaded{stage}"] = {"stats": stats, "weights": weights(offloaded)}
        offloaded.destroy()
    everyone = [None] * ranks
    dist.all_gather_object(everyone, {name: r["stats"] for name, r in results.items() if "stats" in r})
    results["all_ranks"] = everyone
    return results


def main(rank, ranks, port, work):
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    results = (do_everything if ranks == 2 else continue_from_two)(rank, ranks, work)
    if rank == 0:
        torch.save(results, work / f"results-{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
