"""Asks a model the questions of a split with running engines: one greedy answer, and k samples a seed.

Invariant: scores are the engine's log-probs of the very tokens it sampled, the same number as in training and serving;
and what a question's samples depend on is the seed of evaluation, never the model's run, so that models compare on the
same draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from aft_ray.config.run import RunConfig
from aft_ray.evaluation.answers import AnsweredQuestion, Response, missing_response, response_from_candidate
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.sampling.stream import sample_all
from aft_ray.storage.records import Group
from aft_ray.weights.version_manifest import VersionManifest

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What the answers took, and how many are no real answers.

    truncated: responses cut off at sampling.max_tokens. parked: questions of which any response failed.
    """

    seconds: float
    tokens: int
    truncated: int
    parked: int


def answer_questions(
    config: RunConfig,
    pool: SamplerPool,
    manifest: VersionManifest | None,
    questions: Sequence[Group],
    k: int,
    seeds: int,
    progress: Progress | None = None,
) -> tuple[list[AnsweredQuestion], GenerationStats]:
    """Every question with its greedy response and, for each of the seeds evaluation.seed, +1, ..., k samples.

    A failed question is answered with undecided responses, so that failures cannot raise an accuracy. Raises
    SamplersFailed when all failed.
    """
    started = time.monotonic()
    first, max_tokens = config.evaluation.seed, config.sampling.max_tokens
    sampled = SamplingSpec(k, config.evaluation.temperature, 1.0, max_tokens)
    passes = [("greedy", first, SamplingSpec(1, 0.0, 1.0, max_tokens))]
    passes += [("samples", seed, sampled) for seed in range(first, first + seeds if k else first)]
    greedy: dict[str, Response] = {}
    samples: dict[str, list[Response]] = {group.question.id: [] for group in questions}
    parked: dict[str, str] = {}
    done = tokens = truncated = 0
    for name, seed, how in passes:
        seeded = config.model_copy(update={"seed": seed})
        for group, reason in sample_all(seeded, pool, manifest, questions, how, f"evaluation {name}"):
            id = group.question.id
            if reason is not None:
                parked[id] = reason
            if name == "greedy":
                greedy[id] = next(
                    (response_from_candidate(candidate) for candidate in group.candidates), missing_response()
                )
            else:
                drawn = [response_from_candidate(candidate, seed) for candidate in group.candidates]
                samples[id] += drawn or [missing_response(seed)] * k
            tokens += sum(len(candidate.token_ids) for candidate in group.candidates)
            truncated += sum(candidate.finish_reason == "length" for candidate in group.candidates)
            done += 1
            if progress:
                progress(done, len(questions) * len(passes))
    if len(parked) == len(questions):
        raise SamplersFailed(f"no question could be answered; the last reason: {next(reversed(parked.values()))}")
    answered = [
        AnsweredQuestion(one.id, greedy[one.id], samples[one.id], one.task, one.text, one.gold)
        for one in (group.question for group in questions)
    ]
    return answered, GenerationStats(time.monotonic() - started, tokens, truncated, len(parked))


def unanswered_groups(questions: Sequence[Group], version: int) -> list[Group]:
    """The questions marked with the version that is to answer them."""
    return [replace(group, policy_version=version, candidates=[]) for group in questions]
