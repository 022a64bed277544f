"""The choices of `training` and `lora` that exclude each other, and values that earlier releases had."""

import pytest

from aft_ray.config import sections
from aft_ray.config.loader import parse_section
from aft_ray.config.run import ConfigError, RunConfig, TrainingConfig, parse_config

MINIMAL = {"run_dir": "runs/x", "model": {"name": "some/model"}}


def refusal(tree, overrides=()):
    with pytest.raises(ConfigError) as error:
        parse_section(RunConfig, {**MINIMAL, **tree}, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("old", "mode"), [(True, "full"), (False, "none")])
def test_activation_checkpointing_takes_the_values_of_earlier_releases_with_a_line(old, mode, caplog):
    sections._report_former_value.cache_clear()
    for _ in range(2):
        config = parse_config({**MINIMAL, "training": {"activation_checkpointing": old}})
        assert config.training.activation_checkpointing == mode
    assert [record.message for record in caplog.records] == [
        f"training.activation_checkpointing={str(old).lower()} is now called {mode}; the old value is still understood "
        f"in this release"
    ]
    assert config.tree()["training"]["activation_checkpointing"] == mode


def test_activation_checkpointing_has_three_modes_and_no_others():
    for mode in ("none", "selective", "full"):
        training = parse_section(TrainingConfig, {}, [f"activation_checkpointing={mode}"])
        assert training.activation_checkpointing == mode
    assert refusal({}, ["training.activation_checkpointing=partial"]) == (
        "training.activation_checkpointing='partial': input should be 'none', 'selective' or 'full'"
    )


@pytest.mark.parametrize("given", ["[0.9, 0.95]", "0.9,0.95", "(0.9, 0.95)"])
def test_betas_are_given_in_the_file_or_on_the_command_line(given):
    assert parse_section(TrainingConfig, {}, [f"betas={given}"]).betas == (0.9, 0.95)
    config = parse_section(TrainingConfig, {"betas": [0.9, 0.95]})
    assert config.betas == (0.9, 0.95)
    assert config.tree()["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.betas=[0.9, 1.0]", "training.betas"),
        ("training.betas=0.9", "training.betas"),
        ("training.betas=[a, b]", "training.betas"),
        ("training.eps=0", "training.eps"),
        ("training.schedule=exponential", "training.schedule"),
        ("training.min_learning_rate_ratio=1.5", "training.min_learning_rate_ratio"),
        ("training.optimizer=lion", "training.optimizer"),
        ("training.compile=maybe", "training.compile"),
        ("lora.quantize=int4", "lora.quantize"),
    ],
)
def test_a_wrong_value_names_its_key(override, key):
    assert refusal({}, [override]).startswith(key)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"training": {"optimizer": "adamw_8bit", "offload_optimizer": True, "zero_stage": 2}},
            "training.optimizer=adamw_8bit does not go with training.offload_optimizer",
        ),
        ({"training": {"optimizer": "paged_adamw_8bit"}}, "without a GPU use adamw_8bit"),
        ({"lora": {"quantize": "nf4"}, "training": {"zero_stage": 3}}, "needs training.zero_stage of at most 2, not 3"),
        ({"lora": {"quantize": "nf4"}, "weights": {"transport": "lora"}}, "use object_store or checkpoint"),
    ],
)
def test_choices_that_exclude_each_other_are_refused_with_the_way_out(tree, sentence):
    assert sentence in refusal(tree)
