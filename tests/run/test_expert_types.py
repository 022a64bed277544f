"""Which mixtures of experts a run admits."""

import pytest
from tiny_families import FAMILIES
from transformers import AutoConfig

from aft_ray.config.run import ConfigError
from aft_ray.run.preflight import EXPERT_TYPES, check_experts


def test_tested_types_and_models_without_experts_are_admitted():
    for family in (*EXPERT_TYPES, "llama", "gemma3", "qwen2", "phi3"):
        check_experts(AutoConfig.for_model(family))
    assert set(EXPERT_TYPES) <= FAMILIES.keys()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4"])
def test_other_types_are_refused_in_one_sentence(family):
    with pytest.raises(ConfigError, match=rf"^model\.name is a mixture of \d+ experts of the type {family}.*qwen3_moe"):
        check_experts(AutoConfig.for_model(family))
