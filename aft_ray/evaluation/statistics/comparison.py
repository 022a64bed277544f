"""Paired comparison of two models: differences of their metrics on the same questions, with intervals and p-values.

Invariant: a difference uses only questions that both models answered, and the result counts the others. The difficulty
of a question affects both models alike and cancels, so these intervals are narrower than those of the two metrics. A
difference can therefore be significant although the intervals of the two metrics overlap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from aft_ray.config.run import ConfigError
from aft_ray.evaluation.answers import AnsweredQuestion
from aft_ray.evaluation.statistics.bootstrap import (
    Floats,
    bootstrap_resamples,
    finite_or_none,
    mean_over_seeds,
    percentile_interval,
)
from aft_ray.evaluation.statistics.metrics import Canonical, metric_columns, smallest_k
from aft_ray.verify.answers.canonical import normalise

# If at most EXACT_LIMIT questions differ, the permutation test counts all 2^n permutations; else it draws PERMUTATIONS.
EXACT_LIMIT, PERMUTATIONS = 12, 9999
_BATCH = 500  # permutations computed at once


@dataclass(frozen=True, slots=True)
class Difference:
    """The metric of a model minus that of the baseline, with the paired 95 % interval and the p-value.

    Attributes:
        p: two-sided p-value of the hypothesis that the models do not differ.
        questions: number of questions that the metric could be computed for on both sides.
    """

    value: float
    low: float
    high: float
    p: float
    questions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model compared with the baseline on the questions that both answered.

    Attributes:
        questions: number of common questions.
        only_baseline, only_other: number of questions that only one of them answered.
        differences: by the name of the metric.
        tasks: the same for each task; empty if there is only one.
    """

    questions: int
    only_baseline: int
    only_other: int
    differences: dict[str, Difference]
    tasks: dict[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values; an undefined number is null."""
        differences = {
            name: {key: finite_or_none(value) for key, value in asdict(difference).items()}
            for name, difference in self.differences.items()
        }
        record: dict[str, Any] = {
            "questions": self.questions,
            "only_baseline": self.only_baseline,
            "only_other": self.only_other,
            "differences": differences,
        }
        if self.tasks:
            record["tasks"] = {task: comparison.to_json() for task, comparison in self.tasks.items()}
        return record


def compare(
    baseline: Sequence[AnsweredQuestion],
    other: Sequence[AnsweredQuestion],
    *,
    k: int | None = None,
    canonical: Canonical = normalise,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compares every metric that both sides have. For `k` see `measure`.

    Raises:
        ConfigError: the models have no question in common, or an id names different questions.
    """
    pairs = match_questions(baseline, other)
    fewest = min(smallest_k(baseline), smallest_k(other))
    k = fewest if k is None else min(k, fewest)
    left, right = (list(side) for side in zip(*itertools.starmap(_common_parts, pairs), strict=True))
    (names, a), (other_names, b) = metric_columns(left, k, canonical), metric_columns(right, k, canonical)
    common = [name for name in names if name in other_names]
    seeds = max(a.shape[1], b.shape[1])
    a = _with_seeds(a[[names.index(name) for name in common]], seeds)
    b = _with_seeds(b[[other_names.index(name) for name in common]], seeds)

    def differences(chosen: Sequence[int]) -> dict[str, Difference]:
        return _differences(common, a[:, :, chosen], b[:, :, chosen], resamples, seed)

    tasks: dict[str, Comparison] = {}
    present = sorted({question.task for question in left})
    for task in present if len(present) > 1 else []:
        chosen = [i for i, question in enumerate(left) if question.task == task]
        left_only, right_only = (sum(q.task == task for q in side) - len(chosen) for side in (baseline, other))
        tasks[task] = Comparison(len(chosen), left_only, right_only, differences(chosen))
    overall = differences(range(len(pairs)))
    return Comparison(len(pairs), len(baseline) - len(pairs), len(other) - len(pairs), overall, tasks)


def match_questions(
    baseline: Sequence[AnsweredQuestion], other: Sequence[AnsweredQuestion]
) -> list[tuple[AnsweredQuestion, AnsweredQuestion]]:
    """Pairs of the same question of both sides, sorted by id. Matches by id, or by text if no id is common."""
    by_id = {question.id: question for question in other}
    pairs = [(question, by_id[question.id]) for question in baseline if question.id in by_id]
    if not pairs:
        by_text = {question.question: question for question in other if question.question}
        pairs = [(question, by_text[question.question]) for question in baseline if question.question in by_text]
    if not pairs:
        raise ConfigError(
            f"the models answered no question in common (one answered {baseline[0].id!r}, the other {other[0].id!r}); "
            f"compare models on one split of one task"
        )
    for one, same in pairs:
        if one.question and same.question and one.question != same.question:
            raise ConfigError(
                f"{one.id!r} is not the same question for both models; compare models on one split of one task"
            )
    return sorted(pairs, key=lambda both: both[0].id)


def _common_parts(one: AnsweredQuestion, other: AnsweredQuestion) -> tuple[AnsweredQuestion, AnsweredQuestion]:
    """Both sides without a greedy response or samples that only one of them has."""
    greedy, samples = one.greedy and other.greedy, one.samples and other.samples
    kept = [
        replace(side, greedy=side.greedy if greedy else None, samples=side.samples if samples else ())
        for side in (one, other)
    ]
    return kept[0], kept[1]


def _with_seeds(columns: Floats, seeds: int) -> Floats:
    """Pads the seed axis with zeros, which do not change a mean over seeds."""
    return np.pad(columns, ((0, 0), (0, seeds - columns.shape[1]), (0, 0), (0, 0)))


def _differences(names: Sequence[str], a: Floats, b: Floats, resamples: int, seed: int) -> dict[str, Difference]:
    draws = bootstrap_resamples(np.concatenate([a, b]), resamples, np.random.default_rng(seed))
    drawn = draws[:, len(names) :] - draws[:, : len(names)]
    values = mean_over_seeds(b.sum(axis=2)) - mean_over_seeds(a.sum(axis=2))
    differences = {}
    for i, name in enumerate(names):
        both = (a[i, ..., 1] > 0).any(axis=0) & (b[i, ..., 1] > 0).any(axis=0)
        if name == "greedy":
            right, other_right = a[i, 0, both, 0] > 0, b[i, 0, both, 0] > 0
            p = mcnemar_test(int((right & ~other_right).sum()), int((other_right & ~right).sum()))
        else:
            p = permutation_test(a[i], b[i], np.random.default_rng([seed, i]))
        differences[name] = Difference(float(values[i]), *percentile_interval(drawn[:, i]), p, int(both.sum()))
    return differences


def mcnemar_test(only_one: int, only_other: int) -> float:
    """Exact two-sided p-value of McNemar's test (McNemar 1947): twice the binomial tail, at most 1.

    Without a difference, each question that only one side answered right is a fair coin toss between them.
    """
    n = only_one + only_other
    tail = sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / (1 << n))


def permutation_test(a: Floats, b: Floats, rng: np.random.Generator) -> float:
    """Two-sided p-value of a paired permutation test, which exchanges the answers of the models to some questions.

    Args:
        a, b: shape [seed, question, numerator and denominator]. A question is exchanged with all its seeds.

    Returns:
        The share of permutations whose metrics differ at least as much as the observed ones. All permutations are
        counted if at most EXACT_LIMIT questions differ; otherwise PERMUTATIONS are drawn and the observed one is added.
        nan if the metric of one side is undefined.
    """
    total_a: Floats = a.sum(axis=1)
    total_b: Floats = b.sum(axis=1)
    observed = float(mean_over_seeds(total_b) - mean_over_seeds(total_a))
    if math.isnan(observed):
        return math.nan
    gap = (b - a).transpose(1, 0, 2)
    gap = gap[(gap != 0).any(axis=(1, 2))]
    n = len(gap)
    exact = n <= EXACT_LIMIT
    count = 2**n if exact else PERMUTATIONS
    extreme: int = 0
    for start in range(0, count, _BATCH):
        size = min(_BATCH, count - start)
        if exact:
            swaps = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            swaps = rng.integers(2, size=(size, n))
        # einsum instead of a matrix product: BLAS threads are a hundred times slower when they share two busy cores.
        shift = np.einsum("rq,qsc->rsc", swaps.astype(np.float64), gap)
        swapped = mean_over_seeds(total_b - shift) - mean_over_seeds(total_a + shift)
        # If a permutation leaves one side without a defined metric, it is counted as no evidence for a difference.
        extreme += int((np.isnan(swapped) | (np.abs(swapped) >= abs(observed) - 1e-9)).sum())
    return extreme / count if exact else (extreme + 1) / (count + 1)
