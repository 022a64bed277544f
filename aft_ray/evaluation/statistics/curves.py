"""Accuracy as a function of the number n of samples per question, from 1 to all k.

Invariant: a point uses the same subsets of the samples for every question and every model, so curves differ only
because the models do. The last point equals the metric in `metrics`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aft_ray.evaluation.answers import AnsweredQuestion
from aft_ray.evaluation.statistics.bootstrap import Estimate, bootstrap_resamples, estimate_metrics
from aft_ray.evaluation.statistics.metrics import Canonical, pass_at_k, sampling_seeds, smallest_k
from aft_ray.evaluation.statistics.voting import RULES, RULES_BY_SCORE, Ints, sample_arrays
from aft_ray.verify.answers.canonical import normalise

# The largest number of subsets that a point is averaged over.
MAX_SUBSETS = 64
PASS_AT_N = "pass@{n}"


@dataclass(frozen=True, slots=True)
class Curves:
    """Accuracy of each rule ("maj@n", "best-of-n", "vote@n", "pass@n") with each number of samples.

    Attributes:
        n: the numbers of samples.
        rules: for each rule one estimate per number in `n`.
    """

    n: list[int]
    rules: dict[str, list[Estimate]]

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "rules": {name: [e.to_json() for e in points] for name, points in self.rules.items()}}


def sample_counts(k: int) -> list[int]:
    """The numbers of samples of the points of a curve: the powers of two up to k, and k."""
    return sorted({*(2**i for i in range(k.bit_length())), k})


def subsets(k: int, n: int, seed: int = 0) -> Ints:
    """Subsets of size n of the indices below k, ascending in each row; shape [subset, n].

    All subsets if there are at most MAX_SUBSETS, else that many random ones, which depend on `seed`.
    """
    if math.comb(k, n) <= MAX_SUBSETS:
        return np.array(list(itertools.combinations(range(k), n)), dtype=np.int64)
    drawn = np.random.default_rng([seed, k, n]).random((MAX_SUBSETS, k)).argsort(axis=1)[:, :n]
    return np.sort(drawn, axis=1)


def accuracy_curves(
    answered: Sequence[AnsweredQuestion],
    *,
    k: int | None = None,
    canonical: Canonical = normalise,
    resamples: int = 1000,
    seed: int = 0,
) -> Curves | None:
    """The curves of one model; None if some question has fewer than two samples. For `k` see `measure`."""
    answered = sorted(answered, key=lambda question: question.id)
    k = smallest_k(answered) if k is None else min(k, smallest_k(answered))
    if k < 2:
        return None
    scored = all(sample.score is not None for question in answered for sample in question.samples)
    rules = {name: rule for name, rule in RULES.items() if scored or name not in RULES_BY_SCORE}
    counts, seeds = sample_counts(k), sampling_seeds(answered)
    chosen = {n: subsets(k, n, seed) for n in counts}
    names = [name.format(n=n) for name in (*rules, PASS_AT_N) for n in counts]
    columns = np.zeros((len(names), len(seeds), len(answered), 2))
    for q, question in enumerate(answered):
        for s, sampling_seed in enumerate(seeds):
            if samples := question.samples_of_seed(sampling_seed):
                arrays = sample_arrays(samples[:k], canonical)
                values = [float(rule(arrays, chosen[n]).mean()) for rule in rules.values() for n in counts]
                right = sum(sample.right for sample in samples)
                values += [pass_at_k(len(samples), right, n) for n in counts]
                columns[:, s, q, 0], columns[:, s, q, 1] = values, 1.0
    found = estimate_metrics(names, columns, bootstrap_resamples(columns, resamples, np.random.default_rng(seed)))
    return Curves(
        counts, {name.format(n="n"): [found[name.format(n=n)] for n in counts] for name in (*rules, PASS_AT_N)}
    )
