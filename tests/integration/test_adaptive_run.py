"""A whole run with adaptive sampling: groups of different sizes are sampled, trained and counted; some are skipped."""

from io import StringIO

import pytest
from rich.console import Console
from tiny import tiny_config

from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.sampling.adaptive import needs_more
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Verdict
from aft_ray.storage.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]

# So few and small sums that a model that has seen them answers some right always, and others sometimes.
SUMS = {"min_steps": 1, "max_steps": 1, "operations": "+", "max_operand": 5, "distractors": 0, "train_size": 200}
QUESTIONS, ROUNDS, K = 24, 3, 4


def events(config, name):
    return [event for event in read_events(RunDir(config.run_dir)) if event["event"] == name]


@pytest.fixture(scope="module")
def finished(ray_here, tiny_model, tmp_path_factory):
    """Rewards are graded, so that verdicts and rewards differ; two workers have groups of different sizes."""
    config = tiny_config(
        tmp_path_factory.mktemp("adaptive") / "run",
        tiny_model,
        data={"train_limit": QUESTIONS, "arithmetic": SUMS},
        vft={"epochs": 40, "learning_rate": 3e-3},
        rounds={"count": ROUNDS, "max_staleness": 1},
        feedback={"kind": "steps"},
        sampling={"k": K, "adaptive": {"initial_k": 2, "step": 1, "skip_after": 1, "ask_probability": 0.3}},
        training={"workers": 2, "groups_per_step": 4},
    )
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        assert launch.run(config, reporter)
    return config


def test_each_question_that_is_asked_has_as_many_candidates_as_it_needs(finished):
    ledger, sizes = Ledger(RunDir(finished.run_dir)), set()
    for number in range(1, ROUNDS + 1):
        for group in ledger.read_groups(number):
            count = len(group.candidates)
            assert all(needs_more(group.candidates[:asked]) for asked in range(2, count))
            assert count == K or not needs_more(group.candidates)
            assert all(one.verdict is not Verdict.UNDECIDED or one.reason for one in group.candidates)
            sizes.add(count)
    assert len(sizes) > 1


def test_skipped_questions_were_all_right_before_and_the_events_count_them(finished):
    ledger = Ledger(RunDir(finished.run_dir))
    sampled, trained = events(finished, "sampled"), events(finished, "trained")
    for number in range(1, ROUNDS + 1):
        groups, skipped = ledger.read_groups(number), ledger.skipped(number)
        assert len(groups) + len(skipped) == QUESTIONS
        assert not {group.question.id for group in groups} & skipped
        for earlier in reversed(range(1, number)):
            results = {group.question.id: group.candidates for group in ledger.read_groups(earlier)}
            last, skipped = skipped & results.keys(), skipped - results.keys()
            assert all(one.verdict is not Verdict.WRONG for id in last for one in results[id])
        assert not skipped  # every question was asked before it was skipped
        event = sampled[number - 1]
        assert (event["groups"], event["skipped"]) == (len(groups), QUESTIONS - len(groups))
        assert event["candidates"] == sum(len(group.candidates) for group in groups) / len(groups)
        assert event["tokens"] == sum(len(one.token_ids) for group in groups for one in group.candidates)
        assert event["signal"] == sum(group.has_signal for group in groups) / len(groups)
        assert trained[number]["groups"] == len(groups)
        assert trained[number]["steps"] == -(-len(groups) // 4)
    assert any(event["skipped"] for event in sampled)
    assert any(event["alignment_loss"] for event in trained)
