"""Measures a model on a split with the run's own engines: one greedy answer and k samples a question.

Invariant: scores are the engine's log-probs of the very tokens it sampled, the same number as in training and serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from aft_ray.config import RunConfig
from aft_ray.evaluation.metrics import Answered, Result, Sample, measure
from aft_ray.records import Candidate, Group, Verdict
from aft_ray.sampling.engine import SamplingSpec
from aft_ray.sampling.pool import SamplerPool, SamplersFailed
from aft_ray.sampling.stream import answer_all
from aft_ray.weights.publication import Publication

Progress = Callable[[int, int], None]


def evaluate(
    config: RunConfig,
    pool: SamplerPool,
    publication: Publication | None,
    questions: Sequence[Group],
    k: int,
    progress: Progress | None = None,
) -> tuple[Result, dict[str, Any]]:
    """The metrics, and how they came about: tokens, seconds, truncated responses, questions that had no answer.

    A parked question counts as not answered, undecided in every metric, so that failures cannot raise an accuracy.
    """
    started = time.monotonic()
    max_tokens = config.sampling.max_tokens
    greedy = SamplingSpec(1, 0.0, 1.0, max_tokens)
    passes = [("greedy", greedy)]
    if k:
        passes.append(("samples", SamplingSpec(k, config.evaluation.temperature, 1.0, max_tokens)))
    total, done = len(questions) * len(passes), 0
    answers: dict[str, dict[str, Group]] = {}
    parked: dict[str, str] = {}
    # The seed of evaluation is its own: two models are compared on the same draws whatever their runs' seeds.
    seeded = config.model_copy(update={"seed": config.evaluation.seed})
    for name, how in passes:
        answers[name] = {}
        for group, reason in answer_all(seeded, pool, publication, questions, how, f"evaluation {name}"):
            answers[name][group.question.id] = group
            if reason is not None:
                parked[group.question.id] = reason
            done += 1
            if progress:
                progress(done, total)
    if len(parked) == len(questions):
        raise SamplersFailed(f"no question could be answered; the last reason: {next(reversed(parked.values()))}")
    records = [
        _answered(group, answers["greedy"][group.question.id], answers.get("samples", {}).get(group.question.id))
        for group in questions
    ]
    result = measure(records, resamples=config.evaluation.resamples, seed=config.evaluation.seed)
    candidates = [c for groups in answers.values() for group in groups.values() for c in group.candidates]
    facts = {
        "seconds": time.monotonic() - started,
        "tokens": sum(len(candidate.token_ids) for candidate in candidates),
        "truncated": sum(candidate.finish_reason == "length" for candidate in candidates),
        "parked": len(parked),
    }
    return result, facts


def _answered(question: Group, greedy: Group, sampled: Group | None) -> Answered:
    (verdict,) = [_verdict(candidate) for candidate in greedy.candidates] or [None]
    samples = [Sample(_verdict(c), c.answer, c.score) for c in (sampled.candidates if sampled else [])]
    return Answered(question.question.id, verdict, samples)


def _verdict(candidate: Candidate) -> bool | None:
    return None if candidate.verdict is Verdict.UNDECIDED else candidate.verdict is Verdict.RIGHT


def unanswered(questions: Sequence[Group], version: int) -> list[Group]:
    """The questions marked with the version that is to answer them."""
    return [replace(group, policy_version=version, candidates=[]) for group in questions]
