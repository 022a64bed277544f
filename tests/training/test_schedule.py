"""The learning rate of a run's steps, and where the steps of each round lie on its curve."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from aft_ray.config.run import ConfigError, parse_config
from aft_ray.training.schedule import learning_rate, round_schedule

SHAPES = ["linear", "cosine", "constant"]


def config_of(**training):
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"name": "unused"},
            "objective": {"name": "dpo", "beta": 0.3},
            "rounds": {"count": 3, "questions_per_round": 25},
            "vft": {"epochs": 2, "questions_per_step": 30, "learning_rate": 3e-4},
            "training": {"groups_per_step": 10, "epochs": 2, "learning_rate": 1e-4, "warmup": 0, **training},
        }
    )


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == 0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 2.0, 0.03) == 2.0


@given(
    shape=st.sampled_from(SHAPES),
    steps=st.integers(1, 400),
    peak=st.floats(1e-7, 1.0),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
)
def test_every_curve_rises_to_its_peak_and_falls_to_its_floor(shape, steps, peak, warmup, floor):
    rates = [learning_rate(step, steps, peak, warmup, shape=shape, floor=floor) for step in range(steps + 3)]
    first = round(warmup * steps)
    rising, after = rates[:first], rates[first:]
    slack = 1e-12 * peak
    assert rising == [peak * (step + 1) / first for step in range(first)]
    assert max(rates) == pytest.approx(peak)
    assert all(0 <= rate <= peak + slack for rate in rates)
    assert all(later <= earlier + slack for earlier, later in pairwise(after))
    if shape == "constant":
        assert set(after) == {peak}
    else:
        assert all(rate >= floor * peak - slack for rate in after)
        # The end, and steps after it, such as those of a round with more groups than were counted.
        assert rates[steps:] == pytest.approx([floor * peak] * 3)


@pytest.mark.parametrize(
    ("shape", "floor", "build"),
    [
        ("linear", 0.0, get_linear_schedule_with_warmup),
        ("cosine", 0.0, partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr=0.0)),
        ("cosine", 0.1, partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1)),
        ("constant", 0.0, lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup)),
    ],
)
def test_the_curves_are_those_of_transformers(shape, floor, build):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = build(optimizer, 8, 50)
    theirs = []
    for _ in range(50):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate(step, 50, 3e-4, 8 / 50, shape=shape, floor=floor) for step in range(50)]
    assert ours[8:] == pytest.approx(theirs[8:], rel=1e-12)
    # Their first step has the rate 0, so that ours is one step ahead of them while it rises.
    assert theirs[0] == 0
    assert ours[:7] == pytest.approx(theirs[1:8], rel=1e-12)


def test_the_rounds_after_round_0_share_one_curve_without_a_gap():
    config = config_of()
    questions = {"arithmetic": 100}
    vft = round_schedule(config, questions, 0)
    assert (vft.objective.name, vft.epochs, vft.groups_per_step) == ("vft", 2, 30)
    assert (vft.first_step, vft.total_steps, vft.learning_rate(0)) == (0, 8, 3e-4)
    rounds = [round_schedule(config, questions, number) for number in (1, 2, 3)]
    assert [one.first_step for one in rounds] == [0, 6, 12]
    assert {(one.total_steps, one.objective.beta) for one in rounds} == {(18, 0.3)}
    assert rounds[0].learning_rate(0) == 1e-4
    assert rounds[2].learning_rate(17) == pytest.approx(1e-4 / 18)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_runs_over_all_rounds_and_over_round_0_alone(shape):
    floor = 0.0 if shape == "constant" else 0.2
    config = config_of(schedule=shape, min_learning_rate_ratio=floor, warmup=0.25)
    questions = {"arithmetic": 100}
    vft = round_schedule(config, questions, 0)
    curve = [learning_rate(step, 8, 3e-4, 0.25, shape=shape, floor=floor) for step in range(8)]
    assert [vft.learning_rate(step) for step in range(8)] == curve
    curve = [learning_rate(step, 18, 1e-4, 0.25, shape=shape, floor=floor) for step in range(18)]
    rounds = [round_schedule(config, questions, number) for number in (1, 2, 3)]
    rates = [one.learning_rate(one.first_step + step) for one in rounds for step in range(6)]
    assert rates == curve
    assert len(set(curve)) == (4 if shape == "constant" else 17)


def test_a_round_of_fewer_steps_changes_no_rate_of_another_round():
    """Questions that fail or are skipped leave a round with fewer steps."""
    config = parse_config({"run_dir": "r", "model": {"name": "m"}, "rounds": {"count": 4}})
    rounds = [round_schedule(config, {"arithmetic": 640}, number) for number in (1, 2, 3, 4)]
    taken = [10, 4, 1, 7]
    rates = [
        one.learning_rate(one.first_step + step)
        for one, steps in zip(rounds, taken, strict=True)
        for step in range(steps)
    ]
    assert [one.first_step for one in rounds] == [0, 10, 20, 30]
    assert rates[1:] == sorted(rates[1:], reverse=True)  # the first one belongs to the warm-up
    assert rates[14] == rounds[0].learning_rate(20)


def test_a_floor_without_a_fall_is_refused():
    with pytest.raises(ConfigError, match=r"min_learning_rate_ratio=0.1 has no effect with training.schedule=constant"):
        config_of(schedule="constant", min_learning_rate_ratio=0.1)
