"""The engine arguments of vLLM that a config may not pass through, because other keys or the program itself set them.

Every other argument of the installed vLLM may be passed through; `aft_ray.inference.installed_arguments` knows their
names. Invariant: an argument that is passed through is honoured, so one that would be overruled is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from aft_ray.config.section import ConfigError

_PLACEMENT = "it follows from where the engines are placed"
_WEIGHTS = "the program loads the weights itself"
_SCORES = "scores are the model's own log-probabilities"
_TEXT = "engines generate text"
_REVISION = "name a local directory of that revision as the model"
_ADAPTERS = "set weights.transport=lora, lora.rank and lora.targets"


def _table(*entries: tuple[str, str]) -> dict[str, str]:
    return {name: way for names, way in entries for name in names.split()}


# Argument -> what to do instead.
_ANY_ENGINE = _table(
    ("distributed_executor_backend nnodes node_rank master_addr master_port device_ids worker_cls", _PLACEMENT),
    ("load_format weight_transfer_config worker_extension_cls", _WEIGHTS),
    ("logprobs_mode", _SCORES),
    ("runner convert", _TEXT),
    ("revision code_revision", _REVISION),
)
_DATA_PARALLEL = (
    "data_parallel_size data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_address "
    "data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb "
    "data_parallel_backend"
)
SAMPLER_ARGUMENTS = _ANY_ENGINE | _table(
    ("model", "set model.name"),
    ("dtype", "set model.dtype"),
    ("max_model_len", "set model.max_length"),
    ("trust_remote_code", "set model.trust_remote_code"),
    ("seed", "set seed"),
    ("tensor_parallel_size", "set sampling.tensor_parallel_size"),
    ("pipeline_parallel_size", "set sampling.pipeline_parallel_size"),
    ("max_num_seqs", "set sampling.max_num_seqs"),
    ("gpu_memory_utilization", "set sampling.gpu_memory_utilization"),
    (_DATA_PARALLEL, "set sampling.samplers, each of which is an engine"),
    ("enable_sleep_mode", "set sampling.colocate"),
    ("enable_lora max_loras max_cpu_loras max_lora_rank lora_target_modules", _ADAPTERS),
    ("skip_tokenizer_init tokenizer tokenizer_mode tokenizer_revision", "engines get token ids and have no tokenizer"),
    ("generation_config override_generation_config", "set sampling.temperature, sampling.top_p or sampling.max_tokens"),
    (
        "quantization quantization_config",
        "engines take the weights that are trained, and rounded ones would score otherwise than the trainer does, so "
        "that a publication could not be verified",
    ),
)
SERVICE_ARGUMENTS = _ANY_ENGINE | _table(
    ("model", "set model"),
    ("served_model_name", "set name"),
    ("dtype", "set engine.dtype"),
    ("max_model_len", "set engine.max_length"),
    ("tensor_parallel_size", "set engine.tensor_parallel_size"),
    ("pipeline_parallel_size", "set engine.pipeline_parallel_size"),
    ("max_num_seqs", "set engine.max_num_seqs"),
    ("gpu_memory_utilization", "set engine.gpu_memory_utilization"),
    (_DATA_PARALLEL, "set engine.replicas, each of which is an engine"),
    ("enable_sleep_mode", "engines of the service never sleep"),
    ("enable_lora max_loras max_cpu_loras max_lora_rank lora_target_modules", "the service loads merged weights"),
    ("skip_tokenizer_init tokenizer tokenizer_mode tokenizer_revision", "the tokenizer is the model's"),
    ("generation_config override_generation_config", "set the keys of answering"),
)
# The same for engines without GPUs, whose section has the key `kv_cache_gib`.
CPU_ARGUMENTS = _table(
    ("kv_cache_memory_bytes", "set kv_cache_gib"),
    ("enable_chunked_prefill", "vLLM's CPU engine cannot split the prompts of requests that have a seed"),
)


def refuse_owned(given: Iterable[str], section: str, owned: Mapping[str, str]) -> None:
    """Raises ConfigError for the first of the given arguments that `owned` has a reason against.

    Args:
        section: the full key under which the arguments are given.
    """
    for name in given:
        if name in owned:
            raise ConfigError(f"{section}.{name} cannot be passed through: {owned[name]}")


def refuse_unknown(given: Iterable[str], section: str, known: Collection[str]) -> None:
    """Raises ConfigError for the first of the given arguments that is not known, with the nearest known one."""
    import difflib

    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"{section}.{name} is no engine argument of the installed vLLM{hint}")
