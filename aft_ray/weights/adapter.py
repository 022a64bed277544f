"""Adapters on their way out of training: merged into the weights they stand beside, or by themselves.

Invariant: merging makes new tensors; neither the module's weights nor its adapters change. What is written loads with
`peft.PeftModel.from_pretrained` on the model that training began from.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aft_ray.config.run import RunConfig
from aft_ray.storage.run_dir import RunDir, local_model
from aft_ray.weights.receive_plan import EngineCall
from aft_ray.weights.version_manifest import VersionManifest, read_version_manifest

if TYPE_CHECKING:  # whoever only hands publications on goes without
    import torch

ADAPTER_FILE = "adapter_model.safetensors"
_FILES = (ADAPTER_FILE, "adapter_config.json")
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((_A, _B))


def stored_name(name: str) -> str:
    """The name of an adapter's parameter in the file that peft and vLLM read."""
    return f"base_model.model.{name.replace('.default.', '.')}"


def published_name(name: str) -> str:
    """The Hugging Face name of what a parameter belongs to: the weight itself, or the weight beside the adapter."""
    for part in (_A, _B):
        if name.endswith(part):
            return f"{name.removesuffix(part)}.weight"
    return name.replace(_BASE, ".")


def merged(model: Any, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters, those of a layer together, where they are, under their Hugging Face names.

    Where a weight W has an adapter it is W + alpha / rank * B @ A, a new tensor in float32.
    """
    beside = dict(parameters)
    for name, parameter in parameters:
        if is_adapter(name):
            continue
        tensor = parameter.detach()
        layer = name.removesuffix(f"{_BASE}weight")
        if layer + _A in beside:
            a, b = beside[layer + _A].detach().float(), beside[layer + _B].detach().float()
            config = model.peft_config["default"]
            tensor = tensor.float() + (config.lora_alpha / config.r) * (b @ a)
        yield published_name(name), tensor


def write_adapter(model: Any, directory: Path, rank: int) -> None:
    """Writes a model's adapters as a peft directory, on rank 0; the other ranks take part in gathering."""
    from safetensors.torch import save_file

    from aft_ray.weights.export import gathered, layer_groups

    tensors: dict[str, torch.Tensor] = {}
    for group in layer_groups(model):
        adapters = [(name, parameter) for name, parameter in group if is_adapter(name)]
        if not adapters:
            continue
        with gathered([parameter for _, parameter in adapters]):
            if rank == 0:
                tensors |= {stored_name(name): one.detach().to("cpu", copy=True) for name, one in adapters}
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(str(directory))


@dataclass(frozen=True, slots=True)
class FromAdapter:
    """A delivery of an adapter for the model that engines were started from, in place of the one before.

    directory: of peft's form, on shared storage, or its URI in a run directory on an object store. number: what vLLM
    tells adapters apart by; 0: the model alone, without one. objects: its files in Ray's object store, while their
    owner lives.
    """

    directory: str
    number: int
    objects: tuple[Any, ...] = ()

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """Raises TimeoutError when the objects do not reach this node in time."""
        if not self.number:
            return
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError

        try:
            arrays = ray.get(list(self.objects), timeout=timeout_s) if self.objects else []
        except GetTimeoutError:
            raise TimeoutError(f"an adapter did not arrive over the object store in {timeout_s:.0f} s") from None
        except ObjectLostError:  # its owner died with the trainer
            arrays = []
        if not arrays:
            yield self._load(local_model(self.directory))
            return
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="aft-ray-adapter-", dir=memory) as scratch:
            for name, array in zip(_FILES, arrays, strict=True):
                array.tofile(Path(scratch, name))
            yield self._load(scratch)

    def _load(self, directory: str) -> EngineCall:
        # Engines have room for one: taking this one makes vLLM forget the one before.
        return EngineCall("load", "add_lora", (adapter_request(self.number, directory),))


def adapter_request(number: int, directory: str = "loaded already") -> Any:
    """What vLLM calls an adapter by, when it is loaded and in every request."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter {number}", number, directory)


def with_adapter(manifest: VersionManifest, directory: str, offered: bool = False) -> VersionManifest:
    """The publication with its adapter for what engines take; offered: over Ray's object store, too."""
    import ray

    contents = [np.fromfile(Path(local_model(directory), name), dtype=np.uint8) for name in _FILES if offered]
    number = manifest.version + 1  # vLLM counts from 1, and version 0 may be an adapter too
    receive_plan = FromAdapter(directory, number, tuple(map(ray.put, contents)))
    return replace(manifest, receive_plan=receive_plan, adapter=number, bytes=sum(one.nbytes for one in contents))


def given_manifest(config: RunConfig) -> VersionManifest:
    """Version 0 of a run without round 0: the model as it was given, which engines were started from."""
    manifest = read_version_manifest(0, config.model.name)
    return replace(manifest, receive_plan=FromAdapter("", 0)) if config.weights.transport == "lora" else manifest


def stored_manifest(config: RunConfig, run_dir: RunDir, version: int) -> VersionManifest:
    """A version that is on disk, in the form in which the run's engines take it."""
    manifest = read_version_manifest(version, run_dir.uri(run_dir.model(version)))
    if config.weights.transport != "lora":
        return manifest
    return with_adapter(manifest, run_dir.uri(run_dir.adapter(version)))
