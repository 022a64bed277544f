"""Parameter counts are exact: every preset is compared with the model that transformers builds without weights."""

import pytest
import torch
from architectures import config_of, hugging_face_config
from transformers import AutoConfig, AutoModelForCausalLM

from aft_ray.config.run import ConfigError
from aft_ray.planning.plan.architecture import PRESETS, architecture_of, from_transformers


def built(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_preset_counts_what_transformers_builds(preset):
    config = hugging_face_config(preset)
    model = built(config)
    assert preset.parameters == sum(p.numel() for p in model.parameters())
    assert preset.layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    assert from_transformers(preset.name, config) == preset
    names = {name: tuple(reversed(module.weight.shape)) for name, module in linears(model.model.layers[0])}
    assert preset.linears() == names


def linears(layer):
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name.rpartition(".")[2], module


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("huggyllama/llama-7b", 6_738_415_616),
        ("huggyllama/llama-13b", 13_015_864_320),
        ("huggyllama/llama-65b", 65_285_660_672),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
    ],
)
def test_the_published_counts(name, parameters):
    assert architecture_of(config_of(name)).parameters == parameters


@pytest.mark.parametrize("options", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": False}])
def test_biases_and_untied_heads_are_counted(options):
    small = PRESETS["meta-llama/llama-3.2-1b"]
    config = hugging_face_config(small, num_hidden_layers=2, **options)
    assert from_transformers("x", config).parameters == sum(p.numel() for p in built(config).parameters())


def test_a_directory_is_read_rather_than_a_preset(tiny_model):
    sizes = architecture_of(config_of(tiny_model))
    assert (sizes.layers, sizes.hidden, sizes.tied) == (2, 64, True)


def test_a_model_of_another_architecture_is_refused_by_name(tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type is gpt2, and the formulas are those of llama"):
        architecture_of(config_of(tmp_path))


def test_adapters_are_counted_as_peft_makes_them():
    from peft import LoraConfig, get_peft_model

    preset = PRESETS["meta-llama/llama-3.2-1b"]
    targets = ["q_proj", "v_proj", "up_proj"]
    with torch.device("meta"):
        adapted = get_peft_model(built(hugging_face_config(preset)), LoraConfig(r=8, target_modules=targets))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert preset.lora_parameters(8, targets) == trained
    with pytest.raises(ConfigError, match=r"lora\.targets has c_attn, which is no linear layer of .*; it has q_proj"):
        preset.lora_parameters(8, ["c_attn"])
