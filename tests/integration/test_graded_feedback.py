"""Runs whose rewards are graded: by the steps of a chain of thought, and by a judge behind an endpoint."""

import hashlib
from io import StringIO

import pytest
from judge_server import Answer, judge_server, rated, refusal
from rich.console import Console
from tiny import tiny_config

from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.sampling.round import RunFailed
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Verdict
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.arithmetic.steps import grade_steps
from aft_ray.verify.judge.judge import JudgeFailed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]

# The sums are so small that an almost untrained model gets some of them right.
SUMS = {"min_steps": 1, "max_steps": 1, "operations": "+", "max_operand": 5, "distractors": 0, "train_size": 200}


def run(config) -> None:
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        launch.run(config, reporter)


def tiny_run(place, model, **sections):
    return tiny_config(
        place,
        model,
        data={"train_limit": 24, "arithmetic": SUMS},
        vft={"epochs": 8, "learning_rate": 3e-3},
        **sections,
    )


def candidates(config):
    groups = Ledger(RunDir(config.run_dir)).read_groups(1)
    assert len(groups) == 24
    return [(group, candidate) for group in groups for candidate in group.candidates]


def test_steps_grade_what_a_round_trains_on(tiny_model, tmp_path):
    config = tiny_run(tmp_path / "run", tiny_model, feedback={"kind": "steps"}, objective={"name": "pro"})
    run(config)
    rewards = set()
    for group, candidate in candidates(config):
        if candidate.verdict is not Verdict.UNDECIDED:
            right = candidate.verdict is Verdict.RIGHT
            assert candidate.reward == grade_steps(group.question.text, candidate.text, right)
            rewards.add(candidate.reward)
    assert len(rewards) > 1
    (trained,) = [e for e in read_events(RunDir(config.run_dir)) if e["event"] == "trained" and e["round"] == 1]
    assert trained["alignment_loss"] != 0


def by_content(number: int, request: dict) -> Answer:
    """A rating that depends on the prompt and the seed alone, so that the test can compute it."""
    text = request["messages"][0]["content"] + str(request["seed"])
    return rated(1 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10)


def test_a_run_that_a_judge_ended_continues_with_the_next_judge_and_pays_for_nothing_twice(tiny_model, tmp_path):
    with judge_server() as server:
        judge = {"url": server.url, "ratings": 2, "concurrency": 4}
        config = tiny_run(tmp_path / "run", tiny_model, feedback={"kind": "judge", "judge": judge})
        server.models_answer = refusal(401)
        with pytest.raises(JudgeFailed, match="401"):
            run(config)
        assert not Ledger(RunDir(config.run_dir)).trained_rounds()

        paid = 10
        server.models_answer = None
        server.answer = lambda number, request: by_content(number, request) if number <= paid else refusal(401)
        with pytest.raises(RunFailed, match=r"sampling of round 1 failed.*401.*start the same command again"):
            run(config)
        assert 1 not in Ledger(RunDir(config.run_dir)).trained_rounds()
        rated = server.requests[:paid]
        server.requests.clear()

        server.answer = by_content
        run(config)
        rated += server.requests
        assert Ledger(RunDir(config.run_dir)).trained_rounds() == [0, 1]
        (*_, judged) = [event for event in read_events(RunDir(config.run_dir)) if event["event"] == "judged"]
        assert judged["calls"] - judged["retries"] == len(server.requests)
        assert len({(request["messages"][0]["content"], request["seed"]) for request in rated}) == len(rated)
        decided = [c for _, c in candidates(config) if c.verdict is not Verdict.UNDECIDED]
        assert paid < len(rated) <= 2 * len(decided)
        assert {c.reward % 0.5 for c in decided} == {0}
        assert len({c.reward for c in decided}) > 4
