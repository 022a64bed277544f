"""What no source shows, in one place: members that are reached through objects, and differences that are handled.

A member is written as it is used: `sleep(level=_)` is a call with one argument by name, `model_runner` an attribute.
Each entry names the file that uses the members, and every member must occur in it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aft_ray.cluster.compat import MOVED_VLLM_MODULES
from gpu_signatures.touched import Use

# Objects whose class only the running program knows -> the class with their attributes.
TYPES = {
    "vllm.platforms.current_platform": "vllm.platforms.interface:Platform",
    "ray._private.state.state": "ray._private.state:GlobalState",
    "ray._private.worker.global_worker.node": "ray._private.node:Node",
}

# Modules that the GPU build has elsewhere. `aft_ray.cluster.compat.alias_moved_modules` makes the old names known.
MOVED = MOVED_VLLM_MODULES

# Modules that the GPU build lacks -> why nothing fails.
HANDLED = {
    "vllm.entrypoints.chat_utils": "only Ray's KV-aware routing imports it, which the service does not use",
}

# Modules of `aft_ray` that import only where CUDA libraries are -> why.
NEEDS_CUDA: dict[str, str] = {}

# Functions that make dicts of arguments: file, function -> the class whose fields the keys are.
ARGUMENT_DICTS = {("aft_ray/inference/engine_spec.py", "engine_arguments"): "vllm.engine.arg_utils:EngineArgs"}

# A function that makes a dict of environment variables; those of vLLM are ones that it knows.
VARIABLES = ("aft_ray/inference/engine_spec.py", "engine_environment"), "vllm/envs.py"

# vLLM's server reads its arguments from one namespace, which Ray fills with the fields of these two classes alone.
SERVER_ARGUMENTS = (
    ("vllm.entrypoints.launchers.cli_args:FrontendArgs", "vllm.engine.arg_utils:AsyncEngineArgs"),
    (
        "vllm/entrypoints/launchers/api_server/app_state.py",
        "vllm/entrypoints/launchers/app.py",
        "vllm/entrypoints/generate/api_router.py",
        "vllm/entrypoints/generate/structured_decisions/api_router.py",
        "vllm/entrypoints/pooling/factories.py",
        "vllm/entrypoints/scale_out/factories.py",
        "vllm/entrypoints/speech_to_text/factories.py",
        "vllm/entrypoints/mcp/tool_server.py",
        "vllm/plugins/endpoint_plugins/interface.py",
    ),
)


@dataclass(frozen=True)
class Members:
    """Members of a class or module that a file uses through an object."""

    target: str  # "module:Class", or a module
    file: str
    members: tuple[str, ...]


_ENGINE = "aft_ray/inference/engine.py"
_COMPAT = "aft_ray/cluster/compat.py"
_RELOAD = "aft_ray/inference/vllm_worker/reload.py"
_LOADER = "aft_ray/inference/vllm_worker/weight_loader.py"
_TRANSFER = "aft_ray/inference/vllm_worker/transfer_engines.py"
_NCCL_GROUP = "aft_ray/weights/broadcast/nccl_group.py"
_PARAMETERS = "aft_ray/inference/request_parameters.py"
_PLANS = "aft_ray/weights/receive_plan.py"
_SERVER = "aft_ray/serving/engine/server.py"
_CLIENT = "aft_ray/serving/engine/client.py"
_STEP = "aft_ray/training/step.py"
_DEEPSPEED = "aft_ray/training/deepspeed.py"
_RAY_ENGINE = "ray/llm/_internal/serve/engines/vllm/vllm_engine.py"
_RUNNER = ("get_model()", "device", "reset_lora_state()", "add_lora(_)")
_CORE = "vllm.v1.engine.core_client"

LISTED = (
    # The engine of a sampler.
    Members("vllm.v1.engine.llm_engine:LLMEngine", _ENGINE, (
        "add_request(_, _, _, lora_request=_)", "has_unfinished_requests()", "collective_rpc(_)", "step()",
        "sleep(level=_)", "wake_up(_)", "is_sleeping()",
    )),
    Members("vllm.v1.engine.llm_engine:LLMEngine", "aft_ray/inference/versioned_engine.py", (
        "collective_rpc(_, args=_)", "reset_prefix_cache()",
    )),
    Members("vllm.v1.engine.llm_engine:LLMEngine", _COMPAT, ("engine_core",)),
    Members(f"{_CORE}:SyncMPClient", _COMPAT, ("resources", "outputs_queue", "utility_results", "shutdown()")),
    Members(f"{_CORE}:InprocClient", _COMPAT, ("shutdown()",)),
    Members(f"{_CORE}:BackgroundResources", _COMPAT, ("engine_dead",)),
    Members("vllm.outputs:RequestOutput", _ENGINE, ("request_id", "finished")),
    Members("vllm.outputs:RequestOutput", _PARAMETERS, ("outputs", "prompt_token_ids", "prompt_logprobs")),
    Members("vllm.outputs:CompletionOutput", _PARAMETERS, (
        "index", "token_ids", "cumulative_logprob", "finish_reason",
    )),
    Members("vllm.logprobs:Logprob", _PARAMETERS, ("logprob",)),
    # Its worker processes, with either of vLLM's two model runners, and those of the CPU build.
    Members("vllm.v1.worker.gpu_worker:Worker", _LOADER, ("model_runner", "vllm_config", "weight_transfer_engine")),
    Members("vllm.v1.worker.cpu_worker:CPUWorker", _LOADER, ("model_runner", "vllm_config", "weight_transfer_engine")),
    Members("vllm.v1.worker.gpu_worker:Worker", _PLANS, (
        "init_weight_transfer_engine(_)", "start_weight_update()", "update_weights(_)", "finish_weight_update()",
        "shutdown_weight_transfer_engine()",
    )),
    Members("vllm.v1.worker.gpu_worker:Worker", _ENGINE, ("check_health()",)),
    Members("vllm.v1.worker.gpu_model_runner:GPUModelRunner", _LOADER, _RUNNER),
    Members("vllm.v1.worker.gpu.model_runner:GPUModelRunner", _LOADER, _RUNNER),
    Members("vllm.v1.worker.cpu_model_runner:CPUModelRunner", _LOADER, _RUNNER),
    Members("vllm.config.vllm:VllmConfig", _LOADER, ("model_config",)),
    Members("vllm.config.model:ModelConfig", _RELOAD, ("quantization",)),
    Members("vllm.platforms.interface:Platform", _RELOAD, ("is_cpu()",)),
    # The reload of weights in place.
    Members("vllm.model_executor.model_loader.reload.layerwise", _RELOAD, (
        "initialize_layerwise_reload(_)", "finalize_layerwise_reload(_, _)", "get_layerwise_info(_)",
    )),
    Members("vllm.model_executor.model_loader.reload.types:LayerReloadingInfo", _RELOAD, (
        "can_load()", "load_numel", "load_numel_total", "kernel_tensors",
    )),
    Members("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding", _RELOAD, (
        "shard_indices", "quant_method", "weight",
    )),
    Members("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices", _RELOAD, (
        "num_org_elements",
    )),
    Members("vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase", _RELOAD, (
        "process_weights_after_loading(_)",
    )),
    Members("vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase", _RELOAD, ("moe_kernel",)),
    # Broadcasts. The classes are bases of ours, so what we override, call and set has to stay.
    Members("vllm.distributed.weight_transfer.nccl_engine:NCCLWeightTransferEngine", _TRANSFER, (
        "init_transfer_engine(_)", "start_weight_update()", "finish_weight_update()", "receive_weights(_)",
        "update_weights(_)", "parse_update_info(_)", "shutdown()", "model", "model_config", "parallel_config",
        "model_update_group", "packed", "packed_buffer_size_bytes", "packed_num_buffers", "init_info_cls",
    )),
    Members("vllm.distributed.weight_transfer.nccl_common:NCCLWeightTransferInitInfo", _TRANSFER, (
        "master_address", "master_port", "rank_offset", "world_size", "packed", "packed_buffer_size_bytes",
        "packed_num_buffers",
    )),
    Members("vllm.distributed.weight_transfer.nccl_engine:NCCLWeightTransferUpdateInfo", _TRANSFER, (
        "names", "shapes", "dtype_names",
    )),
    Members("vllm.config.parallel:ParallelConfig", _TRANSFER, ("rank",)),
    Members("vllm.distributed.device_communicators.pynccl:PyNcclCommunicator", _NCCL_GROUP, (
        "broadcast(_, src=_, stream=_)", "destroy()",
    )),
    Members("vllm.distributed.device_communicators.pynccl:PyNcclCommunicator", _COMPAT, ("disabled",)),
    # The service: our subclasses of Ray's classes, and vLLM's client.
    Members("ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine", _SERVER, (
        "_start_async_llm_engine(_, _, _)", "_engine_client",
    )),
    Members("ray.llm._internal.serve.core.server.llm_server:LLMServer", _SERVER, (
        "__init__(_, engine_cls=_)", "engine", "check_health()",
    )),
    Members("vllm.config.parallel:ParallelConfig", _SERVER, ("world_size", "distributed_executor_backend")),
    Members("vllm.v1.engine.async_llm:AsyncLLM", _CLIENT, (
        "generate(_, _, _)", "collective_rpc(_, args=_)", "reset_prefix_cache()",
    )),
    # Ray's serve code.
    Members("vllm.v1.engine.async_llm:AsyncLLM", _RAY_ENGINE, (
        "__init__(vllm_config=_, executor_class=_, log_requests=_, log_stats=_, stat_loggers=_)",
        "get_supported_tasks()", "model_config", "check_health()", "reset_prefix_cache()", "sleep(level=_)",
        "wake_up(tags=_)", "is_sleeping()", "pause_generation(mode=_, clear_cache=_)", "resume_generation()",
        "is_paused()", "start_profile()", "stop_profile()", "collective_rpc(method=_, timeout=_, args=_, kwargs=_)",
    )),
    Members("vllm.engine.arg_utils:AsyncEngineArgs", _RAY_ENGINE, (
        "create_engine_config(usage_context=_)", "enable_log_requests", "disable_log_stats",
    )),
    Members("vllm.config.vllm:VllmConfig", _RAY_ENGINE, (
        "model_config", "parallel_config", "cache_config", "scheduler_config",
    )),
    Members("vllm.config.parallel:ParallelConfig", _RAY_ENGINE, ("placement_group",)),
    Members("vllm.config.cache:CacheConfig", _RAY_ENGINE, ("block_size",)),
    Members("vllm.config.scheduler:SchedulerConfig", _RAY_ENGINE, ("max_num_batched_tokens",)),
    Members("vllm.config.model:ModelConfig", _RAY_ENGINE, ("hf_config", "model")),
    Members("vllm.platforms.interface:Platform", _RAY_ENGINE, ("device_type", "get_device_capability")),
    Members("vllm.entrypoints.openai.api_server", _RAY_ENGINE, (
        "init_app_state(_, state=_, args=_, supported_tasks=_)",
        "build_app(_, supported_tasks=_, model_config=_)",
    )),
    Members("vllm.entrypoints.openai.models.serving:OpenAIServingModels", _RAY_ENGINE, (
        "lora_requests", "load_lora_adapter(request=_)",
    )),
    Members("vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat", _RAY_ENGINE, (
        "create_chat_completion(_, raw_request=_)", "create_error_response(_)",
    )),
    Members("vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion", _RAY_ENGINE, (
        "create_completion(_, raw_request=_)", "create_error_response(_)",
    )),
    Members("vllm.entrypoints.serve.tokenize.serving:ServingTokenization", _RAY_ENGINE, (
        "create_tokenize(_, raw_request=_)", "create_detokenize(_, raw_request=_)",
    )),
    Members("vllm.entrypoints.serve.engine.protocol:ErrorResponse", _RAY_ENGINE, ("error",)),
    Members("vllm.entrypoints.serve.engine.protocol:ErrorInfo", _RAY_ENGINE, ("message",)),
    # DeepSpeed, which is imported by a function, and its engine.
    Members("deepspeed", _DEEPSPEED, ("initialize(model=_, model_parameters=_, config=_)",)),
    Members("deepspeed.runtime.engine:DeepSpeedEngine", _STEP, (
        "backward(_)", "step()", "set_gradient_accumulation_boundary(_)", "was_step_applied()", "optimizer", "module",
        "device", "zero_optimization_stage()", "get_global_grad_norm()",
    )),
    Members("deepspeed.runtime.engine:DeepSpeedEngine", _DEEPSPEED, (
        "save_checkpoint", "load_checkpoint", "basic_optimizer", "module",
    )),
)  # fmt: skip


def listed_uses(ours: Path, site: Path) -> Iterator[Use]:
    """Yields the listed members as uses; the place of each is its first line in the file that uses it.

    Raises:
        ValueError: members do not occur in their files, so that the list is out of date.
    """
    unused = []
    for entry in LISTED:
        root = site if entry.file.startswith("ray/") else ours
        lines = (root / entry.file).read_text().splitlines()
        module, _, owner = entry.target.partition(":")
        for member in entry.members:
            node = ast.parse(member, mode="eval").body
            called = isinstance(node, ast.Call)
            name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
            line = next((n for n, text in enumerate(lines, 1) if re.search(rf"\b{name}\b", text)), None)
            if line is None:
                unused.append(f"{entry.file} does not use {name} of {entry.target}")
                continue
            attributes = (owner, name) if owner else (name,)
            positional = len(node.args) if isinstance(node, ast.Call) else 0
            keywords = frozenset(one.arg for one in node.keywords if one.arg) if isinstance(node, ast.Call) else ()
            yield Use(module, attributes, f"{entry.file}:{line}", called, positional, frozenset(keywords))
    if unused:
        raise ValueError(f"tools/gpu_signatures/listed.py is out of date: {'; '.join(unused)}")
