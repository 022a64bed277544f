"""Metrics with bootstrap intervals over the questions (Efron 1979, percentile interval).

Every metric is a ratio of two sums over questions (for an accuracy: right answers / questions), computed for each seed
and averaged over the seeds. All metrics are therefore stored in one array of shape [metric, seed, question, 2], whose
last axis holds numerator and denominator, and their intervals use the same resamples. Invariant: a resampled question
brings all its metrics and all its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Percentiles of the resamples that bound the 95 % interval.
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The value of a metric with its 95 % interval. All numbers are nan if no question defines the metric.

    Attributes:
        questions: number of questions that the metric could be computed for.
        per_seed: the value for each sampling seed; `value` is their mean. Empty for a mean over tasks.
    """

    value: float
    low: float
    high: float
    questions: int
    per_seed: tuple[float, ...] = ()

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds (divisor n - 1); nan with fewer than two seeds."""
        known = [value for value in self.per_seed if not math.isnan(value)]
        return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "value": finite_or_none(self.value),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
            "questions": self.questions,
            "std": finite_or_none(self.std),
            "per_seed": [finite_or_none(value) for value in self.per_seed],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Estimate:
        """The inverse of `to_json`."""
        middle, low, high = (_number(value[name]) for name in ("value", "low", "high"))
        return cls(middle, low, high, value["questions"], tuple(map(_number, value["per_seed"])))


def finite_or_none(value: float) -> float | None:
    """The value, or None for nan and infinities, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def ratios(sums: Floats) -> Floats:
    """Maps [..., numerator and denominator] to [...]; nan where the denominator is 0."""
    numerators, denominators = sums[..., 0], sums[..., 1]
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators > 0)


def mean_over_seeds(sums: Floats) -> Floats:
    """Maps [..., seed, numerator and denominator] to [...]: the mean ratio of the seeds that have one, else nan."""
    by_seed = ratios(sums)
    known = ~np.isnan(by_seed)
    return ratios(np.stack([np.where(known, by_seed, 0.0).sum(axis=-1), known.sum(axis=-1)], axis=-1))


def bootstrap_resamples(columns: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Every metric on `resamples` bootstrap samples of the questions, as an array of shape [resample, metric]."""
    metrics, seeds, questions, _ = columns.shape
    flat = columns.transpose(2, 0, 1, 3).reshape(questions, -1)
    sums = np.empty((resamples, flat.shape[1]))
    for i in range(resamples):  # one by one: all of them together would not fit into memory for a large split
        sums[i] = np.bincount(rng.integers(questions, size=questions), minlength=questions) @ flat
    return mean_over_seeds(sums.reshape(resamples, metrics, seeds, 2))


def percentile_interval(draws: Floats) -> tuple[float, float]:
    """The percentile interval over the resamples in which the metric is defined; nan if there are none."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, INTERVAL)
    return float(low), float(high)


def estimate_metrics(
    names: Sequence[str], columns: Floats, draws: Floats, unseeded: Collection[str] = ()
) -> dict[str, Estimate]:
    """The estimate of each named metric.

    Args:
        names: names of the metrics, in the order of the first axis of `columns`.
        columns: shape [metric, seed, question, 2].
        draws: the result of `bootstrap_resamples` for these columns.
        unseeded: metrics without sampling, such as greedy accuracy; only the first place of their seed axis is used.
    """
    sums = columns.sum(axis=2)
    values, by_seed = mean_over_seeds(sums), ratios(sums)
    defined = (columns[..., 1] > 0).any(axis=1).sum(axis=1)
    estimates = {}
    for i, name in enumerate(names):
        per_seed = by_seed[i, :1] if name in unseeded else by_seed[i]
        low, high = percentile_interval(draws[:, i])
        estimates[name] = Estimate(float(values[i]), low, high, int(defined[i]), tuple(map(float, per_seed)))
    return estimates
