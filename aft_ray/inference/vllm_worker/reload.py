"""Loads new weights into the layers of a running vLLM model, and says whether every layer got all of its weights.

vLLM's layerwise reload prepares each layer, loads it once all of its weights are there, and repacks it for its kernel.
What it leaves out on the CPU is done here. Invariant: after `begin_reload` the model must not run until `finish_reload`
has returned, and after a reload no layer computes with anything that was made from earlier weights.
"""

from __future__ import annotations

from typing import Any

import torch

from aft_ray.cluster.compat import embedding_classes, is_attention_layer, layerwise_reload


def begin_reload(model: torch.nn.Module, model_config: Any) -> None:
    """Prepares the model for new weights. The state of an earlier reload that did not end is cleared.

    Args:
        model_config: vLLM's ModelConfig.
    """
    reload = layerwise_reload()
    if any(reload.get_layerwise_info(layer).can_load() for layer in model.modules()):
        # An earlier reload did not end. Finalizing clears its state; all weights are loaded again now.
        reload.finalize_layerwise_reload(model, model_config)
    _forget_packed_experts(model)
    reload.initialize_layerwise_reload(model)


def finish_reload(model: torch.nn.Module, model_config: Any) -> str:
    """Makes the model ready to run. Returns which layer lacks weights, as a sentence; empty when none does."""
    # Layers of a quantised engine have scales that no checkpoint of ours brings.
    problem = _incomplete_layer(model) if model_config.quantization is None else ""
    layerwise_reload().finalize_layerwise_reload(model, model_config)
    _repack_tied_heads(model)
    return problem


def _incomplete_layer(model: torch.nn.Module) -> str:
    """The first layer for which some weights did not come, as a sentence."""
    reload = layerwise_reload()
    unfinished: list[tuple[str, torch.nn.Module, Any]] = []
    owners: dict[int, int] = {}  # of each parameter, by its id: in how many layers it is
    for name, layer in model.named_modules():
        info = reload.get_layerwise_info(layer)
        for parameter in _kernel_parameters(layer, info):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        # A layer that got all of its weights was processed, and its record is empty again.
        if info.can_load() and not is_attention_layer(layer):
            unfinished.append((name, layer, info))
    for name, layer, info in unfinished:
        parameters = list(_kernel_parameters(layer, info))
        tied = bool(parameters) and all(owners[id(parameter)] > 1 for parameter in parameters)
        wanted = (
            info.load_numel_total - sum(buffer.numel() for buffer in layer.buffers(recurse=False)) - _padding(layer)
        )
        if parameters and info.load_numel < wanted and not (tied and info.load_numel == 0):
            return f"the layer {name} got {info.load_numel} of its {wanted} weights"
    return ""


def _kernel_parameters(layer: torch.nn.Module, info: Any) -> list[torch.nn.Parameter]:
    """The parameters with which the layer computes. During a reload others stand in their place."""
    parameters = layer._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
    return [parameter for parameter in parameters.values() if parameter is not None]


def _padding(layer: Any) -> int:
    """Elements of an embedding or output layer that belong to no token, so that nothing is loaded into them."""
    if not isinstance(layer, embedding_classes()):
        return 0
    rows, width = layer.weight.shape
    return int((rows - layer.shard_indices.num_org_elements) * width)


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """On the CPU, lets a mixture of experts pack its weights again after the reload.

    Its kernel multiplies by packed experts. vLLM packs them only when it builds the kernel, which a reload does not do;
    it would leave the new weights unpacked where the kernel expects packed ones. GPU kernels take the weights in a
    layout that is made again in every reload, and CUDA graphs need them in the same place: nothing is forgotten there.
    """
    if not _on_cpu():
        return
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """On the CPU, makes the packed copies of a tied output layer again.

    A tied lm_head multiplies by a packed copy of the embedding there, which vLLM's reload does not refresh.
    """
    if not _on_cpu():
        return
    embedding_class, head_class = embedding_classes()
    # The exact type is compared, because the class of heads is a subclass of that of embeddings.
    embeddings: list[Any] = [m for m in model.modules() if type(m) is embedding_class]
    packed = {embedding.weight.data_ptr() for embedding in embeddings}
    heads: list[Any] = [m for m in model.modules() if isinstance(m, head_class)]
    for module in heads:
        if module.weight.data_ptr() in packed:
            module.quant_method.process_weights_after_loading(module)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
