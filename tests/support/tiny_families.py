"""Tiny untrained models of several architectures, whose layers differ from each other as those of trained models do."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from aft_ray.weights.digests import tensor_digest, write_digests

CONTEXT, VOCABULARY = 160, 512
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "qwen2": {},  # with biases
    "qwen3": {},  # with norms of queries and keys
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str, seed: int, dtype: torch.dtype = torch.float32, tied: bool = False):
    """A model whose attention is not uniform and whose norms and biases vary, so that each tensor matters."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


def updated(model, seed: int, size: float):
    """A copy of a model with other weights, each changed at random by about `size` of their spread."""
    other = type(model)(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            spread = parameter.float().std().clamp(min=0.1 if parameter.ndim == 1 else 0.0)
            parameter.add_((torch.randn(parameter.shape) * spread * size).to(parameter.dtype))
    return other


def trainer_of(model):
    """A copy of a model that scores packed rows, as a trainer has it."""
    from aft_ray.training.forward.packed_attention import use_packed_attention
    from aft_ray.training.forward.scoring import install_scoring

    trained = copy.deepcopy(model)
    use_packed_attention(trained)
    install_scoring(trained)
    return trained


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def write(directory: Path, model, tensors=None, announced=None) -> Path:
    """Writes a model directory with one shard.

    Args:
        tensors: its weights; None: the model's.
        announced: the weights whose digests the shard has; None: those that it holds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(model.dtype)[6:]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(model) if tensors is None else tensors
    digests = {name: tensor_digest(tensor) for name, tensor in (announced or tensors).items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt", **write_digests(digests)})
    return directory


def score(model, prompt: list[int], response: list[int]) -> float:
    """Mean token log-probability of a response, computed with transformers."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    return sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response)) / len(response)
