"""Compiled decoder layers compute what eager ones do, for rows of any length and without new names."""

import pytest
import torch
from rank_cases import run_cases
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from aft_ray.config.loader import parse_section
from aft_ray.config.run import ConfigError, TrainingConfig
from aft_ray.training.model.decoder_layers import compile_layers, recompute_activations

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a C++ compiler works for a minute or two


def model_of(mode="none"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)).train()
    recompute_activations(model, mode)
    return model


def gradients(model, length):
    tokens = torch.arange(2 * length).reshape(2, length) % 64
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_layers_give_the_same_gradients_at_every_length(mode):
    torch._dynamo.reset()
    eager, compiled = model_of(), model_of(mode)
    names = [name for name, _ in compiled.named_parameters()]
    compile_layers(compiled)
    assert [name for name, _ in compiled.named_parameters()] == names
    graphs = []
    for length in (20, 33, 47, 64):
        loss, expected = gradients(eager, length)
        ours, actual = gradients(compiled, length)
        graphs.append(counters["stats"]["unique_graphs"])
        assert ours == pytest.approx(loss, abs=1e-5)
        assert all(torch.allclose(actual[name], one, atol=1e-5) for name, one in expected.items())
    assert graphs[0] > 0
    assert len(set(graphs)) == 1  # other lengths compile nothing


def test_compiled_layers_train_at_every_stage(tmp_path):
    cases = {
        f"{stage}-{compiled}": [stage, "float32", None, {"compile": compiled, "activation_checkpointing": "full"}]
        for stage in (0, 2, 3)
        for compiled in (False, True)
    }
    results = run_cases(tmp_path, cases, ranks=1)
    for stage in (0, 2, 3):
        assert results[f"{stage}-True"]["losses"] == pytest.approx(results[f"{stage}-False"]["losses"], abs=1e-4)


def test_a_model_without_marked_layers_and_selective_recomputing_are_refused():
    with pytest.raises(ConfigError, match=r"Linear marks none as such; set training\.compile=false"):
        compile_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="must be none or full, not selective"):
        parse_section(TrainingConfig, {"compile": True, "activation_checkpointing": "selective"})
