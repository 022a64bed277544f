"""Generates word problems of a few dependent calculations, in any number and without a download.

Invariants: a hash of the calculation alone decides which split a problem belongs to. So two splits never share a
calculation, whatever their sizes, wordings and seeds. Question i of a split depends only on the generator's settings
and on i. Each step of a reference response has one of several valid wordings, or is combined with the next step. So a
right response can differ from the reference, and some references are harder to follow than others.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from aft_ray.config.run import ArithmeticConfig, ConfigError
from aft_ray.storage.records import Question
from aft_ray.tasks.base import Split

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
OBJECTS = ("apples", "books", "coins", "pens", "shells", "stamps")
# The sentences of a question that state a step: {n} is the operand, {who} the owner, {things} the objects.
SENTENCES = {
    "+": ("{who} finds {n} more.", "{who} buys {n} {things}.", "a friend gives {who} {n} {things}."),
    "-": ("{who} loses {n}.", "{who} sells {n} {things}.", "{who} gives {n} {things} away."),
    "*": ("then {who} gets {n} times as many.", "the pile of {who} grows to {n} times its size."),
    "/": (
        "{who} shares them equally with friends, {n} people in all.",
        "{who} keeps only one part of {n} equal parts.",
    ),
}
# Sentences of a question that no step needs.
DISTRACTORS = ("{other} has {n} {things}.", "{other} is {n} years old.", "the shop is {n} miles away.")
# The sentences of a reference that state a step: {a} is the value before it, {b} the operand, {c} the value after it.
WORDINGS = {
    "+": ("{a} + {b} = {c}.", "adding {b} to {a} gives {c}.", "now {a} + {b} = {c} {things}."),
    "-": ("{a} - {b} = {c}.", "taking {b} from {a} leaves {c}.", "now {a} - {b} = {c} {things}."),
    "*": ("{a} * {b} = {c}.", "{b} times {a} is {c}.", "now {a} * {b} = {c} {things}."),
    "/": ("{a} / {b} = {c}.", "splitting {a} by {b} gives {c}.", "now {a} / {b} = {c} {things}."),
}
# The sentence that states two steps at once: {a} is the value before them, {o} and {b} are the operation and operand of
# the first, {p} and {d} those of the second, {c} is the value after both.
TERSE = "({a} {o} {b}) {p} {d} = {c}."
START = "{who} has {n} {things}."
FINAL_QUESTION = "how many {things} does {who} have?"

# The hash of a calculation modulo 10 is its bucket. These are the buckets of each split.
_BUCKETS: dict[Split, range] = {"validation": range(1), "test": range(1, 3), "train": range(3, 10)}
_MAX_MISSES = 5000  # After so many draws in a row without a new problem, the generator gives up.


@dataclass(frozen=True, slots=True)
class Calculation:
    """A start value and the steps, (operation, operand) each, that are applied to it from left to right.

    Invariant: every result is a positive integer.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def values(self) -> list[int]:
        """The start value and the result of each step."""
        values = [self.start]
        for operation, operand in self.steps:
            values.append(_apply(operation, values[-1], operand))
        return values

    @property
    def split(self) -> Split:
        """The only split that may contain this calculation."""
        bucket = int.from_bytes(hashlib.blake2b(repr(self).encode(), digest_size=8).digest()) % 10
        return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def generate(config: ArithmeticConfig, split: Split, size: int, marker: str = "####") -> list[Question]:
    """The first `size` questions of a split. Raises ConfigError when that many different questions are not found."""
    rng = random.Random(f"{config.seed}/{split}")
    questions: list[Question] = []
    texts: set[str] = set()
    misses = 0
    while len(questions) < size:
        question = _draw_question(config, split, rng, f"arithmetic-{split}-{len(questions):06d}", marker)
        if question is not None and question.text not in texts:
            texts.add(question.text)
            questions.append(question)
            misses = 0
            continue
        misses += 1
        if misses > _MAX_MISSES:
            raise ConfigError(
                f"only {len(questions)} different {split} problems were found for data.arithmetic, but {size} are "
                f"required; raise max_steps, max_operand or max_value, allow more operations, or lower {split}_size"
            )
    return questions


def _draw_question(
    config: ArithmeticConfig, split: Split, rng: random.Random, question_id: str, marker: str
) -> Question | None:
    """One problem, or None when the drawn calculation has no valid next step or belongs to another split."""
    calculation = _draw_calculation(config, rng)
    if calculation is None or calculation.split != split:
        return None
    return word_problem(config, rng, calculation, question_id, marker)


def word_problem(
    config: ArithmeticConfig, rng: random.Random, calculation: Calculation, question_id: str, marker: str
) -> Question:
    """A calculation as a word problem with its reference response."""
    who, other = rng.sample(NAMES, 2)
    things = rng.choice(OBJECTS)
    text = [START.format(who=who, n=calculation.start, things=things)]
    for operation, operand in calculation.steps:
        text.append(rng.choice(SENTENCES[operation]).format(who=who, n=operand, things=things))
    if rng.random() < config.distractors:
        number = rng.randint(2, config.max_operand)
        sentence = rng.choice(DISTRACTORS).format(other=other, n=number, things=things)
        text.insert(rng.randint(1, len(text)), sentence)
    text.append(FINAL_QUESTION.format(who=who, things=things))
    gold = str(calculation.values[-1])
    reference = f"{_chain_of_thought(config, rng, calculation, things)} {marker} {gold}"
    return Question(question_id, " ".join(text), reference, gold, "arithmetic")


def _chain_of_thought(config: ArithmeticConfig, rng: random.Random, calculation: Calculation, things: str) -> str:
    """A valid chain of thought. Each sentence states one step, or, in the terse form, two steps in one expression."""
    steps, values = calculation.steps, calculation.values
    sentences = []
    done = 0
    while done < len(steps):
        operation, operand = steps[done]
        if done + 1 < len(steps) and rng.random() < config.terse:
            second, other = steps[done + 1]
            after = values[done + 2]
            sentences.append(TERSE.format(a=values[done], o=operation, b=operand, p=second, d=other, c=after))
            done += 2
        else:
            wording = rng.choice(WORDINGS[operation][: config.phrasings])
            sentences.append(wording.format(a=values[done], b=operand, c=values[done + 1], things=things))
            done += 1
    return " ".join(sentences)


def _draw_calculation(config: ArithmeticConfig, rng: random.Random) -> Calculation | None:
    """A random calculation, or None when no operation gives a valid result from an intermediate value."""
    value = start = rng.randint(2, config.max_operand)
    steps = []
    for _ in range(rng.randint(config.min_steps, config.max_steps)):
        operations = [o for o in sorted(set(config.operations)) if _operands(o, value, config)]
        if not operations:
            return None
        operation = rng.choice(operations)
        operand = rng.choice(_operands(operation, value, config))
        value = _apply(operation, value, operand)
        steps.append((operation, operand))
    return Calculation(start, tuple(steps))


def _operands(operation: str, value: int, config: ArithmeticConfig) -> list[int] | range:
    """The operands for which an operation on `value` gives a positive integer of at most `max_value`."""
    largest = config.max_operand
    if operation == "+":
        return range(2, min(largest, config.max_value - value) + 1)
    if operation == "-":
        return range(2, min(largest, value - 1) + 1)
    if operation == "*":
        return range(2, min(largest, config.max_value // value) + 1)
    return [divisor for divisor in range(2, min(largest, value) + 1) if value % divisor == 0]


def _apply(operation: str, value: int, operand: int) -> int:
    if operation == "+":
        return value + operand
    if operation == "-":
        return value - operand
    return value * operand if operation == "*" else value // operand
