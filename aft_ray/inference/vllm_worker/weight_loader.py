"""What runs inside every vLLM worker process: loads shards in place, and registers the engines that a meeting needs.

vLLM imports this module in each of them, as its `worker_extension_cls`. Invariant: between `begin_weights` and
`finish_weights` the model must not be run. Names and shapes are those of the Hugging Face checkpoint; vLLM's own loader
maps them onto fused and sharded parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aft_ray.weights.receive_plan import GLOO, NCCL

WeightTransferEngineFactory.register_engine(
    GLOO, "aft_ray.inference.vllm_worker.transfer_engines", "GlooBroadcastEngine"
)
WeightTransferEngineFactory.register_engine(
    NCCL, "aft_ray.inference.vllm_worker.transfer_engines", "NcclBroadcastEngine"
)


class WeightLoader:
    """Mixed into vLLM's worker through `worker_extension_cls`."""

    model_runner: Any
    vllm_config: Any

    def begin_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            get_layerwise_info,
            initialize_layerwise_reload,
        )

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
                # What an update that broke off has left is dropped: all of it is loaded anew.
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            initialize_layerwise_reload(model)

    def load_weights_file(self, path: str) -> None:
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        device = str(self.model_runner.device)
        with set_current_vllm_config(self.vllm_config), safe_open(path, framework="pt", device=device) as file:
            # The loader keeps tensors until a fused layer is whole, so they must not live in the mapped file.
            self.model_runner.get_model().load_weights((name, file.get_tensor(name).clone()) for name in file.keys())  # noqa: SIM118

    def finish_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            repack_tied_heads(model)
        self.model_runner.reset_lora_state()


def repack_tied_heads(model: torch.nn.Module) -> None:
    """On the CPU a tied lm_head multiplies by a packed copy of the embedding, which no reload refreshes."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # By exact type: an lm_head is itself a kind of VocabParallelEmbedding.
    embeddings: list[Any] = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
    packed = {embedding.weight.data_ptr() for embedding in embeddings}
    heads: list[Any] = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    for module in heads:
        if module.weight.data_ptr() in packed:
            module.quant_method.process_weights_after_loading(module)
