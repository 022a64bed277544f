"""Loads a model from a Hugging Face directory: whole on every rank, or directly into ZeRO-3 partitions.

Invariants: only safetensors files are read, and files that do not fit the model are refused. When it loads partitions,
no rank holds more than its share of the model and one layer at a time, plus on rank 0 the file that it reads; rank 0
alone reads the files, each of them once.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aft_ray.config.messages import first_line
from aft_ray.config.run import ConfigError
from aft_ray.training.forward.packed_attention import use_packed_attention
from aft_ray.training.model.quantization import quantized_loading, settle

_INDEX_FILE, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# The layer of a tensor: "model.layers.11." of "model.layers.11.mlp.up_proj.weight".
_LAYER = re.compile(r"^(.*?\.\d+\.)")
# Buffers that older versions of transformers saved. They are computed and not trained, so they are not loaded.
_COMPUTED_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")


class LoadingError(RuntimeError):
    """A model or a training state cannot be loaded. The message is one sentence that names it."""


@dataclass(frozen=True, slots=True)
class _Assignment:
    """A tensor in the files, and the parameter or buffer of the model that it is copied to."""

    name: str
    target: torch.Tensor


def load_model(
    path: str | Path,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    config: dict[str, Any] | None = None,
    attn_implementation: str = "packed",
    quantize: str = "none",
) -> Any:
    """The causal language model of a directory or of the hub, in training mode.

    Args:
        path: a model directory, or a name on the hub.
        dtype: "float32" or "bfloat16".
        config: DeepSpeed's configuration. With ZeRO-3 the weights are partitioned as they are created, so no rank holds
            the whole model; all ranks must call this together then.
        attn_implementation: "packed", or a name of transformers' implementations. A model that cannot compute packed
            rows has the implementation that transformers takes by itself, and `cannot_share_prompts` says why.
        quantize: `lora.quantize`, the numbers that the weights of linear layers are kept in; not with ZeRO-3.

    Raises:
        LoadingError: the files do not fit the model, or are not safetensors; or the model does not have the attention.
        ConfigError: the attention is not known, or bitsandbytes is needed and cannot be imported.
    """
    check_attention(attn_implementation)
    try:
        model = _load(path, dtype, trust_remote_code, config, _of_transformers(attn_implementation), quantize)
    except (ImportError, ValueError) as error:
        if "flash" not in attn_implementation and "flex" not in attn_implementation:
            raise
        raise LoadingError(f"training.attn_implementation={attn_implementation}: {first_line(error)}") from error
    if attn_implementation == "packed":
        use_packed_attention(model)
    return model.train()


def check_attention(attn_implementation: str) -> None:
    """Raises ConfigError when transformers does not know a value of `training.attn_implementation`."""
    from transformers import AttentionInterface

    known = ("packed", "eager", *(name for name in AttentionInterface().valid_keys() if "|" not in name))
    # A name with a slash is a kernel on the hub, which transformers gets when it loads the model.
    if attn_implementation not in known and "/" not in attn_implementation:
        raise ConfigError(
            f"training.attn_implementation={attn_implementation} is not known to transformers; use one of "
            f"{', '.join(known)}"
        )


def _of_transformers(attn_implementation: str) -> str | None:
    """What transformers is to use while it loads a model; None leaves the choice to it."""
    return None if attn_implementation == "packed" else attn_implementation


def _load(
    path: str | Path,
    dtype: str,
    trust_remote_code: bool,
    config: dict[str, Any] | None,
    attention: str | None,
    quantize: str,
) -> Any:
    from transformers import AutoModelForCausalLM

    if config is not None and config["zero_optimization"]["stage"] == 3:
        return _load_partitioned(_local_directory(path), dtype, trust_remote_code, config, attention)
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **({} if quantize == "none" else quantized_loading(quantize, dtype)),
    )
    # transformers would put random values in their place.
    if missing := sorted(report["missing_keys"]):
        raise LoadingError(_missing_tensors(path, missing, model))
    if unexpected := sorted(report["unexpected_keys"]):
        raise LoadingError(_unexpected_tensors(path, unexpected, model))
    if quantize != "none":
        settle(model)
    return model


def _load_partitioned(
    directory: Path, dtype: str, trust_remote_code: bool, config: dict[str, Any], attention: str | None
) -> Any:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.initialization import no_init_weights
    from transformers.integrations import HfDeepSpeedConfig

    architecture = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if get_checkpoint_conversion_mapping(architecture.model_type):
        # transformers renames or fuses the weights of such a model when it loads them (mixtures of experts), so it must
        # load them itself. Every rank then maps every file.
        zero3_marker = HfDeepSpeedConfig(config)  # transformers loads partitions as long as this object exists
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        del zero3_marker
        _recompute_buffers(model, architecture, trust_remote_code)
        return model
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=config):
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    _recompute_buffers(model, architecture, trust_remote_code)
    model.tie_weights()
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    _copy_files_into(model, directory)
    return model


def _recompute_buffers(model: Any, architecture: Any, trust_remote_code: bool) -> None:
    """Gives the partitioned model the buffers that are computed and not saved, such as rotary frequencies, in full.

    While DeepSpeed creates partitions, every new tensor is rounded to the training dtype. In bfloat16 the frequencies
    would be off by up to 0.4 %, and at position 500 a token would seem to be elsewhere than it is to an engine.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), _parameters_without_memory():
        computed = AutoModelForCausalLM.from_config(
            architecture, dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    saved = model.state_dict().keys()
    for name, buffer in computed.named_buffers():
        if name not in saved:
            module = model.get_submodule(name.rpartition(".")[0])
            old = module.get_buffer(name.rpartition(".")[2])
            old.data = buffer.to(old.device)


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """A context in which modules have parameters on the meta device, and buffers with their values."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _copy_files_into(model: Any, directory: Path) -> None:
    """Copies every tensor of the files into the partitioned model. All ranks call it together."""
    from deepspeed import zero
    from safetensors import safe_open

    is_reader = dist.get_rank() == 0
    files = _tensors_by_file(directory)
    targets = _loaded_tensors(model)
    plan = {
        file: [_Assignment(name, target) for name in names if (target := _target_of(model, targets, name)) is not None]
        for file, names in files.items()
    }
    # Only rank 0 reads the files, and sends the others what it found: if it raised alone, they would wait for it.
    mismatch = [_find_mismatch(model, directory, files, plan, targets) if is_reader else None]
    dist.broadcast_object_list(mismatch, src=0)
    if mismatch[0] is not None:
        raise LoadingError(mismatch[0])
    for file, assignments in plan.items():
        opened: Any = safe_open(directory / file, framework="pt") if is_reader else contextlib.nullcontext()
        with opened as source:
            for layer in _by_layer(assignments):
                partitioned = [one.target for one in layer if hasattr(one.target, "ds_id")]
                with zero.GatheredParameters(partitioned, modifier_rank=0), torch.no_grad():
                    for one in layer if is_reader else ():
                        one.target.copy_(source.get_tensor(one.name))
    # Buffers are not partitioned: every rank has the whole tensor.
    for buffer in (
        one.target for assignments in plan.values() for one in assignments if not hasattr(one.target, "ds_id")
    ):
        dist.broadcast(buffer, src=0)


def _find_mismatch(
    model: Any,
    directory: Path,
    files: dict[str, list[str]],
    plan: dict[str, list[_Assignment]],
    targets: dict[str, torch.Tensor],
) -> str | None:
    """Why the files do not fit the model, in one sentence; None when they do."""
    from safetensors import SafetensorError, safe_open

    filled = {id(one.target) for assignments in plan.values() for one in assignments}
    if missing := sorted({name for name, target in targets.items() if id(target) not in filled}):
        return _missing_tensors(directory, missing, model)
    known = {one.name for assignments in plan.values() for one in assignments}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    tied = {name for name in model.state_dict() if name not in targets}
    unexpected = [
        name
        for names in files.values()
        for name in names
        if name not in known | tied
        and not _COMPUTED_BUFFERS.search(name)
        and not any(one.search(name) for one in ignored)
    ]
    if unexpected:
        return _unexpected_tensors(directory, sorted(unexpected), model)
    for file, assignments in plan.items():
        try:
            with safe_open(directory / file, framework="pt") as source:
                for one in assignments:
                    shape = list(source.get_slice(one.name).get_shape())
                    expected = list(getattr(one.target, "ds_shape", one.target.shape))
                    if shape != expected:
                        return f"{one.name} in {directory / file} has the shape {shape} and the model needs {expected}"
        except (OSError, SafetensorError) as error:
            return _unreadable(directory / file, error)
    return None


def _tensors_by_file(directory: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file. Raises LoadingError if the directory has no safetensors files."""
    from safetensors import SafetensorError, safe_open

    if (directory / _INDEX_FILE).exists():
        files: dict[str, list[str]] = {}
        for name, file in json.loads((directory / _INDEX_FILE).read_text())["weight_map"].items():
            files.setdefault(file, []).append(name)
        return dict(sorted(files.items()))
    if (directory / _SINGLE_FILE).exists():
        try:
            with safe_open(directory / _SINGLE_FILE, framework="pt") as source:
                return {_SINGLE_FILE: list(source.keys())}
        except (OSError, SafetensorError) as error:
            raise LoadingError(_unreadable(directory / _SINGLE_FILE, error)) from None
    raise LoadingError(
        f"{directory} has neither {_SINGLE_FILE} nor {_INDEX_FILE}; only safetensors checkpoints are loaded"
    )


def _loaded_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that the files must hold: all parameters, tied ones once, and the buffers that are saved."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _target_of(model: Any, targets: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The parameter or buffer for a tensor of the files, None without one.

    Files that were saved from the model without its head lack the prefix that the names have here.
    """
    return targets.get(name, targets.get(f"{model.base_model_prefix}.{name}"))


def _by_layer(assignments: list[_Assignment]) -> Iterator[list[_Assignment]]:
    """The tensors of one layer after the other. They are gathered in one call, which is much faster than one each."""
    layers: dict[str, list[_Assignment]] = {}
    for one in assignments:
        match = _LAYER.match(one.name)
        layers.setdefault(match.group(1) if match else one.name, []).append(one)
    yield from layers.values()


def _unreadable(file: Path, error: Exception) -> str:
    return f"{file} cannot be read: {first_line(error)}"


def _missing_tensors(path: str | Path, names: list[str], model: Any) -> str:
    return (
        f"{path} lacks {_first_of(names)} of {type(model).__name__}; it is no whole checkpoint of this model, so give "
        f"a complete one as model.name"
    )


def _unexpected_tensors(path: str | Path, names: list[str], model: Any) -> str:
    return (
        f"{path} has {_first_of(names)}, which {type(model).__name__} has no place for: "
        f"its config.json is another model's"
    )


def _first_of(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more tensors" if len(names) > 1 else names[0]


def _local_directory(path: str | Path) -> Path:
    """The directory of a model on this machine. A model of the hub is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.py"]))
