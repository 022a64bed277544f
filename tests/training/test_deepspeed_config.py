"""DeepSpeed's configuration, read by DeepSpeed's own classes, and what `training.deepspeed` may add to it."""

import subprocess
import sys

import pytest
import torch

from aft_ray.config.loader import parse_section
from aft_ray.config.run import ConfigError, TrainingConfig
from aft_ray.training.deepspeed_config import check_options, config_lines, ds_config
from aft_ray.training.deepspeed_import import import_deepspeed

GPU = {"gpus_per_worker": 1, "workers": 8}


def parsed(training, dtype="bfloat16"):
    """The configuration as DeepSpeed's engine reads it."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(ds_config(training, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stage", range(4))
def test_what_deepspeed_reads_on_gpus(stage, dtype):
    config = parsed(TrainingConfig(zero_stage=stage, max_grad_norm=0.7, **GPU), dtype)
    zero = config.zero_config
    sharded = max(stage, 1) if dtype == "bfloat16" else stage
    assert (config.zero_optimization_stage, config.zero_enabled) == (sharded, sharded > 0)
    assert zero.overlap_comm is (sharded >= 2)
    assert (zero.reduce_bucket_size, zero.allgather_bucket_size, zero.prefetch_bucket_size) == (50_000_000,) * 3
    assert (zero.offload_optimizer, zero.offload_param) == (None, None)
    assert (zero.contiguous_gradients, zero.reduce_scatter, zero.zero_hpz_partition_size) == (True, True, 1)
    assert (zero.sub_group_size, zero.max_live_parameters) == (1_000_000_000, 1_000_000_000)  # as aft-ray plan assumes
    assert config.bfloat16_config.enabled is (dtype == "bfloat16")
    assert not config.float16_config.enabled
    assert not config.bfloat16_config.bf16_master_weights_and_grads
    assert config.communication_data_type is torch.float32
    assert config.grad_accum_dtype == "fp32"
    assert config.gradient_clipping == 0.7
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (1, 1)
    assert (config.gradient_allreduce_op, config.prescale_gradients) == ("mean", False)
    assert config.zero_allow_untested_optimizer
    assert config.optimizer_name is None
    assert config.scheduler_name is None
    assert config.steps_per_print is None


@pytest.mark.parametrize(("stage", "parameters"), [(1, False), (2, False), (3, False), (3, True)])
@pytest.mark.parametrize("gpus", [0, 1])
def test_what_deepspeed_reads_of_offloading(stage, parameters, gpus):
    training = TrainingConfig(
        zero_stage=stage, offload_optimizer=True, offload_parameters=parameters, gpus_per_worker=gpus
    )
    zero = parsed(training).zero_config
    assert (zero.offload_optimizer.device, zero.offload_optimizer.pin_memory) == ("cpu", gpus == 1)
    if parameters:
        assert (zero.offload_param.device, zero.offload_param.pin_memory) == ("cpu", gpus == 1)
    else:
        assert zero.offload_param is None
    assert zero.overlap_comm is (gpus == 1 and stage >= 2)


def test_the_configuration_needs_neither_torch_nor_deepspeed():
    program = (
        "import sys; from aft_ray.config.run import TrainingConfig; from aft_ray.training.deepspeed_config import *;"
        "config_lines(TrainingConfig(), 'float32'); check_options(TrainingConfig(), 'float32');"
        "print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_further_keys_of_deepspeed_are_merged_into_the_runs():
    given = {"zero_optimization": {"zero_hpz_partition_size": 8, "zero_quantized_weights": True}}
    training = TrainingConfig(zero_stage=3, **GPU, deepspeed=given)
    check_options(training, "bfloat16")
    config = parsed(training)
    assert (config.zero_config.zero_hpz_partition_size, config.zero_config.zero_quantized_weights) == (8, True)
    assert config.zero_config.reduce_bucket_size == 50_000_000  # the run's own keys of the section stay
    assert {"  zero_hpz_partition_size: 8", "  stage: 3"} <= set(config_lines(training, "bfloat16"))


def test_values_take_the_place_of_the_runs_under_either_name():
    given = {
        "communication_data_type": "bf16",
        "zero_optimization": {"prefetch_bucket_size": 7, "offload_optimizer": {"pin_memory": False}},
    }
    training = TrainingConfig(zero_stage=3, offload_optimizer=True, deepspeed=given)
    check_options(training, "bfloat16")
    config = parsed(training)
    assert config.communication_data_type is torch.bfloat16
    assert config.zero_config.prefetch_bucket_size == 7
    assert (config.zero_config.offload_optimizer.device, config.zero_config.offload_optimizer.pin_memory) == (
        "cpu",
        False,
    )


def test_keys_are_given_on_the_command_line():
    overrides = ["zero_stage=3", "workers=4", "deepspeed.zero_optimization.zero_hpz_partition_size=2"]
    assert parse_section(TrainingConfig, {}, overrides).deepspeed == {
        "zero_optimization": {"zero_hpz_partition_size": 2}
    }


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"wall_clock_breakdwn": True}, r"does not know training.deepspeed.wall_clock_breakdwn; did you mean wall_cl"),
        (
            {"zero_optimization": {"zero_hpz_partition_siz": 8}},
            r"training.deepspeed.zero_optimization.zero_hpz_partition_siz; did you mean zero_hpz_partition_size\?",
        ),
        (
            {"zero_optimization": {"leaf_module": {"clases": []}}},
            r"training.deepspeed.zero_optimization.leaf_module.clases; did you mean classes\?",
        ),
        ({"flops_profiler": {"profile_stp": 3}}, r"flops_profiler.profile_stp; did you mean profile_step\?"),
        ({"tensorboard": {"output_pat": "x"}}, r"tensorboard.output_pat; did you mean output_path\?"),
        ({"xyzzy": 1}, r"does not know training.deepspeed.xyzzy; its documentation lists the known ones"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, r"reduce_bucket_size=-1: input should be greater than 0"),
        ({"communication_data_type": "fp33"}, r"DeepSpeed [\d.]+ refuses training.deepspeed: .*communication_data_ty"),
        ({"elasticity": {"enabled": True}}, r"refuses training.deepspeed: Elastic training has been removed"),
        ({"wandb": "yes"}, r"training.deepspeed.wandb='yes': input should be a valid dictionary"),
    ],
)
def test_what_the_installed_deepspeed_does_not_take_is_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        check_options(TrainingConfig(zero_stage=3, deepspeed=given), "bfloat16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"deepspeed": {"train_batch_size": 64}}, "train_batch_size is what training.groups_per_step sets; remove it"),
        ({"deepspeed": {"gradient_clipping": 1}}, "gradient_clipping is what training.max_grad_norm sets"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "training.deepspeed.bf16 is what model.dtype sets"),
        ({"deepspeed": {"optimizer": {"type": "Lion"}}}, "optimizer is what training.optimizer sets"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "zero_optimization.stage is what training.zero_stage sets",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme"}}}, "zero_stage": 3},
            "zero_optimization.offload_param.device is what training.offload_parameters sets",
        ),
        (
            {"deepspeed": {"zero_optimization": {"zero_quantized_gradients": True}}, "zero_stage": 3},
            "zero_quantized_gradients is not for a run: DeepSpeed's kernel reads gradients as float16",
        ),
        ({"deepspeed": {"gradient_allreduce_op": "sum"}}, "gradient_allreduce_op is not for a run: the losses"),
        ({"deepspeed": {"steps_per_print": "auto"}}, "steps_per_print=auto has no meaning here"),
        ({"deepspeed": {"zero_optimization": {"reduce_bucket_size": 9}}}, "needs training.zero_stage of at least 1"),
        (
            {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_stage": 2, "workers": 4},
            "zero_hpz_partition_size needs training.zero_stage=3, not 2",
        ),
        (
            {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 3}}, "zero_stage": 3, "workers": 4},
            "zero_hpz_partition_size=3 does not divide training.workers=4",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "zero_stage": 3},
            "zero_optimization.offload_optimizer needs training.offload_optimizer=true",
        ),
        ({"deepspeed": {"zero_optimization": 3}}, "zero_optimization=3 must be a section of keys"),
    ],
)
def test_what_the_run_sets_itself_is_refused_with_the_key_that_sets_it(tree, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_section(TrainingConfig, tree)
