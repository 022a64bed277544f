"""Memory of an engine: its share of the weights, what is left for the KV cache, and how many sequences that holds.

Sources: vLLM's own account (`gpu_memory_utilization` of the GPU, less weights and what a profiling pass needs), and
PagedAttention (arXiv 2309.06180), by which nothing but the last block of a sequence is lost. Invariant: a token of the
cache costs a key and a value of every layer and KV head; a tensor-parallel process holds its share of the heads, and
at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.hardware import NodeType, device
from aft_ray.planning.plan.quantities import GB, Quantity, giga
from aft_ray.planning.plan.workload import Workload

BLOCK = 16  # tokens


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes are of one of the engine's processes. host: of the whole engine. running: sequences at once; longest: how
    many of model.max_length fit. kv_token: bytes a token of the cache, of one process."""

    weights: float
    cache: float
    device: float
    host: float
    kv_token: float
    longest: int
    running: int
    lines: tuple[Quantity, ...]


def splits(model: Architecture, parts: int) -> bool:
    """Whether vLLM can split the model's layers over so many processes: heads evenly, KV heads evenly or repeated."""
    kv_heads = model.kv_heads
    return model.heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)


def engine_memory(
    config: RunConfig,
    model: Architecture,
    work: Workload,
    assumed: PlanAssumptions,
    node: NodeType,
    tensor_parallel: int,
) -> EngineMemory:
    """Of an engine with `tensor_parallel` processes a stage. A cache below one sequence shows as longest=0."""
    sampling, gpu = config.sampling, config.sampling.gpus_per_sampler > 0
    width = 2 if config.model.dtype == "bfloat16" else 4
    stages = sampling.pipeline_parallel_size
    processes = tensor_parallel * stages
    weights = width * model.parameters / processes
    how = f"{width} bytes x {giga(model.parameters)}" + (f" / {processes} processes" if processes > 1 else "")
    lines = [Quantity("weights", weights, "bytes", how)]
    kv_heads = max(1, model.kv_heads // tensor_parallel)
    layers = -(-model.layers // stages)
    kv_token = 2 * layers * kv_heads * model.head_size * width
    if gpu:
        share = min(1.0, sampling.gpus_per_sampler)
        total = device(node, sampling.gpus_per_sampler, 0).memory or 0.0
        usable = sampling.gpu_memory_utilization * total
        reserve = assumed.engine_reserve * GB
        cache = usable - weights - reserve
        lines.append(Quantity("CUDA graphs, one step's activations", reserve, "bytes", "assumed (engine_reserve)"))
        part = f" x {share:g} of a GPU" if share < 1 else ""
        how = f"{sampling.gpu_memory_utilization:g} x {node.gpu_memory:.1f} GB{part} less the above"
    else:
        cache = max(1, round(sampling.kv_cache_gib)) * 2.0**30
        how = f"kv_cache_gib={sampling.kv_cache_gib:g}, at least 1 GiB"
    lines.append(Quantity("left for the KV cache", cache, "bytes", how))
    tokens = max(0.0, cache / kv_token)

    def fitting(length: float) -> int:
        return int(tokens // (-(-length // BLOCK) * BLOCK))

    mean = work.prompt + work.response
    asked = sampling.in_flight * sampling.batch_size * sampling.k
    limits = {"max_num_seqs": sampling.max_num_seqs, "KV cache": fitting(mean), "in_flight x batch_size x k": asked}
    binding = min(limits, key=lambda name: limits[name])
    longest = fitting(config.model.max_length)
    lines += [
        Quantity("KV cache of a token", kv_token, "bytes", f"2 x {layers} layers x {kv_heads} heads x {model.head_size}"
               f" x {width} bytes, in each process"),
        Quantity("sequences of max_length", longest, "", f"{tokens:,.0f} tokens / {config.model.max_length}"),
        Quantity("sequences at once", limits[binding], "", ", ".join(f"{n}={v:,}" for n, v in limits.items())
               + f": {binding} binds"),
    ]  # fmt: skip
    host = assumed.process_memory * GB * processes + (0 if gpu else weights * processes + cache)
    return EngineMemory(
        weights, cache, weights + (assumed.engine_reserve * GB if gpu else 0.0), host, kv_token, longest,
        max(0, limits[binding]), tuple(lines),
    )  # fmt: skip
