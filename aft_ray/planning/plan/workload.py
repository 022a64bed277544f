"""How much there is to do in a round: questions, responses and tokens, from the config, the task and the assumptions.

Invariant: the sizes of rounds are computed by the function that a run uses (`aft_ray.tasks.dataset.round_size`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.config.tasks import DataConfig
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.tasks.dataset import round_size


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What is known of a task's data.

    Attributes:
        train: Questions of the training split; 0 when that is not known.
        validation: Questions of the validation split.
        prompt: Mean tokens of a prompt, under a tokenizer like Llama's.
        response: Mean tokens of a reference response, under the same tokenizer.
        prompt_spread, response_spread: Standard deviations of the log lengths.
    """

    train: int
    validation: int
    prompt: float
    response: float
    prompt_spread: float
    response_spread: float


# The splits are those that aft_ray.tasks makes of the public data. The lengths of gsm8k, aqua_rat and ecqa are those of
# their training questions under SmolLM2's tokenizer, which splits numbers into digits like Llama's.
KNOWN_TASKS = {
    "gsm8k": TaskFacts(7473, 400, 65, 93, 0.32, 0.43),
    "aqua_rat": TaskFacts(96_321, 400, 87, 54, 0.24, 0.54),
    "ecqa": TaskFacts(7598, 1090, 49, 29, 0.13, 0.32),
    "mmlu": TaskFacts(0, 1531, 120, 5, 0.5, 0.3),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a round.

    Attributes:
        questions: Questions of a round after round 0.
        vft_questions: Questions of round 0.
        validation: Questions of the validation split.
        counted: How the number of questions is known.
        prompt: Mean tokens of a prompt.
        response: Mean tokens of a response.
        prompt_spread, response_spread: Standard deviations of the log lengths.
        responses: Mean responses of a group in training: the reference and the candidates that are trained on.
        k: Candidates of a question.
        steps: Optimiser steps of a round after round 0.
        vft_steps: Optimiser steps of round 0.
    """

    questions: int
    vft_questions: int
    validation: int
    counted: str
    prompt: float
    response: float
    prompt_spread: float
    response_spread: float
    responses: float
    k: int
    steps: int
    vft_steps: int

    @property
    def length(self) -> float:
        """Mean tokens of a prompt and a response together."""
        return self.prompt + self.response


def workload(config: RunConfig, assumptions: PlanAssumptions) -> Workload:
    """The work of a run's rounds.

    Raises:
        ConfigError: The number of training questions is not known.
    """
    facts = {name: _facts(data) for name, data in config.task_configs.items()}
    counts = {name: fact.train for name, fact in facts.items()}
    if assumptions.questions is not None:
        counts = _scaled(counts, assumptions.questions)
    if missing := [name for name, count in counts.items() if not count]:
        raise ConfigError(
            f"how many training questions {', '.join(missing)} has is not known before its data is read; say "
            f"--assume questions=NUMBER, or set train_limit"
        )
    vft, questions = round_size(config, counts, 0), round_size(config, counts, min(1, config.rounds.count))
    longest = config.model.max_length
    share = {name: config.task_weights[name] / sum(config.task_weights.values()) for name in facts}
    prompt = assumptions.prompt_tokens or sum(share[name] * fact.prompt for name, fact in facts.items())
    response = assumptions.response_tokens or sum(share[name] * fact.response for name, fact in facts.items())
    response = min(response, config.sampling.max_tokens, max(1.0, longest - prompt))
    training = config.training
    validation = sum(fact.validation for fact in facts.values())
    return Workload(
        questions=questions,
        vft_questions=vft,
        validation=assumptions.validation_questions if assumptions.validation_questions is not None else validation,
        counted=_counted(config, counts, assumptions),
        prompt=prompt,
        response=response,
        prompt_spread=sum(share[name] * fact.prompt_spread for name, fact in facts.items()),
        response_spread=sum(share[name] * fact.response_spread for name, fact in facts.items()),
        responses=_responses(config, assumptions),
        k=config.sampling.k,
        steps=-(-questions // training.groups_per_step) * training.epochs,
        vft_steps=-(-vft // config.vft.questions_per_step) * config.vft.epochs,
    )


def _responses(config: RunConfig, assumptions: PlanAssumptions) -> float:
    """Mean responses of a group in training: the reference, and the distinct candidates if their rewards differ.

    An objective that trains on right candidates alone takes about half of the candidates of every group.
    """
    objective = config.objective.spec
    if not objective.uses_candidates:
        return 1.0
    share = 0.5 if objective.right_candidates_only else assumptions.signal
    return 1 + share * assumptions.distinct * config.sampling.k


def _facts(data: DataConfig) -> TaskFacts:
    """What is known of a task's data, with the limits of its config."""
    if data.task == "arithmetic":
        sizes = data.arithmetic
        steps = (sizes.min_steps + sizes.max_steps) / 2
        facts = TaskFacts(sizes.train_size, sizes.validation_size, 13 + 9 * steps, 4 + 9 * steps, 0.25, 0.3)
    else:
        facts = KNOWN_TASKS.get(data.task, TaskFacts(0, 0, 80, 100, 0.5, 0.5))
    limits = (data.train_limit, data.validation_limit)
    train, validation = (
        limit if known == 0 and limit else min(known, limit or known)
        for known, limit in zip((facts.train, facts.validation), limits, strict=True)
    )
    return replace(facts, train=train, validation=validation)


def _scaled(counts: Mapping[str, int], questions: int) -> dict[str, int]:
    """Divides a number of questions among the tasks in proportion to `counts`; equally when none is known."""
    weights = {name: count or (0 if any(counts.values()) else 1) for name, count in counts.items()}
    return {name: max(1, round(questions * weight / sum(weights.values()))) for name, weight in weights.items()}


def _counted(config: RunConfig, counts: Mapping[str, int], assumptions: PlanAssumptions) -> str:
    """The number of each task's questions and where it comes from, in words."""
    parts = []
    for name, data in config.task_configs.items():
        if assumptions.questions is not None:
            source = "assumed"
        elif data.train_limit is not None and counts[name] == data.train_limit:
            source = f"{config.task_key(name)}.train_limit"
        elif data.task == "arithmetic":
            source = "arithmetic.train_size"
        else:
            source = f"the training split of {data.task}"
        parts.append(f"{counts[name]:,} of {name} ({source})")
    limit = config.rounds.questions_per_round
    return " + ".join(parts) + (f"; rounds.questions_per_round={limit:,}" if limit else "")
