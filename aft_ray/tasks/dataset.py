"""The questions of a run as token ids, and the questions of each round.

Invariants: sampling and training use the same token ids. Questions that cannot fit `model.max_length` are left out and
counted before anything starts. The number of questions of each task in a round depends only on the config and on the
number of questions of each task, so every process computes the same number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow.compute as pc

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.config.tasks import rename_data_keys
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.records import Group, Question
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

    groups: GroupTable
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
    too_long: list[str] = []
    groups = GroupTable.of(_tokenized_groups(config, split, Renderer(config, tokenizer), too_long)).sorted_by_id()
    ids = groups.ids.array
    if len(repeated := np.flatnonzero(pc.equal(ids[1:], ids[:-1]))):
        raise ConfigError(
            f"two questions have the id {groups.ids[repeated[0]]!r}; ids must be unique within a split; leave out "
            "custom.id of a task, so that its ids begin with its name"
        )
    return TokenizedSplit(groups, sorted(too_long))


def _tokenized_groups(config: RunConfig, split: Split, renderer: Renderer, too_long: list[str]) -> Iterator[Group]:
    """The questions of every task that fit, one after the other; the ids of the others are added to `too_long`."""
    for name, task in build_tasks(config).items():
        questions = _load_split(config, name, task, split)
        longer: list[str] = []
        for question in questions:
            prompt, reference = renderer.question(task, question)
            if len(prompt) + max(len(reference), 1) <= config.model.max_length:
                yield Group(0, 0, question, prompt, reference, [])
            else:
                longer.append(question.id)
        if len(longer) > config.sampling.max_failed * len(questions) or len(longer) == len(questions):
            raise ConfigError(
                f"{len(longer)} of {len(questions)} {split} questions of {name} do not fit model.max_length="
                f"{config.model.max_length} with their reference response, among them {min(longer)}; raise "
                f"model.max_length, or sampling.max_failed to leave them out"
            )
        too_long += longer


def _load_split(config: RunConfig, name: str, task: Task, split: Split) -> list[Question]:
    limit: int | None = getattr(config.task_configs[name], f"{split}_limit")
    try:
        return load_split(task, split, limit, config.seed)
    except ConfigError as error:
        raise ConfigError(rename_data_keys(str(error), config.task_key(name))) from error


def count_by_task(groups: Sequence[Group]) -> dict[str, int]:
    """The number of questions of each task."""
    counts = pc.value_counts(GroupTable.of(groups).tasks).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: str(entry["values"]))}


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


def questions_of_round(config: RunConfig, groups: Sequence[Group], round_number: int) -> GroupTable:
    """The groups, without candidates, that a round samples, sorted by question id.

    Each task has its share of the round. Every question of a task is used before any is used again.

    Args:
        groups: The groups of all training questions, from `tokenize_split`.
    """
    table = GroupTable.of(groups)
    tasks = table.tasks
    chosen = []
    for name, share in round_shares(config, count_by_task(table), round_number).items():
        of_task = np.flatnonzero(pc.equal(tasks, name))
        chosen.append(of_task[_cycle(config.seed, len(of_task), max(0, round_number - 1) * share, share)])
    return table.select(np.concatenate(chosen)).sorted_by_id().of_round(round_number)


def _cycle(seed: int, count: int, start: int, size: int) -> list[int]:
    """`size` of the shuffled numbers below `count`, repeated without end, from position `start` on.

    The order is the same in every repetition. Otherwise a round that spans two repetitions could use a question twice.
    """
    order = random.Random(seed).sample(range(count), count)
    return [order[position % count] for position in range(start, start + size)]
