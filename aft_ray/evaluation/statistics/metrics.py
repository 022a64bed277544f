"""The metrics of a model on a split, each with a 95 % bootstrap interval over the questions.

An undecided response does not count as right, stays in the denominator of the accuracies, is left out of the assessment
accuracy, and is reported as a separate count. Invariant: no metric depends on the order of the questions.
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

# The assessment accuracy compares 3 right with 3 wrong samples (arXiv 2309.02144).
ASSESSMENT_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """The metrics of one model on one split, or on one task of it.

    Attributes:
        seeds: number of sampling seeds. Each seed has its own k samples of every question.
        k: number of samples used per question and seed: as many as the question with the fewest samples has.
        assessed: number of right samples, and of wrong samples, that the assessment accuracy compares: 3, or k // 2
            (at least 1) if k is less than 6, so that questions can still qualify. Values with different `assessed` are
            not comparable.
        estimates: the metrics over all questions by name: "greedy"; with samples also "pass@1", "pass@k", "maj@k",
            "best-of-k", "vote@k", "assessment" and "perplexity", with k as a number. Metrics that need scores exist
            only if every sample has one. All are shares between 0 and 1, except the perplexity.
        tasks: the metrics of each task; empty if there is only one.
        macro: the mean of each metric over the tasks, unweighted; empty if there is only one.
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
        """The metrics as JSON values; an undefined number is null."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        record: dict[str, Any] = {
            **counts,
            "estimates": {n: estimate.to_json() for n, estimate in self.estimates.items()},
        }
        if self.tasks:
            record["macro"] = {name: estimate.to_json() for name, estimate in self.macro.items()}
            record["tasks"] = {task: result.to_json() for task, result in self.tasks.items()}
        return record

    def flat_values(self) -> dict[str, float | None]:
        """All values by flat names for a line of `metrics.jsonl`: "greedy", "maj_6", and for a task "gsm8k/maj_6"."""
        flat = {name.replace("@", "_"): finite_or_none(estimate.value) for name, estimate in self.estimates.items()}
        for task, result in self.tasks.items():
            flat |= {f"{task}/{name}": value for name, value in result.flat_values().items()}
        return flat

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EvaluationMetrics:
        """The inverse of `to_json`; other fields of the record are ignored."""
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
    """Computes all metrics.

    Args:
        k: the largest number of samples to use, so that models with different numbers of samples can be compared.
        canonical: maps equal answers to equal keys.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: there is no question.
    """
    if not answered:
        raise ValueError("there is nothing to measure: no question was answered")
    answered = sorted(answered, key=lambda question: question.id)
    k = smallest_k(answered) if k is None else min(k, smallest_k(answered))
    names, columns = metric_columns(answered, k, canonical)
    whole, _ = _metrics_of(answered, names, columns, k, resamples, np.random.default_rng(seed))
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
        parts[task], drawn = _metrics_of(of_task, names, columns[:, :, chosen], k, resamples, rng)
        draws.append(drawn)
    mean = np.mean(draws, axis=0)  # nan where the metric is undefined for any task
    macro = {}
    for i, name in enumerate(names):
        value = float(np.mean([part.estimates[name].value for part in parts.values()]))
        macro[name] = Estimate(value, *percentile_interval(mean[:, i]), whole.estimates[name].questions)
    return replace(whole, tasks=parts, macro=macro)


def smallest_k(answered: Sequence[AnsweredQuestion]) -> int:
    """The smallest number of samples per question and seed, without questions that have none; 0 if none has any."""
    seeds = sampling_seeds(answered)
    counts = [len(question.samples_of_seed(seed)) for question in answered if question.samples for seed in seeds]
    return min(filter(None, counts), default=0)


def sampling_seeds(answered: Sequence[AnsweredQuestion]) -> list[int]:
    return sorted({sample.seed for question in answered for sample in question.samples})


def metric_columns(
    answered: Sequence[AnsweredQuestion], k: int, canonical: Canonical = normalise
) -> tuple[list[str], Floats]:
    """Names of the metrics, and their columns of shape [metric, seed, question, 2] (see `bootstrap`).

    A question without samples of a seed adds nothing to the metrics of that seed.
    """
    seeds = sampling_seeds(answered) if k else []
    scored = all(sample.score is not None for question in answered for sample in question.samples)
    names = ["greedy"] if any(question.greedy is not None for question in answered) else []
    if seeds:
        names += [f"pass@{size}" for size in sorted({1, k})]
        names += [rule.format(n=k) for rule in RULES if scored or rule not in RULES_BY_SCORE]
        names += ["assessment", "perplexity"] if scored else []
    columns = np.zeros((len(names), max(1, len(seeds)), len(answered), 2))
    row_of = {name: i for i, name in enumerate(names)}
    for q, question in enumerate(answered):
        if question.greedy is not None:
            columns[row_of["greedy"], 0, q] = question.greedy.right, 1
        for s, seed in enumerate(seeds):
            if samples := question.samples_of_seed(seed):
                for name, value in _question_metrics(samples, k, canonical, scored).items():
                    columns[row_of[name], s, q] = value
    return names, columns


def _question_metrics(
    samples: Sequence[Response], k: int, canonical: Canonical, scored: bool
) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of every metric for the samples of one question and one seed."""
    right = sum(sample.right for sample in samples)
    metrics = {f"pass@{size}": (pass_at_k(len(samples), right, size), 1.0) for size in sorted({1, k})}
    arrays, all_samples = sample_arrays(samples[:k], canonical), np.arange(k)[None]
    for name, rule in RULES.items():
        if scored or name not in RULES_BY_SCORE:
            metrics[name.format(n=k)] = float(rule(arrays, all_samples)[0]), 1.0
    if scored:
        share = assessment_accuracy(samples, assessment_samples(k))
        metrics["assessment"] = (0.0, 0.0) if share is None else (share, 1.0)
        metrics["perplexity"] = right_perplexity(samples)
    return metrics


def _metrics_of(
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
    """Number of right samples, and of wrong samples, that the assessment accuracy compares with k samples."""
    return max(1, min(ASSESSMENT_SAMPLES, k // 2))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include a right one (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def assessment_accuracy(samples: Sequence[Response], assessed: int = ASSESSMENT_SAMPLES) -> float | None:
    """Assessment accuracy of one question (arXiv 2309.02144).

    Returns:
        The share of the pairs of the first `assessed` right and wrong samples in which the right one has the higher
        score. Equal scores count half. None if there are fewer than `assessed` right or wrong samples.
    """
    right = np.array([s.score for s in samples if s.verdict is Verdict.RIGHT][:assessed], dtype=np.float64)
    wrong = np.array([s.score for s in samples if s.verdict is Verdict.WRONG][:assessed], dtype=np.float64)
    if len(right) < assessed or len(wrong) < assessed:
        return None
    above, equal = right[:, None] > wrong, right[:, None] == wrong
    return float(above.mean() + equal.mean() / 2)


def right_perplexity(samples: Sequence[Response]) -> tuple[float, float]:
    """Sum of the perplexities exp(-score) of the right samples, and their number."""
    scores = [sample.score for sample in samples if sample.right and sample.score is not None]
    return math.fsum(math.exp(min(-score, 700.0)) for score in scores), float(len(scores))
