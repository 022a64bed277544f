"""The trainer's end of a publication: DeepSpeed's shards, gathered a layer at a time, written as Hugging Face files.

Invariant: no rank ever holds more than one layer group and rank 0 one shard of the output; nothing gathered is freed
before it is written. All ranks must call `write_model`, since gathering a ZeRO-3 layer is a collective.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aft_ray.weights.adapter import is_adapter, merged, published_name
from aft_ray.weights.broadcast.layout import Layout

# Offers a shard file that was just written; returns its handle, None for none.
Offer = Callable[[Path], Any]

# "model.layers.11.mlp.up_proj.weight" belongs to the group "model.layers.11."
_LAYER = re.compile(r"^(.*?\.\d+\.)")


@dataclass(slots=True)
class WrittenModel:
    """The shard files of a model directory in loading order, and the handles that the transport gave them."""

    shards: list[str] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    bytes: int = 0


def layer_groups(model: torch.nn.Module) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """The parameters by layer, in the model's order; tied parameters occur once. Raises on state outside parameters."""
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


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Makes ZeRO-3 parameters whole on every rank inside the context; nothing to do for parameters that are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)
    return context


def live_parameters(model: torch.nn.Module, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once, whole, where and as it is, but with its adapter merged into a new one in float32.

    Yields only where `keep` (rank 0), gathers everywhere. A tensor is only good until the next is asked for: then its
    layer may be given back.
    """
    for group in layer_groups(model):
        with gathered([parameter for _, parameter in group]):
            if keep:
                yield from merged(model, group)


def named_tensors(model: torch.nn.Module, dtype: torch.dtype, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The same as copies on the CPU, in `dtype`."""
    for name, tensor in live_parameters(model, keep):
        yield name, tensor.to("cpu", dtype, copy=True)


def layout_of(model: torch.nn.Module, dtype: torch.dtype, bucket_bytes: int) -> Layout:
    """What `live_parameters` would stream, without gathering anything."""
    parameters = [pair for group in layer_groups(model) for pair in group if not is_adapter(pair[0])]
    # ZeRO-3 keeps the whole shape beside the shard.
    wholes: list[Any] = [p.ds_shape if hasattr(p, "ds_shape") else p.shape for _, p in parameters]
    return Layout.of(
        [published_name(name) for name, _ in parameters], wholes, str(dtype).removeprefix("torch."), bucket_bytes
    )


def write_model(
    model: torch.nn.Module, directory: Path, shard_bytes: int, offer: Offer, rank: int, dtype: torch.dtype
) -> WrittenModel:
    """Writes config.json and the safetensors shards of a model on rank 0; the other ranks take part in gathering.

    model: the module that DeepSpeed trains, with Hugging Face parameter names. shard_bytes: most bytes a shard.
    """
    written = WrittenModel()
    if rank != 0:
        for _ in named_tensors(model, dtype, keep=False):
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
        if (handle := offer(directory / name)) is not None:
            written.handles.append(handle)
        shard.clear()

    for name, tensor in named_tensors(model, dtype, keep=True):
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
