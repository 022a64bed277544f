"""Labelling a candidate never raises, and never calls wrong what failed."""

import pytest

from aft_ray.config import DataConfig
from aft_ray.records import Candidate, Verdict
from aft_ray.tasks.arithmetic import ArithmeticTask
from aft_ray.verify.label import label


class Failing(ArithmeticTask):
    """A task whose extraction or comparison raises."""

    def __init__(self, where: str) -> None:
        super().__init__(DataConfig())
        self.where = where

    def extract(self, text: str) -> str | None:
        if self.where == "extract":
            raise RuntimeError("broken")
        return super().extract(text)

    def same(self, answer: str | None, gold: str) -> Verdict:
        raise RecursionError("broken")


def candidate(text: str) -> Candidate:
    return Candidate(token_ids=[5, 1], logprob_sum=-1.5, finish_reason="stop", text=text)


@pytest.mark.parametrize(
    ("text", "answer", "verdict", "reward"),
    [
        ("8 + 4 = 12. #### 12", "12", Verdict.RIGHT, 1.0),
        ("8 + 4 = 13. #### 13", "13", Verdict.WRONG, 0.0),
        ("8 + 4 = 12.", None, Verdict.WRONG, 0.0),
        ("#### 12 or 13", "12 or 13", Verdict.UNDECIDED, 0.0),
    ],
)
def test_labels(text: str, answer: str | None, verdict: Verdict, reward: float) -> None:
    labelled = label(ArithmeticTask(DataConfig()), candidate(text), "12")
    assert (labelled.answer, labelled.verdict, labelled.reward) == (answer, verdict, reward)
    assert (labelled.token_ids, labelled.logprob_sum, labelled.text) == ([5, 1], -1.5, text)


@pytest.mark.parametrize("where", ["extract", "same"])
def test_a_failing_verifier_is_undecided(where: str) -> None:
    labelled = label(Failing(where), candidate("#### 12"), "12")
    assert (labelled.verdict, labelled.reward) == (Verdict.UNDECIDED, 0.0)
