"""The learning rate of a run's steps, and where the steps of each round lie on its curve."""

import pytest

from aft_ray.config.run import parse_config
from aft_ray.training.schedule import learning_rate, round_schedule


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == 0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 2.0, 0.03) == 2.0


def test_the_rounds_after_round_0_share_one_curve_without_a_gap():
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"name": "unused"},
            "objective": {"name": "dpo", "beta": 0.3},
            "rounds": {"count": 3, "questions_per_round": 25},
            "vft": {"epochs": 2, "questions_per_step": 30, "learning_rate": 3e-4},
            "training": {"groups_per_step": 10, "epochs": 2, "learning_rate": 1e-4, "warmup": 0},
        }
    )
    questions = {"arithmetic": 100}
    vft = round_schedule(config, questions, 0)
    assert (vft.objective.name, vft.epochs, vft.groups_per_step) == ("vft", 2, 30)
    assert (vft.first_step, vft.total_steps, vft.learning_rate(0)) == (0, 8, 3e-4)
    rounds = [round_schedule(config, questions, number) for number in (1, 2, 3)]
    assert [one.first_step for one in rounds] == [0, 6, 12]
    assert {(one.total_steps, one.objective.beta) for one in rounds} == {(18, 0.3)}
    assert rounds[0].learning_rate(0) == 1e-4
    assert rounds[2].learning_rate(17) == pytest.approx(1e-4 / 18)
