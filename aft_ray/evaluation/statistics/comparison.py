"""Is one model better than another? Both on the same questions, each question compared with itself.

Invariant: a difference rests on the questions that both models answered, and says how many the others were. What the
questions have in common (hard for both, easy for both) cancels, so these intervals are narrower than those of the
figures on their own; overlapping intervals of two figures are no argument against a difference.
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

# Up to this many questions that differ, all 2^n exchanges are counted; beyond, this many are drawn.
EXACT_LIMIT, PERMUTATIONS = 12, 9999
_ROWS = 500  # exchanges worked out at once


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure of a model minus the baseline's, with its paired 95 % interval and the p-value of no difference.

    questions: those that the figure could be computed for on both sides.
    """

    value: float
    low: float
    high: float
    p: float
    questions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model against the baseline, on the questions that both answered; by task when these are of several."""

    questions: int
    only_baseline: int
    only_other: int
    differences: dict[str, Difference]
    tasks: dict[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`; a figure that does not exist is null."""
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
    """Every figure that both sides have. `k` as for `measure`.

    Raises ConfigError when the two answered no question in common, or different questions under one id.
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
        one, two = (sum(q.task == task for q in side) - len(chosen) for side in (baseline, other))
        tasks[task] = Comparison(len(chosen), one, two, differences(chosen))
    everything = differences(range(len(pairs)))
    return Comparison(len(pairs), len(baseline) - len(pairs), len(other) - len(pairs), everything, tasks)


def match_questions(
    baseline: Sequence[AnsweredQuestion], other: Sequence[AnsweredQuestion]
) -> list[tuple[AnsweredQuestion, AnsweredQuestion]]:
    """The questions of both sides, matched by id; when no id is common, by their text. Sorted by id."""
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
    """Both with only what both have: a greedy response, samples."""
    greedy, samples = one.greedy and other.greedy, one.samples and other.samples
    kept = [
        replace(side, greedy=side.greedy if greedy else None, samples=side.samples if samples else ())
        for side in (one, other)
    ]
    return kept[0], kept[1]


def _with_seeds(columns: Floats, seeds: int) -> Floats:
    """Seeds that one side does not have add nothing to its means."""
    return np.pad(columns, ((0, 0), (0, seeds - columns.shape[1]), (0, 0), (0, 0)))


def _differences(names: Sequence[str], a: Floats, b: Floats, resamples: int, seed: int) -> dict[str, Difference]:
    draws = bootstrap_resamples(np.concatenate([a, b]), resamples, np.random.default_rng(seed))
    drawn = draws[:, len(names) :] - draws[:, : len(names)]
    values = mean_over_seeds(b.sum(axis=2)) - mean_over_seeds(a.sum(axis=2))
    found = {}
    for i, name in enumerate(names):
        both = (a[i, ..., 1] > 0).any(axis=0) & (b[i, ..., 1] > 0).any(axis=0)
        if name == "greedy":
            right, other_right = a[i, 0, both, 0] > 0, b[i, 0, both, 0] > 0
            p = mcnemar_test(int((right & ~other_right).sum()), int((other_right & ~right).sum()))
        else:
            p = permutation_test(a[i], b[i], np.random.default_rng([seed, i]))
        found[name] = Difference(float(values[i]), *percentile_interval(drawn[:, i]), p, int(both.sum()))
    return found


def mcnemar_test(only_one: int, only_other: int) -> float:
    """Exact two-sided p-value: of questions that one side alone got right, each is a fair coin's under no difference.

    Twice the binomial tail, at most 1 (McNemar 1947, exact form).
    """
    n = only_one + only_other
    tail = sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / (1 << n))


def permutation_test(a: Floats, b: Floats, rng: np.random.Generator) -> float:
    """Two-sided p-value of a paired permutation test: had the two models swapped their answers to some questions, how
    often would the figures differ as much?

    a, b: [seed, question, numerator and denominator]; a question is exchanged with all its seeds. All exchanges are
    counted when at most EXACT_LIMIT questions differ; else PERMUTATIONS are drawn, and the observed one counted among them.
    nan when a side has no figure.
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
    for start in range(0, count, _ROWS):
        size = min(_ROWS, count - start)
        if exact:
            swaps = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            swaps = rng.integers(2, size=(size, n))
        # einsum, not a matrix product: BLAS threads that share two busy cores take a hundred times as long.
        shift = np.einsum("rq,qsc->rsc", swaps.astype(np.float64), gap)
        swapped = mean_over_seeds(total_b - shift) - mean_over_seeds(total_a + shift)
        # An exchange that leaves a side without a figure cannot speak for a difference.
        extreme += int((np.isnan(swapped) | (np.abs(swapped) >= abs(observed) - 1e-9)).sum())
    return extreme / count if exact else (extreme + 1) / (count + 1)
