"""How accuracy grows with the number of sampled answers, from n = 1 to all k of them.

Invariant: a point rests on the same subsets of the samples for every question and every model, so that curves differ
by the models alone; the last point is the figure of `metrics` itself.
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

# Subsets that a point is averaged over where there are more.
SUBSETS = 64
PASS = "pass@{n}"


@dataclass(frozen=True, slots=True)
class Curves:
    """Accuracy of each rule ("maj@n", "best-of-n", "vote@n", "pass@n") with each number of samples."""

    n: list[int]
    rules: dict[str, list[Estimate]]

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "rules": {name: [e.to_json() for e in points] for name, points in self.rules.items()}}


def sample_counts(k: int) -> list[int]:
    """1, 2, 4, ... and k itself."""
    return sorted({*(2**i for i in range(k.bit_length())), k})


def subsets(k: int, n: int, seed: int = 0) -> Ints:
    """[subset, n] ascending indices below k: all subsets of n when there are at most SUBSETS, else as many random."""
    if math.comb(k, n) <= SUBSETS:
        return np.array(list(itertools.combinations(range(k), n)), dtype=np.int64)
    drawn = np.random.default_rng([seed, k, n]).random((SUBSETS, k)).argsort(axis=1)[:, :n]
    return np.sort(drawn, axis=1)


def accuracy_curves(
    answered: Sequence[AnsweredQuestion],
    *,
    k: int | None = None,
    canonical: Canonical = normalise,
    resamples: int = 1000,
    seed: int = 0,
) -> Curves | None:
    """The curves of one model; None when there are no two samples of a question. `k` as for `measure`."""
    answered = sorted(answered, key=lambda question: question.id)
    k = smallest_k(answered) if k is None else min(k, smallest_k(answered))
    if k < 2:
        return None
    scored = all(sample.score is not None for question in answered for sample in question.samples)
    rules = {name: rule for name, rule in RULES.items() if scored or name not in RULES_BY_SCORE}
    counts, seeds = sample_counts(k), sampling_seeds(answered)
    chosen = {n: subsets(k, n, seed) for n in counts}
    names = [name.format(n=n) for name in (*rules, PASS) for n in counts]
    columns = np.zeros((len(names), len(seeds), len(answered), 2))
    for q, question in enumerate(answered):
        for s, drawn_by in enumerate(seeds):
            if samples := question.samples_of_seed(drawn_by):
                cast = sample_arrays(samples[:k], canonical)
                values = [float(rule(cast, chosen[n]).mean()) for rule in rules.values() for n in counts]
                right = sum(sample.right for sample in samples)
                values += [pass_at_k(len(samples), right, n) for n in counts]
                columns[:, s, q, 0], columns[:, s, q, 1] = values, 1.0
    found = estimate_metrics(names, columns, bootstrap_resamples(columns, resamples, np.random.default_rng(seed)))
    return Curves(counts, {name.format(n="n"): [found[name.format(n=n)] for n in counts] for name in (*rules, PASS)})
