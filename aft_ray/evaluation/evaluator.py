"""Sampling of answers to the questions of a split by running engines: a greedy response and k samples per seed.

Invariants: a score is the engine's log-probability of the very tokens that it sampled, as in training and serving. The
samples of a question depend on the seed of the evaluation and not on the run of the model, so models are compared with
the same random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aft_ray.config.run import RunConfig
from aft_ray.evaluation.answers import AnsweredQuestion, Response, missing_response, response_from_candidate
from aft_ray.inference.request_parameters import SamplingSpec
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.sampling.stream import sample_all
from aft_ray.storage.records import Group

if TYPE_CHECKING:
    from aft_ray.sampling.sampler_pool import SamplerPool
    from aft_ray.weights.version_manifest import VersionManifest


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Time and tokens of an evaluation, and how many responses are incomplete.

    Attributes:
        tokens: number of sampled tokens.
        truncated: number of responses that were cut off at sampling.max_tokens.
        parked: number of failed questions, which lack at least one response. The name is that of the field in the
            evaluation's JSON file.
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
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[AnsweredQuestion], GenerationStats]:
    """Samples the responses to all questions.

    A failed question gets undecided responses, so failures cannot raise an accuracy.

    Args:
        manifest: the version that must answer; None: the model that the engines were started with.
        questions: groups without candidates.
        k: number of samples per question and seed; 0: only greedy responses.
        seeds: number of sampling seeds: evaluation.seed, evaluation.seed + 1, and so on.
        progress: is called with the number of finished requests and the number of all requests.

    Returns:
        The answered questions in the order of `questions`, and statistics.

    Raises:
        SamplersFailed: every question failed.
    """
    started = time.monotonic()
    first, max_tokens = config.evaluation.seed, config.sampling.max_tokens
    sampled = SamplingSpec(k, config.evaluation.temperature, 1.0, max_tokens)
    passes = [("greedy", first, SamplingSpec(1, 0.0, 1.0, max_tokens))]
    passes += [("samples", seed, sampled) for seed in range(first, first + seeds if k else first)]
    greedy: dict[str, Response] = {}
    samples: dict[str, list[Response]] = {group.question.id: [] for group in questions}
    failed: dict[str, str] = {}
    done = tokens = truncated = 0
    for name, seed, spec in passes:
        seeded = config.model_copy(update={"seed": seed})
        for group, reason in sample_all(seeded, pool, manifest, questions, spec, f"evaluation {name}"):
            id = group.question.id
            if reason is not None:
                failed[id] = reason
            if name == "greedy":
                candidates = group.candidates
                greedy[id] = response_from_candidate(candidates[0]) if candidates else missing_response()
            else:
                drawn = [response_from_candidate(candidate, seed) for candidate in group.candidates]
                samples[id] += drawn or [missing_response(seed)] * k
            tokens += sum(len(candidate.token_ids) for candidate in group.candidates)
            truncated += sum(candidate.finish_reason == "length" for candidate in group.candidates)
            done += 1
            if progress:
                progress(done, len(questions) * len(passes))
    if len(failed) == len(questions):
        raise SamplersFailed(f"no question could be answered; the last reason: {next(reversed(failed.values()))}")
    answered = [
        AnsweredQuestion(one.id, greedy[one.id], samples[one.id], one.task, one.text, one.gold)
        for one in (group.question for group in questions)
    ]
    return answered, GenerationStats(time.monotonic() - started, tokens, truncated, len(failed))


def unanswered_groups(questions: Sequence[Group], version: int) -> list[Group]:
    """The same questions without candidates, for a model version to answer."""
    return [replace(group, policy_version=version, candidates=[]) for group in questions]
