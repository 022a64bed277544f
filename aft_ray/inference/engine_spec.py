"""The specification of an engine, and the vLLM engine arguments and environment variables that it stands for.

Samplers and the service start their engines with these arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aft_ray.cluster.compat import lora_ranks
from aft_ray.config.run import LoraConfig
from aft_ray.weights.receive_plan import GLOO_BACKEND, NCCL_BACKEND


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The model, the size and the parallelism of an engine.

    Attributes:
        model: a local directory or a hub name.
        eos_token_ids: the tokens that end a response. The engine is started without a tokenizer that would know them.
        threads: CPU threads of each of the engine's processes, of which there are
            tensor_parallel_size x pipeline_parallel_size.
        shared_gpus: ids of the GPUs that train workers use while the engine sleeps; empty when the engine has GPUs of
            its own.
        receives_broadcasts: whether the engine can receive new weights as a stream from the trainer.
        max_num_seqs: the most sequences that run at once; None: vLLM's own number for the hardware.
        gpu_memory_utilization: the share of the whole memory of each of its GPUs that the engine uses.
        lora: the adapters that the engine takes in place of new weights; None when it takes none.
        core_process: whether vLLM's engine core runs in a process of its own; None: on GPUs alone, because it takes
            half a minute to start. The core of executor "ray" is always in this process.
        arguments: more of vLLM's engine arguments, by name; they take precedence over those of this specification.
    """

    model: str
    eos_token_ids: tuple[int, ...]
    dtype: str
    max_length: int
    max_num_seqs: int | None
    gpu: bool
    threads: int = 1
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    seed: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    shared_gpus: tuple[str, ...] = ()
    receives_broadcasts: bool = False
    lora: LoraConfig | None = None
    core_process: bool | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def executor(self) -> Literal["uni", "mp", "ray"]:
        """vLLM's executor. It runs the engine in this process, in child processes or in Ray actors on several nodes."""
        if self.tensor_parallel_size * self.pipeline_parallel_size == 1:
            return "uni"
        return "ray" if self.gpu and self.pipeline_parallel_size > 1 else "mp"

    @property
    def has_core_process(self) -> bool:
        """Whether vLLM's engine core runs in a process of its own."""
        if self.executor == "ray":
            return False  # as a process of its own it would join Ray as another job
        return self.gpu if self.core_process is None else self.core_process


def prepare_environment(spec: EngineSpec) -> None:
    """Sets the environment variables that vLLM reads. Call it before this process imports vllm."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.update(engine_environment(spec))
    if spec.shared_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.shared_gpus)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if spec.has_core_process else "0"


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """The environment variables that every process of such an engine needs."""
    if spec.gpu:
        return {}
    return {
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(spec.kv_cache_gib))),
        # With its default, vLLM pins all engines of a machine to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(spec.threads),
        # Without this the first request that asks for log-probabilities compiles for half a minute.
        "TORCH_COMPILE_DISABLE": "1",
    }


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs.

    Raises:
        ValueError: vLLM takes no adapters of the rank that `spec.lora` has.
    """
    arguments: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "max_model_len": spec.max_length,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": spec.seed,
        "trust_remote_code": spec.trust_remote_code,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "pipeline_parallel_size": spec.pipeline_parallel_size,
        "distributed_executor_backend": spec.executor,
        "load_format": "safetensors",
        "worker_extension_cls": "aft_ray.inference.vllm_worker.weight_loader.WeightLoader",
        # Sampling must not take defaults from the model's own generation_config.json.
        "generation_config": "vllm",
    }
    if spec.max_num_seqs is not None:
        arguments["max_num_seqs"] = spec.max_num_seqs
    if spec.receives_broadcasts:
        arguments |= {"weight_transfer_config": {"backend": NCCL_BACKEND if spec.gpu else GLOO_BACKEND}}
    if spec.lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": _max_lora_rank(spec.lora.rank),
            # An output layer with adapters could not score a prompt: vLLM computes its logits for one token only.
            "lora_target_modules": list(spec.lora.targets),
        }
    if spec.gpu:
        arguments |= {
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "enable_sleep_mode": bool(spec.shared_gpus),
        }
    else:
        # Requests with a seed crash the CPU engine when a prompt is split over several steps (chunked prefill).
        arguments |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, spec.max_length),
        }
    return arguments | dict(spec.arguments)


def _max_lora_rank(rank: int) -> int:
    """The smallest of vLLM's maximal ranks that has room for adapters of rank `rank`; ValueError when none has."""
    supported: list[int] = sorted(get_args(lora_ranks()))
    if rank > supported[-1]:
        raise ValueError(f"vLLM takes adapters up to rank {supported[-1]}, not lora.rank={rank}; use another transport")
    return next(size for size in supported if size >= rank)
