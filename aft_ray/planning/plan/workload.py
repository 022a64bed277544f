"""How much there is to do in a round: questions, rows and tokens, from config, the task's known size and assumptions.

Invariant: sizes of rounds are computed by the very function that a run uses (`aft_ray.tasks.dataset.round_size`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.config.tasks import DataConfig
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.tasks.dataset import round_size


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """Questions of a split, and mean tokens of a prompt and a reference response under a tokenizer like Llama's."""

    train: int
    validation: int
    prompt: float
    response: float


# Splits: those that aft_ray.tasks makes of the public data. Lengths of gsm8k, aqua_rat and ecqa: means over their
# training questions under SmolLM2's tokenizer, which like Llama's splits numbers into digits (docs/planning.md);
# arithmetic: under its own.
KNOWN = {
    "gsm8k": TaskFacts(7473, 400, 65, 93),
    "aqua_rat": TaskFacts(96_321, 400, 87, 54),
    "ecqa": TaskFacts(7598, 1090, 49, 29),
    "mmlu": TaskFacts(0, 1531, 120, 5),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens are means. rows: of a group in training, its reference and the candidates that train, of k. counted: how
    the number of questions is known."""

    questions: int
    vft_questions: int
    validation: int
    counted: str
    prompt: float
    response: float
    rows: float
    k: int
    steps: int
    vft_steps: int

    @property
    def row(self) -> float:
        """Tokens of a prompt with a response."""
        return self.prompt + self.response


def workload(config: RunConfig, assumed: PlanAssumptions) -> Workload:
    """What a round of the run amounts to. Raises ConfigError when the number of questions is not known."""
    facts = {name: _facts(name, data, assumed) for name, data in config.task_configs.items()}
    counts = {name: fact.train for name, fact in facts.items()}
    if assumed.questions is not None:
        counts = _scaled(counts, assumed.questions)
    if missing := [name for name, count in counts.items() if not count]:
        raise ConfigError(
            f"how many training questions {', '.join(missing)} has is not known before its data is read; say "
            f"--assume questions=NUMBER, or set train_limit"
        )
    vft, a_round = round_size(config, counts, 0), round_size(config, counts, min(1, config.rounds.count))
    room = config.model.max_length
    share = {name: config.task_weights[name] / sum(config.task_weights.values()) for name in facts}
    prompt = assumed.prompt_tokens or sum(share[name] * fact.prompt for name, fact in facts.items())
    response = assumed.response_tokens or sum(share[name] * fact.response for name, fact in facts.items())
    response = min(response, config.sampling.max_tokens, max(1.0, room - prompt))
    training = config.training
    validation = sum(fact.validation for fact in facts.values())
    return Workload(
        questions=a_round,
        vft_questions=vft,
        validation=assumed.validation_questions if assumed.validation_questions is not None else validation,
        counted=_counted(config, counts, assumed),
        prompt=prompt,
        response=response,
        rows=_rows(config, assumed),
        k=config.sampling.k,
        steps=-(-a_round // training.groups_per_step) * training.epochs,
        vft_steps=-(-vft // config.vft.questions_per_step) * config.vft.epochs,
    )


def _rows(config: RunConfig, assumed: PlanAssumptions) -> float:
    """Rows of a group: the reference, and the distinct candidates of groups whose rewards differ; `rft` trains on the
    right ones of every group, about half."""
    objective = config.objective.spec
    if not objective.uses_candidates:
        return 1.0
    share = 0.5 if objective.right_candidates_only else assumed.signal
    return 1 + share * assumed.distinct * config.sampling.k


def _facts(name: str, data: DataConfig, assumed: PlanAssumptions) -> TaskFacts:
    if data.task == "arithmetic":
        sizes = data.arithmetic
        steps = (sizes.min_steps + sizes.max_steps) / 2
        facts = TaskFacts(sizes.train_size, sizes.validation_size, 13 + 9 * steps, 4 + 9 * steps)
    else:
        facts = KNOWN.get(data.task, TaskFacts(0, 0, 80, 100))
    limits = (data.train_limit, data.validation_limit)
    train, validation = (
        limit if known == 0 and limit else min(known, limit or known)
        for known, limit in zip((facts.train, facts.validation), limits, strict=True)
    )
    return TaskFacts(train, validation, facts.prompt, facts.response)


def _scaled(counts: Mapping[str, int], questions: int) -> dict[str, int]:
    """So many questions, shared by the tasks like those that are known; equally when none is."""
    weights = {name: count or (0 if any(counts.values()) else 1) for name, count in counts.items()}
    return {name: max(1, round(questions * weight / sum(weights.values()))) for name, weight in weights.items()}


def _counted(config: RunConfig, counts: Mapping[str, int], assumed: PlanAssumptions) -> str:
    parts = []
    for name, data in config.task_configs.items():
        if assumed.questions is not None:
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
