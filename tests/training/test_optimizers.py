"""The optimizers that a run may choose: their steps, and that a resumed one takes the very steps of the saved one."""

import sys
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from rank_cases import run_cases

from aft_ray.config.run import ConfigError, TrainingConfig, parse_config
from aft_ray.training.model.bitsandbytes_import import check_bitsandbytes
from aft_ray.training.optimizers import build_optimizer, group_settings, restore_states

has_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


def trained(optimizer_of, steps):
    """A parameter after some steps with gradients that depend on it."""
    source = torch.Generator().manual_seed(3)
    parameter = torch.nn.Parameter(torch.randn(5000, generator=source))
    optimizer = optimizer_of([parameter])
    for _ in range(steps):
        parameter.grad = parameter.detach() * torch.randn(5000, generator=source)
        optimizer.step()
    return parameter.detach(), optimizer


def test_the_settings_of_adamw_are_those_of_the_config():
    training = TrainingConfig(learning_rate=1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    ours, optimizer = trained(lambda p: build_optimizer(p, training), 20)
    assert optimizer.defaults["fused"] is True
    theirs, _ = trained(lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.9), 1e-3, 0.1, fused=False, foreach=False), 20)
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-6)
    for changed in ({"betas": (0.9, 0.9)}, {"betas": (0.8, 0.99)}, {"eps": 1e-8}, {"weight_decay": 0.0}):
        other, _ = trained(lambda p, c=changed: build_optimizer(p, training.model_copy(update=c)), 20)
        assert not torch.allclose(other, theirs, atol=1e-4, rtol=0), changed


@has_bitsandbytes
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_adamw_with_8_bit_states_stays_near_adamw(kind):
    settings = {"learning_rate": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    training = TrainingConfig(optimizer=kind, gpus_per_worker=1, **settings)
    ours, optimizer = trained(lambda p: build_optimizer(p, training), 20)
    (state,) = optimizer.state.values()
    assert {state[key].dtype for key in ("state1", "state2")} == {torch.uint8}
    exact, _ = trained(lambda p: build_optimizer(p, TrainingConfig(**settings)), 20)
    begin, _ = trained(lambda p: build_optimizer(p, TrainingConfig(**settings)), 0)
    assert (ours - exact).norm() < 0.1 * (exact - begin).norm()


@has_bitsandbytes
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_that_are_loaded_without_bitsandbytes_loader_continue_exactly(kind):
    """ZeRO 1 and 2 put the entries of a saved state dict into `optimizer.state` as they are."""
    training = TrainingConfig(optimizer=kind, gpus_per_worker=1)
    _, saved = trained(lambda p: build_optimizer(p, training), 3)
    (saved_parameter,) = saved.param_groups[0]["params"]
    parameter = torch.nn.Parameter(saved_parameter.detach().clone())
    loaded = build_optimizer([parameter], training)
    settings = group_settings(loaded)
    loaded.state[parameter] = deepcopy(saved.state_dict()["state"][0])
    restore_states(loaded, settings)
    for one, optimizer in ((saved_parameter, saved), (parameter, loaded)):
        one.grad = torch.linspace(-1, 1, 5000)
        optimizer.step()
    assert torch.equal(parameter, saved_parameter)
    assert loaded.state[parameter]["step"] == 4


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"training": {"optimizer": "adamw_8bit"}}, "training.optimizer=adamw_8bit"),
        ({"lora": {"quantize": "nf4"}}, "lora.quantize=nf4"),
    ],
)
def test_without_bitsandbytes_a_run_ends_before_it_begins_with_the_way_out(monkeypatch, sections, setting):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = parse_config({"run_dir": "runs/x", "model": {"name": "some/model"}, **sections})
    with pytest.raises(ConfigError) as error:
        check_bitsandbytes(config)
    assert str(error.value) == (
        f"{setting} needs bitsandbytes, which is not installed; install it on every node with pip install "
        f"'aft-ray[quantization]', or remove the setting"
    )
    check_bitsandbytes(parse_config({"run_dir": "runs/x", "model": {"name": "some/model"}}))


KINDS = {
    "settings": {"betas": [0.8, 0.9], "eps": 1e-3},
    "8bit": {"optimizer": "adamw_8bit"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    kinds = {kind: options for kind, options in KINDS.items() if kind != "8bit" or find_spec("bitsandbytes")}
    cases = {
        f"{kind}-{stage}-{dtype}": [stage, dtype, None, options]
        for kind, options in {"default": {}, **kinds}.items()
        for stage, dtype in ((0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"))
    }
    return run_cases(tmp_path_factory.mktemp("optimizers"), cases)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["settings", pytest.param("8bit", marks=has_bitsandbytes)])
@pytest.mark.parametrize("place", ["0-float32", "1-float32", "1-bfloat16", "2-bfloat16", "3-bfloat16"])
def test_a_resumed_optimizer_takes_the_same_steps_at_every_stage(results, kind, place):
    one = results[f"{kind}-{place}"]
    assert one["again"] == one["losses"][2:]
    assert all(torch.equal(weight, one["weights_again"][name]) for name, weight in one["weights"].items())
    # The first loss comes before any step; with other settings the others differ.
    default = results[f"default-{place}"]["losses"]
    assert one["losses"][0] == default[0]
    assert one["losses"][1:] != default[1:]
    assert one["losses"] == pytest.approx(default, rel=0.1)
