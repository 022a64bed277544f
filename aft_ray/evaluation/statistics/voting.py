"""Which of several sampled responses to return: self-consistency, reranking by score, the vote weighted by score.

Invariant: the outcome of any subset of the samples is what the rule would have said, had only these been drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aft_ray.evaluation.answers import Response
from aft_ray.evaluation.statistics.bootstrap import Floats

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampleArrays:
    """The samples of a question as arrays of [sample].

    answers: equal numbers for equal answers, -1 for a sample without an answer. scores: None when any is unknown.
    """

    answers: Ints
    right: Bools
    scores: Floats | None


def sample_arrays(samples: Sequence[Response], canonical: Callable[[str], Hashable]) -> SampleArrays:
    """`canonical` maps equal answers to equal keys."""
    keys: dict[Hashable, int] = {}
    answers = [-1 if s.answer is None else keys.setdefault(canonical(s.answer), len(keys)) for s in samples]
    scores = [sample.score for sample in samples if sample.score is not None]
    return SampleArrays(
        np.array(answers, dtype=np.int64),
        np.array([sample.right for sample in samples], dtype=np.bool_),
        np.array(scores, dtype=np.float64) if len(scores) == len(samples) else None,
    )


def majority_vote(cast: SampleArrays, subsets: Ints) -> Bools:
    """Self-consistency: the answer given most often; a tie goes to the larger sum of scores, then to the first.

    Of each row of `subsets` ([subset, index of a sample], ascending), whether it elects a right answer.
    """
    return _elects_right(cast, subsets, [np.ones(len(cast.answers)), *([] if cast.scores is None else [cast.scores])])


def weighted_vote(cast: SampleArrays, subsets: Ints) -> Bools:
    """The answer with the largest sum of exp(score), the geometric mean token probability; a tie goes to the first."""
    assert cast.scores is not None, "a vote weighted by scores needs scores"
    return _elects_right(cast, subsets, [np.exp(cast.scores)])


def best_of_n(cast: SampleArrays, subsets: Ints) -> Bools:
    """Reranking: the sample with the highest score, the first of equals, whether or not it came to an answer."""
    assert cast.scores is not None, "reranking by score needs scores"
    chosen = cast.scores[subsets].argmax(axis=1)
    return cast.right[np.take_along_axis(subsets, chosen[:, None], axis=1)[:, 0]]


Rule = Callable[[SampleArrays, Ints], Bools]
# How each rule's figure with n samples is called, and which rules need every sample's score.
RULES: Mapping[str, Rule] = {"maj@{n}": majority_vote, "best-of-{n}": best_of_n, "vote@{n}": weighted_vote}
RULES_BY_SCORE = frozenset({"best-of-{n}", "vote@{n}"})


def _elects_right(cast: SampleArrays, subsets: Ints, weights: Sequence[Floats]) -> Bools:
    """Whether the answer with the most weight is right: of the first kind, in a tie of the second, then the first.

    Equal answers have equal verdicts, but for one whose verification failed; one right sample makes an answer right.
    """
    votes = (cast.answers[:, None] == np.arange(cast.answers.max(initial=-1) + 1))[subsets]  # [subset, sample, answer]
    if votes.shape[2] == 0:
        return np.zeros(len(subsets), dtype=np.bool_)
    leading = votes.any(axis=1)
    # Rounded, so that the order of a sum's terms cannot break a tie.
    sums = [np.where(votes, weight[subsets][:, :, None], 0.0).sum(axis=1).round(12) for weight in weights]
    for key in [*sums, -votes.argmax(axis=1)]:
        reached = np.where(leading, key, -np.inf)
        leading &= reached == reached.max(axis=1, keepdims=True)
    right = (votes & cast.right[subsets][:, :, None]).any(axis=1)
    outcome: Bools = (leading & right).any(axis=1)
    return outcome
