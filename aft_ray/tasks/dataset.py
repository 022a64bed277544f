"""The questions of a run as token ids, and the questions of each round.

Invariants: sampling and training use the same token ids. Questions that cannot fit `model.max_length` are left out and
counted before anything starts. The number of questions of each task in a round depends only on the config and on the
number of questions of each task, so every process computes the same number.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.config.tasks import rename_data_keys
from aft_ray.storage.records import Group, Question, unique_ids
from aft_ray.storage.run_dir import local_model
from aft_ray.tasks import Split, Task, build_tasks, load_split
from aft_ray.tasks.rendering import Renderer


@dataclass(frozen=True, slots=True)
class TokenizedSplit:
    """The questions of a split as token ids.

    Attributes:
        groups: One group without candidates for each question, sorted by question id.
        too_long: The ids of the questions that do not fit `model.max_length`, sorted.
    """

    groups: list[Group]
    too_long: list[str]


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the run's model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        local_model(config.model.name), trust_remote_code=config.model.trust_remote_code
    )


def tokenize_split(config: RunConfig, split: Split, tokenizer: Any) -> TokenizedSplit:
    """Loads and tokenizes a split of every task, up to the limit of each task.

    Raises:
        ConfigError: More than the share `sampling.max_failed` of a task's questions, or all of them, do not fit
            `model.max_length`; two questions have the same id; or the model's tokenizer does not suit the config.
    """
    renderer = Renderer(config, tokenizer)
    groups: list[Group] = []
    too_long: list[str] = []
    for name, task in build_tasks(config).items():
        questions = _load_split(config, name, task, split)
        longer: list[str] = []
        for question in questions:
            prompt, reference = renderer.question(task, question)
            if len(prompt) + max(len(reference), 1) <= config.model.max_length:
                groups.append(Group(0, 0, question, prompt, reference, []))
            else:
                longer.append(question.id)
        if len(longer) > config.sampling.max_failed * len(questions) or len(longer) == len(questions):
            raise ConfigError(
                f"{len(longer)} of {len(questions)} {split} questions of {name} do not fit model.max_length="
                f"{config.model.max_length} with their reference response, among them {min(longer)}; raise "
                f"model.max_length, or sampling.max_failed to leave them out"
            )
        too_long += longer
    try:
        unique_ids([group.question for group in groups])
    except ValueError as error:
        raise ConfigError(f"{error}; leave out custom.id of a task, so that its ids begin with its name") from error
    return TokenizedSplit(sorted(groups, key=lambda group: group.question.id), sorted(too_long))


def _load_split(config: RunConfig, name: str, task: Task, split: Split) -> list[Question]:
    limit: int | None = getattr(config.task_configs[name], f"{split}_limit")
    try:
        return load_split(task, split, limit, config.seed)
    except ConfigError as error:
        raise ConfigError(rename_data_keys(str(error), config.task_key(name))) from error


def count_by_task(groups: Sequence[Group]) -> dict[str, int]:
    """The number of questions of each task."""
    return dict(sorted(Counter(group.question.task for group in groups).items()))


def round_shares(config: RunConfig, counts: Mapping[str, int], round_number: int) -> dict[str, int]:
    """The number of questions of each task in a round.

    Round 0 has every question. A later round has `rounds.questions_per_round` questions, divided by the tasks' weights.
    It has fewer when a task has too few questions for its share, because no question occurs twice in a round and the
    weights are kept.

    Args:
        counts: The number of training questions of each task, from `count_by_task`.

    Raises:
        ConfigError: The share of a task is less than one question.
    """
    if round_number == 0:
        return dict(counts)
    weights = {name: Fraction(config.task_weights[name]) for name in counts}
    total = sum(weights.values())
    largest = math.floor(min(counts[name] * total / weights[name] for name in counts))
    size = min(config.rounds.questions_per_round or largest, largest)
    exact = {name: size * weight / total for name, weight in weights.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    # The largest remainder method: the questions that rounding down leaves go to the tasks with the largest remainders.
    # No task gets more questions than it has: its exact share is at most their number, and is rounded up only when it
    # is not a whole number.
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: size - sum(shares.values())]:
        shares[name] += 1
    for name, share in shares.items():
        if share == 0:
            raise ConfigError(
                f"a round of {size} questions has none of {config.task_key(name)} ({counts[name]} training questions); "
                f"raise tasks.{name}.weight or rounds.questions_per_round, or give more questions of the other tasks"
            )
    return shares


def round_size(config: RunConfig, counts: Mapping[str, int], round_number: int) -> int:
    """The number of questions of a round, over all tasks."""
    return sum(round_shares(config, counts, round_number).values())


def questions_of_round(config: RunConfig, groups: Sequence[Group], round_number: int) -> list[Group]:
    """The groups, without candidates, that a round samples.

    Each task has its share of the round. Every question of a task is used before any is used again.

    Args:
        groups: The groups of all training questions, from `tokenize_split`.
    """
    chosen: list[Group] = []
    for name, share in round_shares(config, count_by_task(groups), round_number).items():
        of_task = [group for group in groups if group.question.task == name]
        chosen += _take_in_cycle(config.seed, of_task, max(0, round_number - 1) * share, share)
    return [replace(group, round=round_number) for group in sorted(chosen, key=lambda group: group.question.id)]


def _take_in_cycle(seed: int, groups: Sequence[Group], start: int, size: int) -> list[Group]:
    """`size` groups from position `start` of the shuffled groups, repeated without end.

    The order is the same in every repetition. Otherwise a round that spans two repetitions could use a question twice.
    """
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    return [groups[order[position % len(order)]] for position in range(start, start + size)]
