"""One rank of a DeepSpeed run over gloo: `rank_main.py RANK RANKS PORT WORK_DIR`. Rank 0 writes results-RANKS.pt there.

Two ranks run everything. Another number of ranks continues from the checkpoints of two.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from training_helpers import batches_of, plan, poisoned_group, random_groups

from aft_ray.config.run import LoraConfig, ModelConfig, TrainingConfig
from aft_ray.objectives import build_objective
from aft_ray.storage.run_dir import RunDir
from aft_ray.training import deepspeed, step
from aft_ray.training.batch import make_batch
from aft_ray.training.batching import PlannedBatch, StepTotals
from aft_ray.training.forward.scoring import install_scoring, response_logprobs
from aft_ray.training.model.loading import load_model
from aft_ray.training.state.checkpoint import CheckpointWriter, fetched_state
from aft_ray.weights.adapter import is_adapter
from aft_ray.weights.export import LayerPass, write_adapter, write_model

OBJECTIVE, GROUPS, PER_STEP, RATE, WEIGHT = build_objective("aft_boundary"), 17, 8, 1e-3, 0.7
BUDGET = 21  # some groups have more tokens
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
    """Takes some of the steps of two epochs. The last step of an epoch has a single group, so ranks have none."""
    planned = plan(groups, OBJECTIVE, ranks=ranks, groups_per_step=PER_STEP, budget=BUDGET, epochs=2)
    taken = []
    for number in steps:
        chosen, one = planned[number]
        batches = batches_of(groups, chosen, one, rank, OBJECTIVE)
        taken.append(step.train_step(engine, batches, one, OBJECTIVE, WEIGHT, RATE / (number + 1)))
    return taken


def weights(engine):
    """All weights in full, on every rank."""
    from deepspeed.runtime import zero

    parameters = dict(engine.module.named_parameters())
    with zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def export(engine, directory, rank):
    """Writes the model, merged with its adapter if it has one, and the adapter, as a round does."""
    layers = LayerPass(engine.module, torch.float32, 40_000, rank, dist.get_world_size(), deepspeed.gathered)
    write_model(layers, directory / "model")
    if hasattr(engine.module, "peft_config"):
        write_adapter(engine.module, directory / "adapter", rank, deepspeed.gathered)


def train_adapters(work, stage, groups, rank, ranks):
    """Takes six steps, and the last three again from a checkpoint. Returns statistics and weights."""
    options = {"lora": LORA, "adapter": work / "adapter", "activation_checkpointing": "full" if stage == 3 else "none"}
    engine = build(work / "model", stage, **options)
    before = {name: tensor for name, tensor in weights(engine).items() if not is_adapter(name)}
    stats = take(engine, groups, range(3), rank, ranks)
    written = save(engine, work, stage, f"adapters{stage}", rank, ranks)
    stats += take(engine, groups, range(3, 6), rank, ranks)
    export(engine, work / f"exported{stage}", rank)
    after = weights(engine)
    kept = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    trained = {name: tensor for name, tensor in after.items() if is_adapter(name)}
    engine.destroy()

    resumed, _, _ = resume(work, stage, f"adapters{stage}", work / "model", **options)
    again = take(resumed, groups, range(3, 6), rank, ranks)
    resumed.destroy()
    return {"stats": stats, "weights": trained, "again": again, "kept": kept, "written": written}


def storage(work, stage):
    """The run directory: mounted for odd stages, for even ones what is no local filesystem to pyarrow."""
    if stage % 2:
        return RunDir(work / "run")
    (work / "bucket").mkdir(exist_ok=True)
    return RunDir("run", pafs.SubTreeFileSystem(str(work / "bucket"), pafs.LocalFileSystem()))


def save(engine, work, stage, name, rank, ranks):
    """Saves a training state in the run directory as a round does: every rank its own files, rank 0 the manifest.

    Returns the bytes of each rank's files.
    """
    scratch, run_dir, written = work / f"scratch{rank}" / name, storage(work, stage), [None] * ranks
    deepspeed.save_checkpoint(engine, scratch, {"round": 7})
    dist.all_gather_object(written, run_dir.add_files(scratch, name))
    if rank == 0:
        run_dir.write_manifest(name, [file for files in written for file in files])
    dist.barrier()
    return [sum(file.size for file in files if file.name.endswith(".pt")) for files in written]


def resume(work, stage, name, model, **options):
    """An engine with the training state of a name, the client state, and the files that this node had for it."""
    with fetched_state(storage(work, stage), name, 300) as saved:
        fetched = sorted(file.name for file in saved.directory.rglob("*.pt"))
        engine = build(model, stage, universal=saved.universal, **options)
        return engine, deepspeed.load_checkpoint(engine, saved.directory), fetched


def reduced_gradients(work, stage, rank, ranks):
    """Whether the reduced gradients of bfloat16 training are the float32 means of the ranks' own, or bfloat16 means."""
    from deepspeed.utils import safe_get_full_grad

    group = random_groups(ranks, seed=8)[rank]
    batch, totals = make_batch([group], PlannedBatch((0,)), OBJECTIVE), StepTotals(ranks, 20, 40)

    def loss(model):
        return step.batch_loss(response_logprobs(model, batch.row), batch, OBJECTIVE, WEIGHT, totals)[0] * ranks

    alone = load_model(work / "model", "bfloat16")
    install_scoring(alone)
    loss(alone).backward()
    engine = build(work / "model", stage, dtype="bfloat16")
    engine.backward(loss(engine))
    exact, coarse = [], []
    for (name, parameter), own in zip(engine.module.named_parameters(), alone.parameters(), strict=True):
        ours = [torch.empty_like(own.grad) for _ in range(ranks)]
        dist.all_gather(ours, own.grad)
        reduced = safe_get_full_grad(parameter)
        assert reduced.dtype is torch.float32, name
        exact.append(torch.equal(reduced, sum(one.float() for one in ours) / ranks))
        coarse.append(torch.equal(reduced, (sum(ours) / ranks).float()))
    engine.destroy()
    return {"float32": all(exact), "bfloat16": all(coarse)}


def repeated_dropout(work, stage, groups, rank, ranks):
    """The outputs of the passes of two steps whose adapters have dropout: for scores, and again with gradients."""
    lora = LORA.model_copy(update={"dropout": 0.4})
    engine = build(work / "model", stage, lora=lora, adapter=work / "adapter", activation_checkpointing="full")
    seen = []

    def recorded(engine, row):
        seen.append(response_logprobs(engine, row))
        return seen[-1]

    step.response_logprobs = recorded
    try:
        stats = take(engine, groups, range(2), rank, ranks)
    finally:
        step.response_logprobs = response_logprobs
        engine.destroy()
    outputs = []
    for one in stats:
        scored, trained = seen[: one.score_passes], seen[one.score_passes :][: one.passes]
        outputs += [(a.detach(), b.detach()) for a, b in zip(scored, trained, strict=False) if len(a) and len(b)]
        seen = seen[one.score_passes + one.passes :]
    assert not seen
    return outputs


def group_timeouts():
    """The timeout of every process group of this process, in seconds."""
    groups = dist.distributed_c10d._world.pg_map
    return [one._get_backend(torch.device("cpu")).options._timeout.total_seconds() for one in groups]


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
        ("checkpoint2", 2, {}),
        ("checkpoint3", 3, {"activation_checkpointing": "full"}),
        ("adapters3", 3, {"lora": LORA}),
    ):
        engine, state, _ = resume(work, stage, name, work / "model", **options)
        stats = take(engine, groups, range(3, 6), rank, ranks)
        results[name] = {"stats": stats, "weights": weights(engine), "state": state}
        engine.destroy()
    return results


def do_everything(rank, ranks, work):
    groups = random_groups(GROUPS)
    results = {}
    CheckpointWriter(storage(work, 0), rank, TrainingConfig().timeout_s, None)
    for stage in range(4):
        engine = build(work / "model", stage)
        stats = take(engine, groups, range(3), rank, ranks)
        written = save(engine, work, stage, f"checkpoint{stage}", rank, ranks)
        stats += take(engine, groups, range(3, 6), rank, ranks)
        results[f"stage{stage}"] = {"stats": stats, "weights": weights(engine), "written": written}
        engine.destroy()

        resumed, state, fetched = resume(work, stage, f"checkpoint{stage}", work / "model")
        stats = take(resumed, groups, range(3, 6), rank, ranks)
        results[f"resumed{stage}"] = {"stats": stats, "weights": weights(resumed), "state": state, "fetched": fetched}
        resumed.destroy()
        results[f"reduced{stage}"] = reduced_gradients(work, stage, rank, ranks)

        bf16 = build(work / "model", stage, dtype="bfloat16", activation_checkpointing="full")
        results[f"bfloat16_{stage}"] = {"stats": take(bf16, groups, range(6), rank, ranks), "weights": weights(bf16)}
        bf16.destroy()
        results[f"adapters{stage}"] = train_adapters(work, stage, groups, rank, ranks)
        results[f"dropout{stage}"] = repeated_dropout(work, stage, groups, rank, ranks)

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
        offloaded, _, _ = resume(work, stage, f"checkpoint{stage}", work / "model", **options)
        stats = take(offloaded, groups, range(3, 6), rank, ranks)
        results[f"moved{stage}"] = {"stats": stats, "weights": weights(offloaded)}
        offloaded.destroy()

        offloaded = build(work / "model", stage, dtype="bfloat16", activation_checkpointing="full", **options)
        stats = take(offloaded, groups, range(6), rank, ranks)
        results[f"bfloat16_offloaded{stage}"] = {"stats": stats, "weights": weights(offloaded)}
        offloaded.destroy()
    # ZeRO++: weights are gathered from a second copy that the ranks of a node share.
    secondary = {"zero_optimization": {"zero_hpz_partition_size": ranks}}
    engine = build(work / "model", 3, workers=ranks, deepspeed=secondary)
    results["hpz"] = {"stats": take(engine, groups, range(6), rank, ranks), "weights": weights(engine)}
    export(engine, work / "exported_hpz", rank)
    engine.destroy()
    results["timeouts"] = group_timeouts()
    everyone = [None] * ranks
    dist.all_gather_object(everyone, {name: r["stats"] for name, r in results.items() if "stats" in r})
    results["all_ranks"] = everyone
    return results


def main(rank, ranks, port, work):
    torch.set_num_threads(1)
    deepspeed.ds_config = keep_nothing_gathered
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    timeout = timedelta(seconds=TrainingConfig().timeout_s)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timeout)
    results = (do_everything if ranks == 2 else continue_from_two)(rank, ranks, work)
    if rank == 0:
        torch.save(results, work / f"results-{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
