"""Recomputing activations: what it saves, and that it changes no gradient."""

import pytest
import torch
from rank_cases import run_cases
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from aft_ray.config.run import LoraConfig
from aft_ray.training.model.decoder_layers import decoder_layers, recompute_activations
from aft_ray.training.model.lora import add_adapters

MODES = ["none", "selective", "full"]
TOKENS = torch.arange(1, 61).reshape(2, 30)


class Alive(TorchDispatchMode):
    """Remembers the storages that operations make, and how many bytes of them are still held."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


def run(mode, attention="sdpa", lora=False):
    """The loss and the gradients of one pass, and the bytes that it held before its backward half."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=3, attn_implementation=attention, **sizes)
    model = LlamaForCausalLM(config).train()
    if lora:
        add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "up_proj"], dropout=0.3), "none")
    recompute_activations(model, mode)
    assert len(decoder_layers(model)) == 3
    torch.manual_seed(1)
    with Alive() as alive:
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        held = alive.bytes()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(("attention", "lora"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_recomputed_activations_give_the_same_gradients(mode, attention, lora):
    loss, gradients, _ = run("none", attention, lora)
    again, recomputed, _ = run(mode, attention, lora)
    assert again == loss
    assert recomputed.keys() == gradients.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_selective_holds_less_than_none_and_more_than_full(attention):
    none, selective, full = (run(mode, attention)[2] for mode in MODES)
    assert full < 0.7 * selective
    assert selective < 0.9 * none


CASES = {
    mode: [3, "float32", None, {"activation_checkpointing": mode, "deepspeed": {"zero_optimization": options}}]
    for mode in MODES
    # Weights are asked for ahead, so that a layer gathers others when it is computed again.
    for options in ({"stage3_prefetch_bucket_size": 45_000, "stage3_max_live_parameters": 60_000},)
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gathers_of_zero_3_are_no_part_of_what_is_recomputed(tmp_path):
    results = run_cases(tmp_path, CASES)
    for mode in ("selective", "full"):
        assert results[mode]["losses"] == results["none"]["losses"]
        assert all(torch.equal(one, results[mode]["weights"][name]) for name, one in results["none"]["weights"].items())
