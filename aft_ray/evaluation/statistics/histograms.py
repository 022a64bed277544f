"""Distributions of the scores of right and of wrong samples, which the assessment accuracy summarises in one number.

Invariant: all models of one plot are counted in the same bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aft_ray.evaluation.answers import AnsweredQuestion
from aft_ray.storage.records import Verdict

BINS = 40
# The lowest scores are rare outliers. Scores below this percentile of all scores are counted in the first bin.
TAIL_PERCENTILE = 0.5


@dataclass(frozen=True, slots=True)
class Histogram:
    """Numbers of right and of wrong samples in each bin. Undecided samples are not counted.

    Attributes:
        edges: edges of the bins in nats per token, one more than there are bins.
    """

    edges: list[float]
    right: list[int]
    wrong: list[int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score_histograms(models: Mapping[str, Sequence[AnsweredQuestion]]) -> dict[str, Histogram]:
    """The histogram of each model that has samples with scores and verdicts, by the label of the model."""
    scores = {label: _scores(answered) for label, answered in models.items()}
    known = [values for pair in scores.values() for values in pair if len(values)]
    if not known:
        return {}
    all_scores = np.concatenate(known)
    low, high = float(np.percentile(all_scores, TAIL_PERCENTILE)), float(all_scores.max())
    edges = np.linspace(low, high if high > low else low + 1e-3, BINS + 1)

    def count(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
        return [int(number) for number in np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]]

    return {
        label: Histogram([float(edge) for edge in edges], count(right), count(wrong))
        for label, (right, wrong) in scores.items()
        if len(right) or len(wrong)
    }


def _scores(answered: Sequence[AnsweredQuestion]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """The finite scores of the right samples, and those of the wrong samples."""
    return [
        np.array(
            [
                sample.score
                for question in answered
                for sample in question.samples
                if sample.verdict is verdict and sample.score is not None and np.isfinite(sample.score)
            ],
            dtype=np.float64,
        )
        for verdict in (Verdict.RIGHT, Verdict.WRONG)
    ]
