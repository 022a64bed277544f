"""Loads new weights inside every worker process of a vLLM engine, and registers the engines that receive broadcasts.

vLLM imports this module in each of these processes, because its `worker_extension_cls` names it. Tensors have the names
and shapes of the Hugging Face checkpoint; vLLM's own loader maps them onto fused and sharded parameters. Invariant:
between `begin_weights` and `finish_weights` the model is not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aft_ray.inference.request_parameters import adapter_request
from aft_ray.inference.vllm_worker.reload import begin_reload, finish_reload
from aft_ray.weights.adapter import ADAPTER_FILE
from aft_ray.weights.arrivals import Arrivals
from aft_ray.weights.digests import read_digests, tensor_digest
from aft_ray.weights.receive_plan import GLOO_BACKEND, NCCL_BACKEND

WeightTransferEngineFactory.register_engine(
    GLOO_BACKEND, "aft_ray.inference.vllm_worker.transfer_engines", "GlooBroadcastEngine"
)
WeightTransferEngineFactory.register_engine(
    NCCL_BACKEND, "aft_ray.inference.vllm_worker.transfer_engines", "NcclBroadcastEngine"
)


class WeightLoader:
    """Methods that `worker_extension_cls` adds to vLLM's worker. A receive plan calls them in all workers at once.

    A method that returns a string says what is wrong with the weights, or nothing when it is empty. It does not raise,
    because an exception of a worker loses its type and gets another message on its way out of vLLM.
    """

    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any
    arrivals: Arrivals

    def begin_weights(self) -> None:
        """Prepares the model for new weights. The state of an earlier update that did not end is cleared."""
        from vllm.config import set_current_vllm_config

        self.arrivals = Arrivals()
        with set_current_vllm_config(self.vllm_config):
            begin_reload(self.model_runner.get_model(), self.vllm_config.model_config)

    def load_weights_file(self, path: str) -> None:
        """Loads the tensors of one safetensors file, and notes their digests and those that the file announces."""
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        device = str(self.model_runner.device)
        with set_current_vllm_config(self.vllm_config), safe_open(path, framework="pt", device=device) as file:
            self.arrivals.announce(read_digests(file.metadata()))
            # The loader keeps tensors until it has all parts of a fused layer, possibly after this file is closed.
            tensors = ((name, file.get_tensor(name).clone()) for name in file.keys())  # noqa: SIM118
            self.model_runner.get_model().load_weights(self.arrivals.watch(tensors))

    def finish_weights(self) -> str:
        """Makes the model ready to run with the weights that were loaded; says what is wrong with them."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            incomplete = finish_reload(model, self.vllm_config.model_config)
        self.model_runner.reset_lora_state()
        return self.arrivals.problem() or incomplete

    def verify_broadcast(self) -> str:
        """Says what is wrong with the weights of the broadcast that has just ended."""
        return str(self.weight_transfer_engine.problem)

    def held_digests(self) -> dict[str, int]:
        """The digest of every parameter and buffer that this process computes with, by vLLM's names.

        Where vLLM keeps only a packed copy, as for most layers on the CPU, the parameter is empty.
        """
        model = self.model_runner.get_model()
        return {name: tensor_digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def load_adapter(self, number: int, directory: str) -> str:
        """Loads a LoRA adapter in place of the one before, which may have the same number; says what is wrong with it.

        What is wrong is found before the adapter is loaded, which is then left out.
        """
        from safetensors import safe_open

        arrivals = Arrivals()
        with safe_open(Path(directory) / ADAPTER_FILE, framework="pt") as file:
            arrivals.announce(read_digests(file.metadata()))
            for _ in arrivals.watch((name, file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118
                pass
        if problem := arrivals.problem():
            return problem
        # The request is made here: as an argument of a call it would reach another process as a plain list.
        if not self.model_runner.add_lora(adapter_request(number, directory)):
            raise RuntimeError(f"vLLM did not load adapter {number} from {directory}")
        return ""
