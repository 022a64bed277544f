"""The model, from a Hugging Face directory into a module: whole, or straight into ZeRO-3 partitions.

Invariant: loaded sharded, no rank holds more at once than its share of the model and one layer, and rank 0 the file
that it reads; every file is read once, by rank 0 alone. Safetensors only.
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

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# "model.layers.11.mlp.up_proj.weight" is loaded together with all of "model.layers.11."
_LAYER = re.compile(r"^(.*?\.\d+\.)")
# Of models saved by older versions: computed, not trained.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


class LoadingError(RuntimeError):
    """A model or a training state that cannot be loaded. The message is one sentence that names it."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tensor of the checkpoint, and the parameter or buffer that takes it."""

    name: str
    target: torch.Tensor


def load_model(
    path: str | Path, dtype: str, *, trust_remote_code: bool = False, config: dict[str, Any] | None = None
) -> Any:
    """The causal language model in a directory or on the hub, safetensors only, in training mode.

    config: DeepSpeed's; under ZeRO-3 the weights are sharded as they are created, so no rank holds the whole model.
    Raises LoadingError when the files do not fit the model.
    """
    from transformers import AutoModelForCausalLM

    if config is not None and config["zero_optimization"]["stage"] == 3:
        return _load_sharded(_directory(path), dtype, trust_remote_code, config).train()
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    # Transformers would begin with random values in their place.
    if missing := sorted(report["missing_keys"]):
        raise LoadingError(_lacks(path, missing, model))
    if unexpected := sorted(report["unexpected_keys"]):
        raise LoadingError(_has_too_much(path, unexpected, model))
    return model.train()


def _load_sharded(directory: Path, dtype: str, trust_remote_code: bool, config: dict[str, Any]) -> Any:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.initialization import no_init_weights
    from transformers.integrations import HfDeepSpeedConfig

    architecture = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if get_checkpoint_conversion_mapping(architecture.model_type):
        # Its weights change names or are fused on the way (mixtures of experts): only transformers knows how.
        # Every rank maps every file then.
        alive = HfDeepSpeedConfig(config)  # transformers looks for it while it is alive
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        del alive
        return model
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=config):
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    _fill(model, directory)
    return model


def _fill(model: Any, directory: Path) -> None:
    """Copies every tensor of the checkpoint into the partitioned model. All ranks call it together."""
    from deepspeed import zero
    from safetensors import safe_open

    reads = dist.get_rank() == 0
    files = _files(directory)
    targets = _targets(model)
    plan = {
        file: [_Wanted(name, target) for name in names if (target := _target(model, targets, name)) is not None]
        for file, names in files.items()
    }
    # Rank 0 alone looks into the files: all of them must then agree to go on, or the others would wait for it.
    verdict = [_problem(model, directory, files, plan, targets) if reads else None]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise LoadingError(verdict[0])
    for file, wanted in plan.items():
        opened: Any = safe_open(directory / file, framework="pt") if reads else contextlib.nullcontext()
        with opened as source:
            for layer in _by_layer(wanted):
                partitioned = [one.target for one in layer if hasattr(one.target, "ds_id")]
                with zero.GatheredParameters(partitioned, modifier_rank=0), torch.no_grad():
                    for one in layer if reads else ():
                        one.target.copy_(source.get_tensor(one.name))
    for buffer in (one.target for wanted in plan.values() for one in wanted if not hasattr(one.target, "ds_id")):
        dist.broadcast(buffer, src=0)


def _problem(
    model: Any,
    directory: Path,
    files: dict[str, list[str]],
    plan: dict[str, list[_Wanted]],
    targets: dict[str, torch.Tensor],
) -> str | None:
    """Why the files do not fit the model, in one sentence; None when they do."""
    from safetensors import SafetensorError, safe_open

    taken = {id(one.target) for wanted in plan.values() for one in wanted}
    if missing := sorted({name for name, target in targets.items() if id(target) not in taken}):
        return _lacks(directory, missing, model)
    known = {one.name for wanted in plan.values() for one in wanted}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    tied = {name for name in model.state_dict() if name not in targets}
    unexpected = [
        name
        for names in files.values()
        for name in names
        if name not in known | tied and not _COMPUTED.search(name) and not any(one.search(name) for one in ignored)
    ]
    if unexpected:
        return _has_too_much(directory, sorted(unexpected), model)
    for file, wanted in plan.items():
        try:
            with safe_open(directory / file, framework="pt") as source:
                for one in wanted:
                    shape = list(source.get_slice(one.name).get_shape())
                    expected = list(getattr(one.target, "ds_shape", one.target.shape))
                    if shape != expected:
                        return f"{one.name} in {directory / file} has the shape {shape} and the model needs {expected}"
        except (OSError, SafetensorError) as error:
            return _unreadable(directory / file, error)
    return None


def _files(directory: Path) -> dict[str, list[str]]:
    """The tensors of each file. Raises LoadingError when there is no safetensors checkpoint."""
    from safetensors import SafetensorError, safe_open

    if (directory / _INDEX).exists():
        files: dict[str, list[str]] = {}
        for name, file in json.loads((directory / _INDEX).read_text())["weight_map"].items():
            files.setdefault(file, []).append(name)
        return dict(sorted(files.items()))
    if (directory / _SINGLE).exists():
        try:
            with safe_open(directory / _SINGLE, framework="pt") as source:
                return {_SINGLE: list(source.keys())}
        except (OSError, SafetensorError) as error:
            raise LoadingError(_unreadable(directory / _SINGLE, error)) from None
    raise LoadingError(f"{directory} has neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are loaded")


def _targets(model: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold: parameters, tied ones once, and the buffers that are saved."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _target(model: Any, targets: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """What takes a tensor of the checkpoint; one saved from the bare model lacks the prefix of its names."""
    return targets.get(name, targets.get(f"{model.base_model_prefix}.{name}"))


def _by_layer(wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
    """Tensors that are gathered together: one layer's, since a call for each is many times slower."""
    groups: dict[str, list[_Wanted]] = {}
    for one in wanted:
        match = _LAYER.match(one.name)
        groups.setdefault(match.group(1) if match else one.name, []).append(one)
    yield from groups.values()


def _unreadable(file: Path, error: Exception) -> str:
    return f"{file} cannot be read: {str(error).splitlines()[0]}"


def _lacks(path: str | Path, names: list[str], model: Any) -> str:
    return (
        f"{path} lacks {_some(names)} of {type(model).__name__}; it is no whole checkpoint of this model, so give a "
        f"complete one as model.name"
    )


def _has_too_much(path: str | Path, names: list[str], model: Any) -> str:
    return (
        f"{path} has {_some(names)}, which {type(model).__name__} has no place for: its config.json is another model's"
    )


def _some(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more tensors" if len(names) > 1 else names[0]


def _directory(path: str | Path) -> Path:
    """The local directory of a model, downloaded from the hub where it is none."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.py"]))
