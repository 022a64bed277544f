"""The sampling stage with scripted samplers: what it asks them for, and what follows when they fail."""

import asyncio
from dataclasses import dataclass, field

import pytest
from ray.exceptions import RayActorError

from aft_ray.config.sections import SamplingConfig
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.sampling.sample_stage import Growth, SampleJob, SampleStage, question_seed, split_failed
from aft_ray.sampling.sampler import RefusedQuestion
from aft_ray.storage.records import Candidate, Group, Question, Verdict, groups_to_table
from aft_ray.verify.result import decided

SPEC = SamplingSpec(2, 1.0, 1.0, 8)


class Reader:
    """Reads an answer that is the response itself."""

    def extract(self, text):
        return text

    def same(self, answer, gold):
        return decided(answer == gold, answer)


@dataclass
class Samplers:
    """One sampler and its health. Candidate i of a question has the text of place i in `answers[id]`.

    `fail`: the numbers of the calls that fail.
    """

    answers: dict
    fail: set = field(default_factory=set)
    refused: set = field(default_factory=set)
    calls: list = field(default_factory=list)

    def __post_init__(self):
        self.sample, self.actors, self.remote = self, (self,), self._remote
        self.seeds = {question_seed(7, "test", id): id for id in self.answers}

    def health(self):
        return self

    def watch(self):
        pass

    async def wait_for_minimum(self):
        return [0]

    def mark_lost(self, index, reason):
        pass

    async def _remote(self, prompts, spec, version):
        places = []
        for prompt in prompts:
            (start,) = [seed for seed in self.seeds if 0 <= prompt.seed - seed < 100]
            places.append((self.seeds[start], prompt.seed - start))
        self.calls.append((places, spec.k))
        if len(self.calls) - 1 in self.fail:
            raise RayActorError()
        return [
            RefusedQuestion("too long")
            if id in self.refused
            else [Candidate([place + i], -1.0, "stop", self.answers[id][place + i]) for i in range(spec.k)]
            for id, place in places
        ]


def run(samplers, most=6, step=2):
    growth = Growth(step, most, {"task": Reader()}) if most else None
    config = SamplingConfig(attempts=2)
    groups = [Group(1, 0, Question(id, "", "", "yes", "task"), [1], [2], []) for id in samplers.answers]
    job = SampleJob(samplers, None, SPEC, config, 7, "test", growth)
    table = asyncio.run(SampleStage()(groups_to_table(groups), job))
    return {
        group.question.id: (group, reason, attempts)
        for group, reason, attempts in zip(*split_failed(table), strict=True)
    }


ANSWERS = {
    "mixed": ["yes", "no"],
    "second": ["no", "no", "yes", "no"],
    "last": ["yes", "yes", "yes", "yes", "no", "yes"],
    "never": ["no"] * 6,
}


def test_it_asks_again_only_for_what_is_needed_from_the_place_where_it_stopped():
    samplers = Samplers(ANSWERS)
    found = run(samplers)
    assert samplers.calls == [
        ([("mixed", 0), ("second", 0), ("last", 0), ("never", 0)], 2),
        ([("second", 2), ("last", 2), ("never", 2)], 2),
        ([("last", 4), ("never", 4)], 2),
    ]
    for id, (group, reason, _) in found.items():
        assert reason is None
        assert [one.text for one in group.candidates] == ANSWERS[id]
    # What was verified on the way has its label; the last candidates decide nothing and get theirs later.
    labels = {id: [one.verdict for one in group.candidates] for id, (group, _, _) in found.items()}
    right, wrong, none = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED
    assert labels["mixed"] == [right, wrong]
    assert labels["second"] == [wrong, wrong, right, wrong]
    assert labels["last"] == [right] * 4 + [none] * 2


def test_the_last_step_is_as_long_as_the_bound_allows():
    samplers = Samplers({"never": ["no"] * 5})
    assert len(run(samplers, most=5)["never"][0].candidates) == 5
    assert [k for _, k in samplers.calls] == [2, 2, 1]


def test_without_growth_nothing_is_verified_and_nothing_asked_again():
    samplers = Samplers(ANSWERS)
    found = run(samplers, most=None)
    assert len(samplers.calls) == 1
    assert {one.verdict for group, _, _ in found.values() for one in group.candidates} == {Verdict.UNDECIDED}


@pytest.mark.parametrize("failing", [{0}, {1}, {2}])
def test_a_call_that_fails_is_made_again_for_each_question_alone_and_changes_no_candidate(failing):
    samplers = Samplers(ANSWERS, fail=failing)
    found = run(samplers)
    assert {id: [one.text for one in group.candidates] for id, (group, _, _) in found.items()} == ANSWERS
    (number,) = failing
    repeated = samplers.calls[number][0]
    assert [places for places, _ in samplers.calls[number + 1 : number + 1 + len(repeated)]] == [
        [one] for one in repeated
    ]


def test_a_question_whose_further_candidates_cannot_be_had_fails_alone():
    samplers = Samplers({"mixed": ["yes", "no"], "never": ["no"] * 6}, fail={1, 2})
    found = run(samplers)
    assert found["mixed"][1] is None
    group, reason, attempts = found["never"]
    assert (group.candidates, attempts) == ([], 2)
    assert "sampler 0 failed" in reason


def test_a_question_that_is_refused_is_not_asked_again():
    samplers = Samplers({"long": [], "mixed": ["yes", "no"]}, refused={"long"})
    found = run(samplers)
    assert found["long"][1] == "too long"
    assert len(samplers.calls) == 1
