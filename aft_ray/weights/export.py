"""The trainer's weights as Hugging Face files: sharded parameters are gathered layer by layer and written.

Invariants: no rank holds more than one gathered layer, and rank 0 one shard of the output in addition; a gathered layer
is released only after its tensors have been used. All ranks must call these functions together, since gathering a
layer that is sharded over the ranks is a collective operation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aft_ray.weights.adapter import ADAPTER_FILE, is_adapter, merged, published_name, stored_name
from aft_ray.weights.broadcast.buckets import Layout

# Gives a shard file that was just written to a transport; returns the transport's handle of it, None for none.
PutShard = Callable[[Path], Any]

# Opens a context in which parameters are whole on every rank; a collective operation when they are sharded.
Gather = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[Any]]

# "model.layers.11.mlp.up_proj.weight" belongs to the layer "model.layers.11."
_LAYER = re.compile(r"^(.*?\.\d+\.)")


@dataclass(slots=True)
class WrittenModel:
    """The shard files of a model directory in loading order, the transport's handles of them, and the bytes of all."""

    shards: list[str] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    bytes: int = 0


def layer_groups(model: torch.nn.Module) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """The named parameters of each layer, in the model's order; tied parameters occur once.

    Raises:
        ValueError: the model has weights that are not parameters.
    """
    groups: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        match = _LAYER.match(name)
        groups.setdefault(match.group(1) if match else published_name(name), []).append((name, parameter))
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    if others := {published_name(name) for name in model.state_dict().keys() - parameters.keys()} - tied:
        raise ValueError(
            f"this model keeps weights outside its parameters, which cannot be published: {sorted(others)}"
        )
    return list(groups.values())


def already_whole(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of a model that is not sharded.

    Raises:
        ValueError: DeepSpeed's ZeRO stage 3 has sharded a parameter.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError("ZeRO stage 3 has sharded this model; pass a function that gathers its parameters")
    return nullcontext()


def live_parameters(
    model: torch.nn.Module, keep: bool, gather: Gather = already_whole
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, whole, on its device and in its dtype; one with an adapter is merged with it, in float32.

    A tensor must be used before the next one is asked for: its layer may be released then.

    Args:
        keep: whether this rank gets the tensors (rank 0); the other ranks only take part in gathering.
    """
    for group in layer_groups(model):
        with gather([parameter for _, parameter in group]):
            if keep:
                yield from merged(model, group)


def named_tensors(
    model: torch.nn.Module, dtype: torch.dtype, keep: bool, gather: Gather = already_whole
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights as copies on the CPU, in `dtype`."""
    for name, tensor in live_parameters(model, keep, gather):
        yield name, tensor.to("cpu", dtype, copy=True)


def layout_of(model: torch.nn.Module, dtype: torch.dtype, bucket_bytes: int) -> Layout:
    """The layout of a broadcast of `live_parameters`. It gathers nothing."""
    parameters = [pair for group in layer_groups(model) for pair in group if not is_adapter(pair[0])]
    # A ZeRO-3 parameter has its whole shape in `ds_shape`.
    shapes: list[Any] = [p.ds_shape if hasattr(p, "ds_shape") else p.shape for _, p in parameters]
    return Layout.of(
        [published_name(name) for name, _ in parameters], shapes, str(dtype).removeprefix("torch."), bucket_bytes
    )


def write_model(
    model: torch.nn.Module,
    directory: Path,
    shard_bytes: int,
    put_shard: PutShard,
    rank: int,
    dtype: torch.dtype,
    gather: Gather = already_whole,
) -> WrittenModel:
    """Writes config.json and the safetensors shards of a model on rank 0; the other ranks take part in gathering.

    Args:
        model: the module that DeepSpeed trains, with Hugging Face parameter names.
        shard_bytes: most bytes of a shard that has more than one tensor.
        put_shard: called with the path of each shard once it is written.
    """
    written = WrittenModel()
    if rank != 0:
        for _ in named_tensors(model, dtype, False, gather):
            pass
        return written
    directory.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        from safetensors.torch import save_file

        name = f"model-{len(written.shards) + 1:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        written.shards.append(name)
        if (handle := put_shard(directory / name)) is not None:
            written.handles.append(handle)
        shard.clear()

    for name, tensor in named_tensors(model, dtype, True, gather):
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        written.bytes += tensor.nbytes
    flush()
    index_file = {"metadata": {"total_size": written.bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    config: Any = model.config
    config = type(config).from_dict({**config.to_dict(), "dtype": str(dtype).removeprefix("torch.")})
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        generation: Any = model.generation_config
        generation.save_pretrained(directory)
    return written


def write_adapter(model: Any, directory: Path, rank: int, gather: Gather = already_whole) -> None:
    """Writes a model's LoRA adapter as a peft directory on rank 0; the other ranks take part in gathering.

    `peft.PeftModel.from_pretrained` loads it onto the model that training began from.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for group in layer_groups(model):
        adapters = [(name, parameter) for name, parameter in group if is_adapter(name)]
        if not adapters:
            continue
        with gather([parameter for _, parameter in adapters]):
            if rank == 0:
                tensors |= {stored_name(name): one.detach().to("cpu", copy=True) for name, one in adapters}
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(str(directory))
