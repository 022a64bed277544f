"""The questions of a run as token ids: rendered once, in the driver, the same for every round and every process.

Invariant: what is asked and what is trained are the same tokens, and a question that cannot fit the context is left
out here, counted, before anything starts. How many questions of which task a round has follows from the config and the
number of questions of each task alone.
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
from aft_ray.config.tasks import in_place
from aft_ray.storage.records import Group, Question, unique_ids
from aft_ray.storage.run_dir import local_model
from aft_ray.tasks import Split, Task, build_tasks, load_split
from aft_ray.tasks.rendering import render


@dataclass(frozen=True, slots=True)
class Prepared:
    """The questions of a split as groups without candidates, sorted by id; and the ids that do not fit."""

    groups: list[Group]
    too_long: list[str]


def load_tokenizer(config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        local_model(config.model.name), trust_remote_code=config.model.trust_remote_code
    )


def prepare(config: RunConfig, split: Split, tokenizer: Any) -> Prepared:
    """Loads and renders a split of every task, as much of it as its limit allows.

    Raises ConfigError when more than `sampling.max_parked` of a task, or all of it, does not fit, or two tasks share an
    id.
    """
    fits: list[Group] = []
    too_long: list[str] = []
    for name, task in build_tasks(config).items():
        questions = _load(config, name, task, split)
        longer = []
        for question in questions:
            prompt, reference = render(task, question, tokenizer, config.model.chat_template)
            if len(prompt) + max(len(reference), 1) <= config.model.max_length:
                fits.append(Group(0, 0, question, prompt, reference, []))
            else:
                longer.append(question.id)
        if len(longer) > config.sampling.max_parked * len(questions) or len(longer) == len(questions):
            raise ConfigError(
                f"{len(longer)} of {len(questions)} {split} questions of {name} do not fit model.max_length="
                f"{config.model.max_length} with their reference response, among them {min(longer)}; raise "
                f"model.max_length, or sampling.max_parked to leave them out"
            )
        too_long += longer
    try:
        unique_ids([group.question for group in fits])
    except ValueError as error:
        raise ConfigError(f"{error}; leave out custom.id of a task, so that its ids begin with its name") from error
    return Prepared(sorted(fits, key=lambda group: group.question.id), sorted(too_long))


def _load(config: RunConfig, name: str, task: Task, split: Split) -> list[Question]:
    limit: int | None = getattr(config.task_configs[name], f"{split}_limit")
    try:
        return load_split(task, split, limit, config.seed)
    except ConfigError as error:
        raise ConfigError(in_place(str(error), config.task_key(name))) from error


def count_by_task(groups: Sequence[Group]) -> dict[str, int]:
    """Questions of each task, from which the sizes of all rounds follow."""
    return dict(sorted(Counter(group.question.task for group in groups).items()))


def round_shares(config: RunConfig, counts: Mapping[str, int], round_number: int) -> dict[str, int]:
    """How many questions of each task a round has. `counts`: of `count_by_task`.

    Round 0 has every question. A later round has `rounds.questions_per_round`, shared by the tasks' weights, or fewer
    where a task has not that many: no question is twice in a round, and the shares are kept. Raises ConfigError when a
    task's share is no question at all.
    """
    if round_number == 0:
        return dict(counts)
    weights = {name: Fraction(config.task_weights[name]) for name in counts}
    total = sum(weights.values())
    largest = math.floor(min(counts[name] * total / weights[name] for name in counts))
    size = min(config.rounds.questions_per_round or largest, largest)
    exact = {name: size * weight / total for name, weight in weights.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    # Largest remainder: what rounding down left over goes to those that lost most by it. It cannot take a task above
    # its questions: an exact share is at most their number, so one that is rounded up is below it.
    by_loss = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_loss[: size - sum(shares.values())]:
        shares[name] += 1
    for name, share in shares.items():
        if share == 0:
            raise ConfigError(
                f"a round of {size} questions has none of {config.task_key(name)} ({counts[name]} training questions); "
                f"raise tasks.{name}.weight or rounds.questions_per_round, or give more questions of the other tasks"
            )
    return shares


def round_size(config: RunConfig, counts: Mapping[str, int], round_number: int) -> int:
    """How many questions a round has, over all tasks."""
    return sum(round_shares(config, counts, round_number).values())


def questions_of_round(config: RunConfig, prepared: Sequence[Group], round_number: int) -> list[Group]:
    """The round's groups without candidates: of each task its share, all of its questions before any repeats."""
    chosen: list[Group] = []
    for name, share in round_shares(config, count_by_task(prepared), round_number).items():
        of_task = [group for group in prepared if group.question.task == name]
        chosen += _deal(config.seed, of_task, max(0, round_number - 1) * share, share)
    return [replace(group, round=round_number) for group in sorted(chosen, key=lambda group: group.question.id)]


def _deal(seed: int, prepared: Sequence[Group], start: int, size: int) -> list[Group]:
    """`size` groups from position `start` of a shuffled deck that is dealt over and over.

    It is not shuffled again: a round that spans two passes would draw a question twice, or some before others.
    """
    order = random.Random(seed).sample(range(len(prepared)), len(prepared))
    return [prepared[order[position % len(order)]] for position in range(start, start + size)]
