"""Why a split cannot run on a cluster: one sentence each, with the arithmetic and a way out.

Invariant: a setting that a sentence recommends was tried by the same arithmetic, and fits.
"""

from __future__ import annotations

from itertools import combinations

from aft_ray.cluster.reservations import Split
from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.engine_memory import can_be_sharded
from aft_ray.planning.plan.planner import Planner, describe
from aft_ray.planning.plan.quantities import GB, counted, gigabytes
from aft_ray.planning.plan.training_memory import training_memory


def problems(planner: Planner, split: Split) -> list[str]:
    """Everything that keeps a split from running on the planner's cluster."""
    found = [engine_problem(planner, split.tensor_parallel) if split.samplers else None]
    found += [trainer_problem(planner, split.workers), placement_problem(planner, split), host_problem(planner, split)]
    return [problem for problem in found if problem]


def engine_fits(planner: Planner, tensor_parallel: int) -> bool:
    """Whether an engine with so many processes a stage has memory for one sequence of the greatest length."""
    sharded = can_be_sharded(planner.model, tensor_parallel)
    return sharded and planner.engine_memory(tensor_parallel).longest >= 1


def engine_problem(planner: Planner, tensor_parallel: int) -> str | None:
    """Why an engine with so many processes a stage cannot run; None when it can."""
    config, node, model = planner.config, planner.cluster.node, planner.model
    if engine_fits(planner, tensor_parallel):
        return None
    enough = next((size for size in (1, 2, 4, 8, 16) if size <= node.gpus and engine_fits(planner, size)), None)
    way_out = "use another node" if enough is None else f"set sampling.tensor_parallel_size={enough}"
    if not can_be_sharded(model, tensor_parallel):
        return (
            f"sampling.tensor_parallel_size={tensor_parallel} splits neither the {model.heads} heads nor the "
            f"{model.kv_heads} KV heads of {model.name} evenly; {way_out}"
        )
    memory, longest = planner.engine_memory(tensor_parallel), config.model.max_length
    if not config.sampling.gpus_per_sampler:
        return (
            f"an engine's KV cache of {gigabytes(memory.cache)} holds no sequence of {longest} tokens at "
            f"{gigabytes(memory.kv_token)} each; raise sampling.kv_cache_gib"
        )
    usable = memory.cache + memory.device
    return (
        f"an engine's process needs {gigabytes(memory.weights)} for weights and "
        f"{gigabytes(memory.device - memory.weights)} beside them, and sampling.gpu_memory_utilization="
        f"{config.sampling.gpu_memory_share:g} of {node.name} is {gigabytes(usable)}, which leaves no KV "
        f"cache for {longest} tokens; {way_out}"
    )


def trainer_problem(planner: Planner, workers: int) -> str | None:
    """Why so many workers cannot train the model; None when they can."""
    training, node = planner.config.training, planner.cluster.node
    together = training.sequence_parallel_size
    if workers % together:
        return f"training.workers={workers} is no multiple of training.sequence_parallel_size={together}; change one"
    if workers > training.groups_per_step:
        return (
            f"training.workers={workers} are more than training.groups_per_step={training.groups_per_step}: every "
            f"worker needs a group in a step"
        )
    if trainer_fits(planner, workers):
        return None
    memory = planner.trainer_memory(workers)
    return (
        f"ZeRO-{training.zero_stage} on {counted(workers, 'worker')} needs {gigabytes(memory.device)} on each GPU "
        f"({gigabytes(memory.states)} of weights, gradients and optimizer, {gigabytes(memory.device - memory.states)} "
        f"of activations and buffers), and a GPU of {node.name} has {gigabytes(node.gpu_memory * GB)}; "
        f"{_trainer_way_out(planner, workers)}"
    )


def trainer_fits(planner: Planner, workers: int, config: RunConfig | None = None) -> bool:
    """Whether a train worker fits its GPU, and their number the config.

    Without GPUs every worker does: `host_problem` compares with the node's memory.

    Args:
        planner: The planner.
        workers: The number of train workers.
        config: Another config than the planner's.
    """
    config = config or planner.config
    if workers % config.training.sequence_parallel_size:
        return False
    if not config.training.gpus_per_worker:
        return True
    memory = training_memory(config, planner.model, planner.work, planner.assumptions, workers)
    return memory.device <= planner.cluster.node.gpu_memory * GB


def _trainer_way_out(planner: Planner, workers: int) -> str:
    """The fewest changes of the config that make training fit."""
    config = planner.config
    training = config.training
    changes = {
        "zero_stage": 3,
        "activation_checkpointing": "full",
        "offload_optimizer": True,
        "offload_parameters": True,
    }
    changes["tokens_per_microbatch"] = max(1024, config.model.max_length, training.tokens_per_microbatch // 4)
    possible = {key: value for key, value in changes.items() if getattr(training, key) != value}
    ways = []
    more = range(workers + 1, training.groups_per_step + 1)
    if enough := next((number for number in more if trainer_fits(planner, number)), None):
        ways.append(f"training.workers={enough}")
    for size in range(1, len(possible) + 1):
        for keys in combinations(possible, size):
            chosen = {key: possible[key] for key in keys}
            if chosen.get("offload_parameters") and {**training.model_dump(), **chosen}["zero_stage"] != 3:
                continue
            changed = config.model_copy(update={"training": training.model_copy(update=chosen)})
            if trainer_fits(planner, workers, changed):
                ways.append(" ".join(f"training.{key}={str(value).lower()}" for key, value in chosen.items()))
        if ways:
            return "set " + ", or ".join(ways)
    return "use larger GPUs, or more of them with a larger training.groups_per_step"


def host_problem(planner: Planner, split: Split) -> str | None:
    """Why the host memory of a node cannot hold its share of the processes; None when it can."""
    node, config, nodes = planner.cluster.node, planner.config, planner.cluster.nodes
    trainer, have = planner.trainer_memory(split.workers), node.host_memory * GB
    gpu = config.training.gpus_per_worker > 0
    workers = min(split.workers, node.gpus) if gpu else -(-split.workers // nodes)
    need = workers * (trainer.host + (0 if gpu else trainer.device))
    processes = f"{counted(workers, 'train worker')} of a node"
    if split.samplers and not config.sampling.gpus_per_sampler:
        engines = -(-split.samplers // nodes)
        need += engines * planner.engine_memory(split.tensor_parallel).host
        processes += f" and {counted(engines, 'engine')}"
    if need <= have:
        return None
    ways = "use fewer workers a node, or training.offload_optimizer=false" if gpu else (
        "lower training.tokens_per_microbatch or sampling.kv_cache_gib, or add nodes"
    )  # fmt: skip
    return f"{processes} need {gigabytes(need)} of host memory, and {node.name} has {gigabytes(have)}; {ways}"


def placement_problem(planner: Planner, split: Split) -> str | None:
    """Why the nodes do not have what a split reserves, with the number of nodes that would; None when they do."""
    config, cluster = planner.config, planner.cluster
    node = cluster.node
    if planner.fits(split):
        return None
    needed = planner.nodes_needed(split)
    if needed is not None:
        have = "has" if cluster.nodes == 1 else "have"
        reserved = planner.reservations(split)
        return (
            f"the config needs {reserved.gpus:g} GPUs and {reserved.cpus:,} CPUs "
            f"({describe(config, split)}), for which {needed} x {node.name} are enough, and {cluster} {have} "
            f"{cluster.gpus:,} and {cluster.cpus:,}; give --nodes {needed}, or another split"
        )
    if config.sampling.gpus_per_sampler and split.tensor_parallel > node.gpus:
        return (
            f"an engine of the config needs {counted(split.tensor_parallel, 'GPU')} in one node, and {node.name} has "
            f"{node.gpus}; use another --node, or lower sampling.tensor_parallel_size"
        )
    return f"an engine reserves more than the {node.cpus} CPUs of {node.name}; lower sampling.cpus_per_sampler"
