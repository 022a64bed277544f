"""Figures with intervals: ratios of sums over questions, resampled by question.

Every figure here is a ratio of two sums over questions (for an accuracy: right answers over questions) for each seed,
averaged over the seeds. One array of [figure, seed, question, numerator and denominator] therefore serves them all, and
their intervals rest on the same resamples. Invariant: a question is drawn with all its figures and all its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# The 95 % interval, in percentiles of the resamples.
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval, over the `questions` that it could be computed for; nan when there are none.

    per_seed: the figure of each sampling seed; `value` is their mean. Empty for a mean over tasks.
    """

    value: float
    low: float
    high: float
    questions: int
    per_seed: tuple[float, ...] = ()

    @property
    def std(self) -> float:
        """Standard deviation over the seeds (with n - 1); nan when there are fewer than two."""
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
    """What JSON can hold: None for nan and infinities."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def ratios(sums: Floats) -> Floats:
    """[..., numerator and denominator] → [...]; nan where there is nothing to divide by."""
    numerators, denominators = sums[..., 0], sums[..., 1]
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators > 0)


def mean_over_seeds(sums: Floats) -> Floats:
    """[..., seed, numerator and denominator] → [...]: the mean over the seeds that have a figure, else nan."""
    by_seed = ratios(sums)
    known = ~np.isnan(by_seed)
    return ratios(np.stack([np.where(known, by_seed, 0.0).sum(axis=-1), known.sum(axis=-1)], axis=-1))


def bootstrap_resamples(columns: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """[resample, figure]: every figure again, on as many questions drawn with replacement."""
    figures, seeds, questions, _ = columns.shape
    flat = columns.transpose(2, 0, 1, 3).reshape(questions, -1)
    sums = np.empty((resamples, flat.shape[1]))
    for i in range(resamples):  # a row at a time: the matrix of all draws would not fit for a large split
        sums[i] = np.bincount(rng.integers(questions, size=questions), minlength=questions) @ flat
    return mean_over_seeds(sums.reshape(resamples, figures, seeds, 2))


def percentile_interval(draws: Floats) -> tuple[float, float]:
    """The percentile interval of the resamples that have a figure."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, INTERVAL)
    return float(low), float(high)


def estimate_metrics(
    names: Sequence[str], columns: Floats, draws: Floats, unseeded: Collection[str] = ()
) -> dict[str, Estimate]:
    """An estimate of each named row of `columns`; `draws` are its `resampled` figures.

    unseeded: the figures that no sampling stands behind; all they have is in the first place of the seeds' axis.
    """
    sums = columns.sum(axis=2)
    values, by_seed = mean_over_seeds(sums), ratios(sums)
    defined = (columns[..., 1] > 0).any(axis=1).sum(axis=1)
    found = {}
    for i, name in enumerate(names):
        per_seed = by_seed[i, :1] if name in unseeded else by_seed[i]
        low, high = percentile_interval(draws[:, i])
        found[name] = Estimate(float(values[i]), low, high, int(defined[i]), tuple(map(float, per_seed)))
    return found
