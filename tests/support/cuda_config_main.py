"""vLLM's own configuration of engines for GPUs, computed without one: `cuda_config_main.py < SPECS`.

Reads a JSON list of pairs (fields of EngineSpec, usage context) and writes what vLLM makes of each. The platform is a
fake: an H100, or an A100, as CUDA would describe it. vLLM's code that reads the arguments is the real one.
"""

import dataclasses
import json
import os
import sys
import types

CARDS = {"h100": ("NVIDIA H100 80GB HBM3", 81_559, (9, 0)), "a100": ("NVIDIA A100-SXM4-80GB", 81_920, (8, 0))}


class _Kernels(types.ModuleType):
    """A module that has every name that is imported from it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def fake_cuda(card: str) -> None:
    """Makes vLLM see eight cards of this kind. Call it before anything of vLLM is imported."""
    # CUDA's kernels, which cannot be loaded here. No configuration uses them.
    for name in ("_C_stable_libtorch", "_C", "_moe_C", "_moe_C_stable_libtorch", "vllm_flash_attn"):
        sys.modules[f"vllm.{name}"] = _Kernels(f"vllm.{name}")
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    name, mebibytes, capability = CARDS[card]

    class FakeCuda(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return mebibytes << 20

        def is_cumem_allocator_available(self) -> bool:
            return True

        @classmethod
        def device_count(cls) -> int:
            return 8

    vllm.platforms.current_platform = FakeCuda()
    from vllm.model_executor.models import registry

    # vLLM would import the model's class, with all its kernels, to see what it can do.
    known: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "is_text_generation_model": True,
        "supports_pp": True,
        "supports_lora": True,
        "attn_type": "decoder",
        "default_seq_pooling_type": "LAST",
        "default_tok_pooling_type": "ALL",
        "score_type": "bi-encoder",
        "supported_video_pruning_methods": (),
    }
    fields = [field.name for field in dataclasses.fields(registry._ModelInfo)]
    llama = registry._ModelInfo(**{name: known.get(name, False) for name in fields})
    registry._LazyRegisteredModel.inspect_model_cls = lambda model: llama


def described(fields: dict, context: str) -> dict:
    """What vLLM makes of a specification's arguments."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from aft_ray.config.run import LoraConfig
    from aft_ray.inference.engine_spec import EngineSpec, engine_arguments

    if fields.get("lora"):
        fields["lora"] = LoraConfig(**fields["lora"])
    arguments = engine_arguments(EngineSpec(**{**fields, "eos_token_ids": (1,), "gpu": True}))
    config = EngineArgs(**arguments).create_engine_config(UsageContext[context])
    return {
        "arguments": arguments,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "cache_dtype": config.cache_config.cache_dtype,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
        "executor": str(config.parallel_config.distributed_executor_backend),
        "processes": config.parallel_config.world_size,
        "worker": config.parallel_config.worker_cls,
        "worker_extension": config.parallel_config.worker_extension_cls,
        "sleep_mode": config.model_config.enable_sleep_mode,
        "dtype": str(config.model_config.dtype),
        "max_length": config.model_config.max_model_len,
        "tokenizer": not config.model_config.skip_tokenizer_init,
        "logprobs": config.model_config.logprobs_mode,
        "weight_transfer": config.weight_transfer_config and config.weight_transfer_config.backend,
        "lora_rank": config.lora_config and config.lora_config.max_lora_rank,
        "lora_targets": config.lora_config and config.lora_config.target_modules,
        "load_format": str(config.load_config.load_format),
    }


def main(card: str) -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    fake_cuda(card)
    answers = []
    for fields, context in json.load(sys.stdin):
        answers.append(described(fields, context))
    import vllm

    sys.stdout.write("\nRESULT " + json.dumps({"vllm": vllm.__version__, "engines": answers}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
