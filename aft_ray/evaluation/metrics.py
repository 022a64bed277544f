"""What a model's answers to a split are worth, each figure with a 95 % bootstrap interval over the questions.

Every metric is a ratio of two sums over questions (for an accuracy: right answers over questions), so one seeded
bootstrap serves them all and their intervals rest on the same resamples. An undecided answer is not counted as right,
stays in the denominator of the accuracies, forms no pair in the assessment, and is shown as a number of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# METHOD: the assessment compares 3 right with 3 wrong samples.
ASSESSED = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled response: right, wrong or undecided (None); its extracted answer; its score in nats per token."""

    verdict: bool | None
    answer: str | None
    score: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its greedy answer's verdict and its samples in the order they were drawn."""

    question_id: str
    greedy: bool | None
    samples: Sequence[Sample] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval, over the `questions` that it could be computed for; nan when there are none."""

    value: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True, slots=True)
class Result:
    """The metrics of one model on one split.

    estimates: "greedy"; with samples also "pass@1", "pass@k", "maj@k", "best-of-k", "vote@k", "assessment" and
        "perplexity", with k as a number. Shares of 1, but for the perplexity.
    k: samples used of every question: as many as the question with the fewest has, questions without any left out.
    assessed: right and as many wrong samples that the assessment compares: 3, or k // 2 when k is less than 6 (at
        least 1), so that a question can still qualify; figures with different `assessed` are not comparable.
    """

    questions: int
    k: int
    assessed: int
    undecided_greedy: int
    undecided_samples: int
    estimates: dict[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`; a figure that does not exist is null."""
        estimates = {
            name: {
                "value": _finite(estimate.value),
                "low": _finite(estimate.low),
                "high": _finite(estimate.high),
                "questions": estimate.questions,
            }
            for name, estimate in self.estimates.items()
        }
        return {
            "questions": self.questions,
            "k": self.k,
            "assessed": self.assessed,
            "undecided_greedy": self.undecided_greedy,
            "undecided_samples": self.undecided_samples,
            "estimates": estimates,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """The inverse of `to_json`; what else a record holds is left aside."""

        def number(figure: float | None) -> float:
            return math.nan if figure is None else figure

        estimates = {
            name: Estimate(number(e["value"]), number(e["low"]), number(e["high"]), e["questions"])
            for name, e in value["estimates"].items()
        }
        counts = {name: value[name] for name in cls.__dataclass_fields__ if name != "estimates"}
        return cls(**counts, estimates=estimates)


def normalise(answer: str) -> str:
    """A simple canonical form: case, spaces, currency sign, thousands separators, final full stop, 4.0 = 4."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(answer.casefold().split()))
    text = text.strip("$ ").removesuffix(".")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    if not number.is_finite() or abs(number.adjusted()) > 60:  # 1e999999999 would be written out
        return text
    digits = f"{number:f}"  # not normalize(): it rounds to the context's precision
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if number else "0"


def measure(
    answered: Sequence[Answered],
    *,
    canonical: Callable[[str], Hashable] = normalise,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """All metrics. `canonical` maps equal answers to equal keys. Raises ValueError when there is no question."""
    if not answered:
        raise ValueError("there is nothing to measure: no question was answered")
    sampled = [question for question in answered if question.samples]
    k = min((len(question.samples) for question in sampled), default=0)
    assessed = max(1, min(ASSESSED, k // 2))

    def first(question: Answered) -> Sequence[Sample]:
        return question.samples[:k]

    def column(of: Callable[[Answered], float | bool]) -> list[tuple[float, float]]:
        """(numerator, denominator) of every question: the value and 1, or nothing for a question without samples."""
        return [(float(of(question)), 1.0) if question.samples else (0.0, 0.0) for question in answered]

    ratios: dict[str, list[tuple[float, float]]] = {"greedy": [(float(a.greedy is True), 1.0) for a in answered]}
    if k:
        for size in sorted({1, k}):
            ratios[f"pass@{size}"] = column(partial(_pass_at, k=size))
        ratios[f"maj@{k}"] = column(lambda q: majority_is_right(first(q), canonical))
        ratios[f"best-of-{k}"] = column(lambda q: best_is_right(first(q)))
        ratios[f"vote@{k}"] = column(lambda q: weighted_vote_is_right(first(q), canonical))
        shares = [assessment(question.samples, assessed) for question in answered]
        ratios["assessment"] = [(0.0, 0.0) if share is None else (share, 1.0) for share in shares]
        ratios["perplexity"] = [right_perplexity(question.samples) for question in answered]
    return Result(
        questions=len(answered),
        k=k,
        assessed=assessed,
        undecided_greedy=sum(question.greedy is None for question in answered),
        undecided_samples=sum(sample.verdict is None for question in answered for sample in question.samples),
        estimates=_estimates(ratios, resamples, seed),
    )


def pass_at(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _pass_at(question: Answered, k: int) -> float:
    return pass_at(len(question.samples), sum(sample.verdict is True for sample in question.samples), k)


def majority_is_right(samples: Sequence[Sample], canonical: Callable[[str], Hashable]) -> bool:
    """Self-consistency: the answer given most often; a tie goes to the larger sum of scores, then to the first."""
    return _winner_is_right(samples, canonical, lambda votes: (len(votes), math.fsum(s.score for s in votes)))


def weighted_vote_is_right(samples: Sequence[Sample], canonical: Callable[[str], Hashable]) -> bool:
    """The answer with the largest sum of exp(score), the geometric mean token probability; a tie goes to the first."""
    return _winner_is_right(samples, canonical, lambda votes: (math.fsum(math.exp(s.score) for s in votes),))


def best_is_right(samples: Sequence[Sample]) -> bool:
    """Reranking: the sample with the highest score, the first of equals, whether or not it came to an answer."""
    return max(samples, key=lambda sample: sample.score).verdict is True


def assessment(samples: Sequence[Sample], assessed: int = ASSESSED) -> float | None:
    """Of the pairs of the first `assessed` right and wrong samples, the share in which the right one scores higher.

    Equal scores count half. None when there are fewer than `assessed` of either.
    """
    right = np.array([s.score for s in samples if s.verdict is True][:assessed])
    wrong = np.array([s.score for s in samples if s.verdict is False][:assessed])
    if len(right) < assessed or len(wrong) < assessed:
        return None
    above, equal = right[:, None] > wrong, right[:, None] == wrong
    return float(above.mean() + equal.mean() / 2)


def right_perplexity(samples: Sequence[Sample]) -> tuple[float, float]:
    """Sum of exp(-score) over the right samples, and their number."""
    scores = [sample.score for sample in samples if sample.verdict is True]
    return math.fsum(math.exp(min(-score, 700.0)) for score in scores), float(len(scores))


def _winner_is_right(
    samples: Sequence[Sample], canonical: Callable[[str], Hashable], weight: Callable[[list[Sample]], tuple[float, ...]]
) -> bool:
    """Whether the answer of most weight is right. Samples without an answer have no vote."""
    votes: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        if sample.answer is not None:
            votes.setdefault(canonical(sample.answer), []).append(sample)
    # Equal answers have equal verdicts, but for one whose verification timed out. max() keeps the first of equals.
    return bool(votes) and any(sample.verdict is True for sample in max(votes.values(), key=weight))


def _estimates(ratios: dict[str, list[tuple[float, float]]], resamples: int, seed: int) -> dict[str, Estimate]:
    """Ratios of sums, with percentile bootstrap intervals over the questions."""
    columns = np.array(list(ratios.values()), dtype=np.float64)  # [metric, question, numerator and denominator]
    metrics, questions, _ = columns.shape
    flat = columns.transpose(1, 0, 2).reshape(questions, 2 * metrics)
    rng = np.random.default_rng(seed)
    totals = np.empty((resamples, 2 * metrics))
    for i in range(resamples):  # a row at a time: the matrix of all draws would not fit for a large split
        totals[i] = np.bincount(rng.integers(questions, size=questions), minlength=questions) @ flat
    values, draws = _ratio(flat.sum(axis=0)[None])[0], _ratio(totals)
    estimates = {}
    for i, name in enumerate(ratios):
        drawn = draws[:, i][~np.isnan(draws[:, i])]
        low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)
        defined = int((columns[i, :, 1] > 0).sum())
        estimates[name] = Estimate(float(values[i]), float(low), float(high), defined)
    return estimates


def _ratio(sums: Floats) -> Floats:
    """[rows, 2 × metrics] of alternating numerators and denominators → [rows, metrics]; nan where there is nothing."""
    numerators, denominators = sums[:, 0::2], sums[:, 1::2]
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators > 0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
