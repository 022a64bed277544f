"""Loads new weights inside every worker process of a vLLM engine, and registers the engines that receive broadcasts.

vLLM imports this module in each of these processes, because its `worker_extension_cls` names it. Tensors have the names
and shapes of the Hugging Face checkpoint; vLLM's own loader maps them onto fused and sharded parameters. Invariant:
between `begin_weights` and `finish_weights` the model is not run.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aft_ray.cluster.compat import embedding_classes, layerwise_reload
from aft_ray.inference.request_parameters import adapter_request
from aft_ray.weights.receive_plan import GLOO_BACKEND, NCCL_BACKEND

WeightTransferEngineFactory.register_engine(
    GLOO_BACKEND, "aft_ray.inference.vllm_worker.transfer_engines", "GlooBroadcastEngine"
)
WeightTransferEngineFactory.register_engine(
    NCCL_BACKEND, "aft_ray.inference.vllm_worker.transfer_engines", "NcclBroadcastEngine"
)


class WeightLoader:
    """Methods that `worker_extension_cls` adds to vLLM's worker. A receive plan calls them in all workers at once."""

    model_runner: Any
    vllm_config: Any

    def begin_weights(self) -> None:
        """Prepares the model for new weights. The state of an earlier update that did not end is cleared."""
        from vllm.config import set_current_vllm_config

        reload, model = layerwise_reload(), self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            if any(reload.get_layerwise_info(layer).can_load() for layer in model.modules()):
                # An earlier update did not end. Finalizing clears its state; all weights are loaded again now.
                reload.finalize_layerwise_reload(model, self.vllm_config.model_config)
            reload.initialize_layerwise_reload(model)

    def load_weights_file(self, path: str) -> None:
        """Loads the tensors of one safetensors file."""
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        device = str(self.model_runner.device)
        with set_current_vllm_config(self.vllm_config), safe_open(path, framework="pt", device=device) as file:
            # The loader keeps tensors until it has all parts of a fused layer, possibly after this file is closed.
            self.model_runner.get_model().load_weights((name, file.get_tensor(name).clone()) for name in file.keys())  # noqa: SIM118

    def finish_weights(self) -> None:
        """Makes the model ready to run with the weights that were loaded."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            layerwise_reload().finalize_layerwise_reload(model, self.vllm_config.model_config)
            repack_tied_heads(model)
        self.model_runner.reset_lora_state()

    def load_adapter(self, number: int, directory: str) -> None:
        """Loads a LoRA adapter in place of the one before, which may have the same number."""
        # The request is made here: as an argument of a call it would reach another process as a plain list.
        if not self.model_runner.add_lora(adapter_request(number, directory)):
            raise RuntimeError(f"vLLM did not load adapter {number} from {directory}")


def repack_tied_heads(model: torch.nn.Module) -> None:
    """On the CPU, makes the packed copies of a tied output layer again.

    A tied lm_head multiplies by a packed copy of the embedding there, which vLLM's reload does not refresh.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    embedding_class, head_class = embedding_classes()
    # The exact type is compared, because the class of heads is a subclass of that of embeddings.
    embeddings: list[Any] = [m for m in model.modules() if type(m) is embedding_class]
    packed = {embedding.weight.data_ptr() for embedding in embeddings}
    heads: list[Any] = [m for m in model.modules() if isinstance(m, head_class)]
    for module in heads:
        if module.weight.data_ptr() in packed:
            module.quant_method.process_weights_after_loading(module)
