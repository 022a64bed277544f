"""QLoRA: adapters on 4-bit weights. What engines get is the model that the trainer multiplies by."""

import json

import pytest
import torch
from rank_cases import run_cases
from safetensors import safe_open
from training_helpers import write_tiny_llama
from transformers import AutoModelForCausalLM

from aft_ray.config.run import LoraConfig
from aft_ray.training.model.loading import load_model
from aft_ray.training.model.lora import add_adapters
from aft_ray.weights.adapter import is_adapter
from aft_ray.weights.export import LayerPass, layer_shapes, live_parameters, write_adapter, write_model

pytest.importorskip("bitsandbytes")

LORA = LoraConfig(rank=4, alpha=6, targets=["q_proj", "v_proj", "up_proj", "lm_head"], quantize="nf4")
TOKENS = torch.arange(1, 40).reshape(3, 13)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "model")


def quantized_model(directory, dtype):
    """The model in 4 bits, with adapters that change its outputs."""
    model = load_model(directory, dtype, quantize="nf4", attn_implementation="sdpa")
    torch.manual_seed(5)
    add_adapters(model, LORA, str(directory))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_have_four_bits_and_a_step_trains_adapters_alone(directory, dtype):
    model = quantized_model(directory, dtype)
    base = load_model(directory, dtype, attn_implementation="sdpa")
    packed = {name for name, parameter in model.named_parameters() if hasattr(parameter, "quant_state")}
    linear = {name for name, one in base.named_modules() if isinstance(one, torch.nn.Linear)} - {"lm_head"}
    assert {name.removesuffix(".weight").removesuffix(".base_layer") for name in packed} == linear
    layer = model.model.layers[0].mlp.down_proj.weight
    assert layer.nbytes * 8 == 4 * base.model.layers[0].mlp.down_proj.weight.numel()
    assert all(is_adapter(name) == parameter.requires_grad for name, parameter in model.named_parameters())

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if is_adapter(name)}


def test_the_published_directory_scores_as_the_trainer_does(directory, tmp_path):
    model = quantized_model(directory, "float32").eval()
    with torch.no_grad():
        trainer = model(TOKENS).logits
        again = model(TOKENS).logits
        write_model(LayerPass(model, torch.float32, 40_000), tmp_path / "model")
        engine = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        base = AutoModelForCausalLM.from_pretrained(directory).eval()
        assert torch.equal(trainer, again)  # scoring leaves the packed weights as they are
        assert torch.allclose(engine(TOKENS).logits, trainer, atol=1e-5)
        # The adapter on the weights before quantization is another policy.
        assert (base(TOKENS).logits - trainer).abs().max() > 0.1
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    assert not any(hasattr(parameter, "quant_state") for parameter in engine.parameters())


def test_a_layer_that_has_no_adapter_is_published_as_the_trainer_multiplies_by_it(directory):
    model = quantized_model(directory, "bfloat16")
    shapes = {name: shape for layer in layer_shapes(model) for name, shape in layer.items()}
    base = dict(load_model(directory, "bfloat16", attn_implementation="sdpa").named_parameters())
    assert shapes == {name: tuple(parameter.shape) for name, parameter in base.items()}
    tensors = dict(live_parameters(model))
    name = "model.layers.1.mlp.gate_proj.weight"
    assert tensors[name].dtype is torch.bfloat16
    inputs = torch.randn(5, 64, dtype=torch.bfloat16)
    layer = model.get_submodule("model.layers.1.mlp.gate_proj")
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, tensors[name]))
    error = (tensors[name] - base[name]).float().norm() / base[name].float().norm()
    assert 0.05 < error < 0.15  # 4 bits
    assert torch.equal(tensors["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_training_state_holds_no_scales_of_packed_weights(directory, tmp_path):
    model = quantized_model(directory, "float32")
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    write_adapter(model, tmp_path / "adapter", 0)
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as stored:
        names = list(stored.keys())
        assert names
        assert {key for key in names if "lora_" not in key} == set()


CASES = {
    f"{stage}-{dtype}-{mode}": [stage, dtype, LORA.model_dump(), {"activation_checkpointing": mode}]
    for stage, dtype, mode in (
        (0, "float32", "none"),
        (1, "bfloat16", "full"),
        (2, "float32", "selective"),
        (2, "bfloat16", "none"),
    )
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("qlora")
    return work, run_cases(work, CASES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_on_4_bit_weights_and_resume_exactly(results, name):
    work, by_name = results
    one, plain = by_name[name], by_name["0-float32-none"]
    assert one["again"] == one["losses"][2:]
    assert all(torch.equal(weight, one["weights_again"][key]) for key, weight in one["weights"].items())
    # New adapters have gradients near zero, whose rounding errors AdamW makes as large as any step.
    assert one["losses"] == pytest.approx(plain["losses"], rel=0.05)
    merged = AutoModelForCausalLM.from_pretrained(work / name / "model").state_dict()
    assert merged.keys() == AutoModelForCausalLM.from_pretrained(work / "model").state_dict().keys()
