"""Memory of a sampler's engine: its weights, what is left for the KV cache, and how many sequences the cache holds.

Sources: vLLM takes `gpu_memory_utilization` of a GPU and subtracts the weights and what a profiling pass needs; the
rest is the KV cache. How many sequences it runs at once by default is what its `EngineArgs.get_batch_defaults` says.
With PagedAttention (arXiv 2309.06180) a sequence wastes no more than a part of its last block.

Invariant: a token in the cache costs a key and a value for every layer and KV head. A tensor-parallel process holds its
share of the KV heads, and at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.hardware import NodeType
from aft_ray.planning.plan.quantities import GB, Quantity, giga
from aft_ray.planning.plan.workload import Workload

BLOCK = 16  # tokens of a block of vLLM's KV cache


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory of an engine. Bytes are those of one of its processes unless said otherwise.

    Attributes:
        weights: Bytes of the weights.
        cache: Bytes left for the KV cache; negative when the weights do not fit.
        device: Bytes on the GPU beside the KV cache.
        host: Bytes of host memory of the whole engine.
        kv_token: Bytes of one token in the KV cache.
        longest: How many sequences of model.max_length the cache holds.
        running: How many sequences the engine runs at the same time.
        lines: The arithmetic.
    """

    weights: float
    cache: float
    device: float
    host: float
    kv_token: float
    longest: int
    running: int
    lines: tuple[Quantity, ...]


def can_be_sharded(model: Architecture, processes: int) -> bool:
    """Whether vLLM can split every layer over so many processes: heads evenly, KV heads evenly or by copies."""
    kv_heads = model.kv_heads
    return model.heads % processes == 0 and (kv_heads % processes == 0 or processes % kv_heads == 0)


def default_max_num_seqs(node: NodeType, gpu: bool, processes: int) -> int:
    """How many sequences an engine runs at most when `sampling.max_num_seqs` leaves it to vLLM."""
    if not gpu:
        return 256 * processes
    return 1024 if node.gpu_memory * GB >= 70 * 2**30 and "a100" not in node.name.lower() else 256


def engine_memory(
    config: RunConfig,
    model: Architecture,
    work: Workload,
    assumptions: PlanAssumptions,
    node: NodeType,
    tensor_parallel: int,
) -> EngineMemory:
    """The memory of an engine with `tensor_parallel` processes in a stage."""
    sampling, gpu = config.sampling, config.sampling.gpus_per_sampler > 0
    width = 2 if config.model.dtype == "bfloat16" else 4
    stages = sampling.pipeline_parallel_size
    processes = tensor_parallel * stages
    weights = width * model.parameters / processes
    how = f"{width} bytes x {giga(model.parameters)}" + (f" / {processes} processes" if processes > 1 else "")
    lines = [Quantity("weights", weights, "bytes", how)]
    kv_heads = max(1, model.kv_heads // tensor_parallel)
    layers = -(-model.layers // stages)
    kv_width = 1 if str(sampling.engine_args.get("kv_cache_dtype", "")).startswith("fp8") else width
    kv_token = 2 * layers * kv_heads * model.head_size * kv_width
    if gpu:
        usable = sampling.gpu_memory_share * node.gpu_memory * GB
        reserve = assumptions.engine_reserve * GB
        cache = usable - weights - reserve
        lines.append(Quantity("CUDA graphs, one step's activations", reserve, "bytes", "assumed (engine_reserve)"))
        how = f"{sampling.gpu_memory_share:g} x {node.gpu_memory:.1f} GB less the above"
    else:
        cache = max(1, round(sampling.kv_cache_gib)) * 2.0**30
        how = f"kv_cache_gib={sampling.kv_cache_gib:g}, at least 1 GiB"
    lines.append(Quantity("left for the KV cache", cache, "bytes", how))
    tokens = max(0.0, cache / kv_token)

    def sequences(length: float) -> int:
        return int(tokens // (-(-length // BLOCK) * BLOCK))

    mean = work.prompt + work.response
    requested = sampling.in_flight * sampling.batch_size * sampling.k
    limits = {
        "max_num_seqs": sampling.max_num_seqs or default_max_num_seqs(node, gpu, processes),
        "KV cache": sequences(mean),
        "in_flight x batch_size x k": requested,
    }
    binding = min(limits, key=lambda name: limits[name])
    longest = sequences(config.model.max_length)
    lines += [
        Quantity("KV cache of a token", kv_token, "bytes", f"2 x {layers} layers x {kv_heads} heads x {model.head_size}"
               f" x {kv_width} bytes, in each process"),
        Quantity("sequences of max_length", longest, "", f"{tokens:,.0f} tokens / {config.model.max_length}"),
        Quantity("sequences at once", limits[binding], "", ", ".join(f"{n}={v:,}" for n, v in limits.items())
               + f": {binding} binds"),
    ]  # fmt: skip
    host = assumptions.process_memory * GB * processes
    if not gpu:
        host += weights * processes + cache
    elif sampling.colocate and config.weights.transport == "lora":
        host += weights * processes  # a sleeping engine keeps the weights below its adapter
    return EngineMemory(
        weights, cache, weights + (assumptions.engine_reserve * GB if gpu else 0.0), host, kv_token, longest,
        max(0, limits[binding]), tuple(lines),
    )  # fmt: skip
