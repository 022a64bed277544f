"""What a model's answers to a split are worth, each figure with a 95 % bootstrap interval over the questions.

An undecided answer is not counted as right, stays in the denominator of the accuracies, forms no pair in the
assessment, and is shown as a number of its own. Invariant: no figure depends on the order of the questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from aft_ray.evaluation.answers import AnsweredQuestion, Response
from aft_ray.evaluation.statistics.bootstrap import (
    Estimate,
    Floats,
    bootstrap_resamples,
    estimate_metrics,
    finite_or_none,
    percentile_interval,
)
from aft_ray.evaluation.statistics.voting import RULES, RULES_BY_SCORE, sample_arrays
from aft_ray.storage.records import Verdict
from aft_ray.verify.answers.canonical import normalise

Canonical = Callable[[str], Hashable]

# METHOD: the assessment compares 3 right with 3 wrong samples.
ASSESSMENT_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """The metrics of one model on one split, or on one task of it.

    estimates: over the questions. "greedy"; with samples also "pass@1", "pass@k", "maj@k", "best-of-k", "vote@k",
        "assessment" and "perplexity", with k as a number; those that need scores only when every sample has one.
        Shares of 1, but for the perplexity.
    seeds: sampling seeds, each of which drew its own k samples of a question.
    k: samples used of every question and seed: as many as the question with the fewest has.
    assessed: right and as many wrong samples that the assessment compares: 3, or k // 2 when k is less than 6 (at
        least 1), so that a question can still qualify; figures with different `assessed` are not comparable.
    tasks: when the questions are of several tasks, the metrics of each.
    macro: likewise, the mean over the tasks of each figure, whatever their sizes.
    """

    questions: int
    seeds: int
    k: int
    assessed: int
    undecided_greedy: int
    undecided_samples: int
    estimates: dict[str, Estimate]
    tasks: dict[str, EvaluationMetrics] = field(default_factory=dict)
    macro: dict[str, Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`; a figure that does not exist is null."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        figures = {name: estimate.to_json() for name, estimate in self.estimates.items()}
        record = {**counts, "estimates": figures}
        if self.tasks:
            record["macro"] = {name: estimate.to_json() for name, estimate in self.macro.items()}
            record["tasks"] = {task: result.to_json() for task, result in self.tasks.items()}
        return record

    def flat_values(self) -> dict[str, float | None]:
        """All values by a flat name, for a line of metrics: "greedy", "maj_6", and "gsm8k/maj_6" of a task."""
        flat = {name.replace("@", "_"): finite_or_none(estimate.value) for name, estimate in self.estimates.items()}
        for task, result in self.tasks.items():
            flat |= {f"{task}/{name}": value for name, value in result.flat_values().items()}
        return flat

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EvaluationMetrics:
        """The inverse of `to_json`; what else a record holds is left aside."""
        return cls(
            **{name: value[name] for name in _COUNTS},
            estimates={name: Estimate.from_json(e) for name, e in value["estimates"].items()},
            tasks={task: cls.from_json(result) for task, result in value.get("tasks", {}).items()},
            macro={name: Estimate.from_json(e) for name, e in value.get("macro", {}).items()},
        )


_COUNTS = ("questions", "seeds", "k", "assessed", "undecided_greedy", "undecided_samples")


def measure(
    answered: Sequence[AnsweredQuestion],
    *,
    k: int | None = None,
    canonical: Canonical = normalise,
    resamples: int = 1000,
    seed: int = 0,
) -> EvaluationMetrics:
    """All metrics. `canonical` maps equal answers to equal keys; `k` limits the samples that are used, so that models
    with different numbers of them compare. Raises ValueError when there is no question."""
    if not answered:
        raise ValueError("there is nothing to measure: no question was answered")
    answered = sorted(answered, key=lambda question: question.id)
    k = smallest_k(answered) if k is None else min(k, smallest_k(answered))
    names, columns = metric_columns(answered, k, canonical)
    whole, _ = _result(answered, names, columns, k, resamples, np.random.default_rng(seed))
    tasks = sorted({question.task for question in answered})
    if len(tasks) < 2:
        return whole
    parts: dict[str, EvaluationMetrics] = {}
    draws = []
    for number, task in enumerate(tasks):
        chosen = [i for i, question in enumerate(answered) if question.task == task]
        # Tasks are resampled independently of each other.
        rng = np.random.default_rng([seed, number])
        of_task = [answered[i] for i in chosen]
        parts[task], drawn = _result(of_task, names, columns[:, :, chosen], k, resamples, rng)
        draws.append(drawn)
    mean = np.mean(draws, axis=0)  # nan where any task has no figure
    macro = {}
    for i, name in enumerate(names):
        value = float(np.mean([part.estimates[name].value for part in parts.values()]))
        macro[name] = Estimate(value, *percentile_interval(mean[:, i]), whole.estimates[name].questions)
    return replace(whole, tasks=parts, macro=macro)


def smallest_k(answered: Sequence[AnsweredQuestion]) -> int:
    """The fewest samples that any seed drew of any question; questions without any are left out. 0: none has any."""
    seeds = sampling_seeds(answered)
    counts = [len(question.samples_of_seed(seed)) for question in answered if question.samples for seed in seeds]
    return min(filter(None, counts), default=0)


def sampling_seeds(answered: Sequence[AnsweredQuestion]) -> list[int]:
    return sorted({sample.seed for question in answered for sample in question.samples})


def metric_columns(
    answered: Sequence[AnsweredQuestion], k: int, canonical: Canonical = normalise
) -> tuple[list[str], Floats]:
    """The figures' names, and their columns (`bootstrap`); a question without samples of a seed adds nothing to it."""
    seeds = sampling_seeds(answered) if k else []
    scored = all(sample.score is not None for question in answered for sample in question.samples)
    names = ["greedy"] if any(question.greedy is not None for question in answered) else []
    if seeds:
        names += [f"pass@{size}" for size in sorted({1, k})]
        names += [rule.format(n=k) for rule in RULES if scored or rule not in RULES_BY_SCORE]
        names += ["assessment", "perplexity"] if scored else []
    columns = np.zeros((len(names), max(1, len(seeds)), len(answered), 2))
    place = {name: i for i, name in enumerate(names)}
    for q, question in enumerate(answered):
        if question.greedy is not None:
            columns[place["greedy"], 0, q] = question.greedy.right, 1
        for s, seed in enumerate(seeds):
            if samples := question.samples_of_seed(seed):
                for name, value in _figures(samples, k, canonical, scored).items():
                    columns[place[name], s, q] = value
    return names, columns


def _figures(samples: Sequence[Response], k: int, canonical: Canonical, scored: bool) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of every figure of one question's samples by one seed."""
    right = sum(sample.right for sample in samples)
    figures = {f"pass@{size}": (pass_at_k(len(samples), right, size), 1.0) for size in sorted({1, k})}
    cast, everyone = sample_arrays(samples[:k], canonical), np.arange(k)[None]
    for name, rule in RULES.items():
        if scored or name not in RULES_BY_SCORE:
            figures[name.format(n=k)] = float(rule(cast, everyone)[0]), 1.0
    if scored:
        share = assessment_accuracy(samples, assessment_samples(k))
        figures["assessment"] = (0.0, 0.0) if share is None else (share, 1.0)
        figures["perplexity"] = right_perplexity(samples)
    return figures


def _result(
    answered: Sequence[AnsweredQuestion],
    names: Sequence[str],
    columns: Floats,
    k: int,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[EvaluationMetrics, Floats]:
    draws = bootstrap_resamples(columns, resamples, rng)
    undecided = Verdict.UNDECIDED
    result = EvaluationMetrics(
        questions=len(answered),
        seeds=len(sampling_seeds(answered)),
        k=k,
        assessed=assessment_samples(k),
        undecided_greedy=sum(q.greedy is not None and q.greedy.verdict is undecided for q in answered),
        undecided_samples=sum(sample.verdict is undecided for question in answered for sample in question.samples),
        estimates=estimate_metrics(names, columns, draws, unseeded=("greedy",)),
    )
    return result, draws


def assessment_samples(k: int) -> int:
    return max(1, min(ASSESSMENT_SAMPLES, k // 2))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def assessment_accuracy(samples: Sequence[Response], assessed: int = ASSESSMENT_SAMPLES) -> float | None:
    """Of the pairs of the first `assessed` right and wrong samples, the share in which the right one scores higher.

    Equal scores count half. None when there are fewer than `assessed` of either.
    """
    right = np.array([s.score for s in samples if s.verdict is Verdict.RIGHT][:assessed], dtype=np.float64)
    wrong = np.array([s.score for s in samples if s.verdict is Verdict.WRONG][:assessed], dtype=np.float64)
    if len(right) < assessed or len(wrong) < assessed:
        return None
    above, equal = right[:, None] > wrong, right[:, None] == wrong
    return float(above.mean() + equal.mean() / 2)


def right_perplexity(samples: Sequence[Response]) -> tuple[float, float]:
    """Sum of exp(-score) over the right samples, and their number."""
    scores = [sample.score for sample in samples if sample.right and sample.score is not None]
    return math.fsum(math.exp(min(-score, 700.0)) for score in scores), float(len(scores))
