"""The questions of a run as token ids: rendered once, in the driver, the same for every round and every process.

Invariant: what is asked and what is trained are the same tokens, and a question that cannot fit the context is left
out here, counted, before anything starts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aft_ray.config import ConfigError, RunConfig
from aft_ray.records import Group
from aft_ray.tasks import Split, build_task, load_split
from aft_ray.tasks.rendering import render


@dataclass(frozen=True, slots=True)
class Prepared:
    """The questions of a split as groups without candidates, sorted by id; and the ids that do not fit."""

    groups: list[Group]
    too_long: list[str]


def load_tokenizer(config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model.name, trust_remote_code=config.model.trust_remote_code)


def prepare(config: RunConfig, split: Split, tokenizer: Any, limit: int | None = None) -> Prepared:
    """Loads and renders a split. Raises ConfigError when more than `sampling.max_parked` of it does not fit."""
    task = build_task(config.data, config.seed)
    questions = load_split(task, split, limit, config.seed)
    fits, too_long = [], []
    for question in sorted(questions, key=lambda question: question.id):
        prompt, reference = render(task, question, tokenizer, config.model.chat_template)
        longest = len(prompt) + max(len(reference), 1)
        if longest <= config.model.max_length:
            fits.append(Group(0, 0, question, prompt, reference, []))
        else:
            too_long.append(question.id)
    if len(too_long) > config.sampling.max_parked * len(questions):
        raise ConfigError(
            f"{len(too_long)} of {len(questions)} {split} questions do not fit model.max_length="
            f"{config.model.max_length} with their reference response, among them {too_long[0]}; raise "
            f"model.max_length, or sampling.max_parked to leave them out"
        )
    return Prepared(fits, too_long)


def questions_of_round(config: RunConfig, prepared: Sequence[Group], round_number: int) -> list[Group]:
    """The round's groups without candidates: all questions, or a draw that goes through all before it repeats one."""
    size = config.rounds.questions_per_round
    if round_number == 0 or size is None or size >= len(prepared):
        chosen = list(prepared)
    else:
        chosen = _deal(config.seed, prepared, (round_number - 1) * size, size)
    return [replace(group, round=round_number) for group in sorted(chosen, key=lambda group: group.question.id)]


def _deal(seed: int, prepared: Sequence[Group], start: int, size: int) -> list[Group]:
    """`size` groups from position `start` of a shuffled deck that is dealt over and over.

    It is not shuffled again: a round that spans two passes would draw a question twice, or some before others.
    """
    order = random.Random(seed).sample(range(len(prepared)), len(prepared))
    return [prepared[order[position % len(order)]] for position in range(start, start + size)]


def round_size(config: RunConfig, questions: int, round_number: int) -> int:
    """How many questions a round has."""
    size = config.rounds.questions_per_round
    return questions if round_number == 0 or size is None else min(size, questions)
