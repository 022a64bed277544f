"""Rules that select one answer from several samples: majority vote, best of n by score, vote weighted by score.

Invariant: for any subset of the samples, a rule gives the result that it would give if only these had been sampled. The
service selects by the same rules (`aft_ray.serving.strategies`).
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
    """The samples of one question as arrays of shape [sample].

    Attributes:
        answers: the same number for equal answers; -1 for a sample without an answer.
        right: whether the verdict of the sample is right.
        scores: mean log-probabilities in nats per token; None if any is unknown.
    """

    answers: Ints
    right: Bools
    scores: Floats | None


def sample_arrays(samples: Sequence[Response], canonical: Callable[[str], Hashable]) -> SampleArrays:
    """Converts samples to arrays. `canonical` maps equal answers to equal keys."""
    keys: dict[Hashable, int] = {}
    answers = [-1 if s.answer is None else keys.setdefault(canonical(s.answer), len(keys)) for s in samples]
    scores = [sample.score for sample in samples if sample.score is not None]
    return SampleArrays(
        np.array(answers, dtype=np.int64),
        np.array([sample.right for sample in samples], dtype=np.bool_),
        np.array(scores, dtype=np.float64) if len(scores) == len(samples) else None,
    )


def majority_vote(samples: SampleArrays, subsets: Ints) -> Bools:
    """Self-consistency (arXiv 2203.11171): selects the most frequent answer.

    A tie goes to the answer with the larger sum of scores, then to the answer that was sampled first.

    Args:
        subsets: indices of samples, ascending in each row; shape [subset, size of the subset].

    Returns:
        Whether the selected answer is right, for each subset.
    """
    counts = np.ones(len(samples.answers))
    weights = [counts] if samples.scores is None else [counts, samples.scores]
    return _selects_right_answer(samples, subsets, weights)


def weighted_vote(samples: SampleArrays, subsets: Ints) -> Bools:
    """Selects the answer with the largest sum of exp(score); exp(score) is the geometric mean token probability.

    A tie goes to the answer that was sampled first. For arguments and result see `majority_vote`.
    """
    assert samples.scores is not None, "a vote weighted by scores needs the score of every sample"
    return _selects_right_answer(samples, subsets, [np.exp(samples.scores)])


def best_of_n(samples: SampleArrays, subsets: Ints) -> Bools:
    """Selects the sample with the highest score, the first of equal ones, whether or not it gives an answer.

    For arguments and result see `majority_vote`.
    """
    assert samples.scores is not None, "best of n by score needs the score of every sample"
    chosen = samples.scores[subsets].argmax(axis=1)
    return samples.right[np.take_along_axis(subsets, chosen[:, None], axis=1)[:, 0]]


Rule = Callable[[SampleArrays, Ints], Bools]
# The rules by the name of their metric with n samples, and those that need the score of every sample.
RULES: Mapping[str, Rule] = {"maj@{n}": majority_vote, "best-of-{n}": best_of_n, "vote@{n}": weighted_vote}
RULES_BY_SCORE = frozenset({"best-of-{n}", "vote@{n}"})


def _selects_right_answer(samples: SampleArrays, subsets: Ints, weights: Sequence[Floats]) -> Bools:
    """Whether the answer with the largest total weight is right, for each subset.

    `weights` are compared in order: the second decides ties of the first. A remaining tie goes to the answer that was
    sampled first. Equal answers have equal verdicts unless the verification of one failed, so an answer counts as right
    if any of its samples is right.
    """
    answers = np.arange(samples.answers.max(initial=-1) + 1)
    votes = (samples.answers[:, None] == answers)[subsets]  # [subset, sample, answer]
    if votes.shape[2] == 0:
        return np.zeros(len(subsets), dtype=np.bool_)
    leading = votes.any(axis=1)
    # Sums are rounded so that rounding errors, which depend on the order of terms, do not decide a tie.
    sums = [np.where(votes, weight[subsets][:, :, None], 0.0).sum(axis=1).round(12) for weight in weights]
    for key in [*sums, -votes.argmax(axis=1)]:
        reached = np.where(leading, key, -np.inf)
        leading &= reached == reached.max(axis=1, keepdims=True)
    right = (votes & samples.right[subsets][:, :, None]).any(axis=1)
    selected_right: Bools = (leading & right).any(axis=1)
    return selected_right
