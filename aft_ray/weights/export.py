"""The trainer's weights as Hugging Face files: layers are gathered one by one, and each rank writes those that it owns.

Invariants: one pass over the layers serves everything, so that each is gathered once; no rank holds more gathered
weights than one layer, and besides it the layers that it owns, in CPU memory; a gathered layer is released only after
its tensors have been used. All ranks must call these functions together, since gathering a layer that is sharded over
the ranks is a collective operation.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from aft_ray.storage.directories import DirectoryStore
from aft_ray.storage.stored_files import StoredFile
from aft_ray.weights.adapter import ADAPTER_FILE, is_adapter, merged, published_name, stored_name
from aft_ray.weights.broadcast.buckets import Layout
from aft_ray.weights.digests import tensor_digest, write_digests
from aft_ray.weights.quantized import whole_shape
from aft_ray.weights.shard_file import ShardFile
from aft_ray.weights.shard_plan import Shape, ShardPlan, plan_shards

INDEX_FILE = "model.safetensors.index.json"

# Opens a context in which parameters are whole on every rank; a collective operation when they are sharded.
Gather = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[Any]]

# "model.layers.11.mlp.up_proj.weight" belongs to the layer "model.layers.11."
_LAYER = re.compile(r"^(.*?\.\d+\.)")
# Bytes that are hashed and handed to storage at once.
_WRITE_BYTES = 8 << 20


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
    model: torch.nn.Module, wanted: Container[int] | None = None, gather: Gather = already_whole
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, whole, on its device and in its dtype; one with an adapter is merged with it, in float32.

    A tensor must be used before the next one is asked for: its layer may be released then.

    Args:
        wanted: the numbers of the layers whose tensors this rank gets; None: all. In the other layers it only takes
            part in gathering.
    """
    for number, group in enumerate(layer_groups(model)):
        with gather([parameter for _, parameter in group]):
            if wanted is None or number in wanted:
                yield from merged(model, group)


def layer_shapes(model: torch.nn.Module) -> list[dict[str, Shape]]:
    """The names and whole shapes of the weights of each layer, as `live_parameters` yields them. It gathers nothing."""
    return [
        {published_name(name): whole_shape(parameter) for name, parameter in group if not is_adapter(name)}
        for group in layer_groups(model)
    ]


def layout_of(model: torch.nn.Module, dtype: torch.dtype, bucket_bytes: int) -> Layout:
    """The layout of a broadcast of `live_parameters`. It gathers nothing."""
    shapes = {name: shape for layer in layer_shapes(model) for name, shape in layer.items()}
    return Layout.of(list(shapes), list(shapes.values()), _dtype_name(dtype), bucket_bytes)


class LayerPass:
    """The pass over the layers of one version, on one rank: it copies the layers that the rank owns to CPU memory.

    Attributes:
        plan: which rank owns which layers, and the files of the model directory.
        files: the files that this rank writes. They are whole after the pass.
        copied: whether the pass has been made. Another one gathers the layers again and copies nothing.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        dtype: torch.dtype,
        shard_bytes: int,
        rank: int = 0,
        ranks: int = 1,
        gather: Gather = already_whole,
    ) -> None:
        """
        Args:
            module: the module that DeepSpeed trains, with Hugging Face parameter names.
            dtype: the dtype in which the weights are published.
            shard_bytes: most bytes of a file that has more than one tensor.
        """
        self.module, self.rank, self.copied = module, rank, False
        self.plan = plan_shards(layer_shapes(module), _dtype_name(dtype), ranks, shard_bytes)
        self.files = [ShardFile(planned, self.plan.dtype) for planned in self.plan.of_rank(rank)]
        self._gather = gather
        self._file_of = {
            name: file
            for file, planned in zip(self.files, self.plan.of_rank(rank), strict=True)
            for name in planned.tensors
        }

    def run(self) -> None:
        """Makes the pass, on every rank."""
        own = {number for number, owner in enumerate(self.plan.owners) if owner == self.rank}
        for _ in self._copying(live_parameters(self.module, own, self._gather)):
            pass

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Makes the pass and yields every weight, on the rank that sends them all. It must be used up."""
        return self._copying(live_parameters(self.module, None, self._gather))

    def _copying(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if (file := self._file_of.get(name)) is not None:
                file.fill(name, tensor)
            yield name, tensor
        self.copied = True
        self._file_of = {}


def store_file(store: DirectoryStore, path: str, name: str, content: Any) -> StoredFile:
    """Writes a file of a model directory in pieces, which are hashed as they are written.

    Args:
        content: its bytes, as a NumPy array uint8 [bytes].
    """
    with store.create_file(path, name) as target:
        for begin in range(0, len(content), _WRITE_BYTES):
            target.write(content[begin : begin + _WRITE_BYTES].data)
    return target.entry


def describe_model(model: Any, directory: Path, plan: ShardPlan, end_ids: Sequence[int] = ()) -> None:
    """Writes the files of a model directory beside its weights: the index, the config, the generation config.

    Args:
        end_ids: the tokens that end a response, which the generation config then names; none: it stays as it is.
    """
    index = {"metadata": {"total_size": plan.bytes}, "weight_map": plan.weight_map()}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1))
    config: Any = model.config
    config = type(config).from_dict({**config.to_dict(), "dtype": plan.dtype})
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        generation: Any = copy.deepcopy(model.generation_config)
        if end_ids:
            generation.eos_token_id = list(end_ids)
        generation.save_pretrained(directory)


def write_model(layers: LayerPass, directory: Path) -> None:
    """Makes the pass and writes a model directory, each rank its files, and rank 0 those that describe the model."""
    layers.run()
    directory.mkdir(parents=True, exist_ok=True)
    store = DirectoryStore(directory)
    for file in layers.files:
        file.finish()
        store_file(store, "", file.name, file.content)
    if layers.rank == 0:
        describe_model(layers.module, directory, layers.plan)


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
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt", **write_digests(digests)})
        model.peft_config["default"].save_pretrained(str(directory))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
