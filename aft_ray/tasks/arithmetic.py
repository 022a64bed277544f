"""Generated word problems of a few dependent calculations: any size, no download, every answer known.

Invariants: which split a problem belongs to is decided by a hash of its calculation alone, so two splits never share
one, whatever their sizes, wordings and seeds; question i of a split depends on the generator's settings and i only.
Each step of a reference is worded in one of several valid ways, or worked out together with the next one, so right
responses differ from the reference, and references differ in how hard they are to follow.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aft_ray.config.run import ArithmeticConfig, ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask, Split, dataset

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
OBJECTS = ("apples", "books", "coins", "pens", "shells", "stamps")
# A step's sentence: {n} the operand, {who} the owner, {things} the objects.
SENTENCES = {
    "+": ("{who} finds {n} more.", "{who} buys {n} {things}.", "a friend gives {who} {n} {things}."),
    "-": ("{who} loses {n}.", "{who} sells {n} {things}.", "{who} gives {n} {things} away."),
    "*": ("then {who} gets {n} times as many.", "the pile of {who} grows to {n} times its size."),
    "/": (
        "{who} shares them equally with friends, {n} people in all.",
        "{who} keeps only one part of {n} equal parts.",
    ),
}
DISTRACTORS = ("{other} has {n} {things}.", "{other} is {n} years old.", "the shop is {n} miles away.")
# A step's chain of thought: {a} before, {b} the operand, {c} after.
WORDINGS = {
    "+": ("{a} + {b} = {c}.", "adding {b} to {a} gives {c}.", "now {a} + {b} = {c} {things}."),
    "-": ("{a} - {b} = {c}.", "taking {b} from {a} leaves {c}.", "now {a} - {b} = {c} {things}."),
    "*": ("{a} * {b} = {c}.", "{b} times {a} is {c}.", "now {a} * {b} = {c} {things}."),
    "/": ("{a} / {b} = {c}.", "splitting {a} by {b} gives {c}.", "now {a} / {b} = {c} {things}."),
}
# Two steps worked out at once: {a} before, {o} and {b} of the first step, {p} and {d} of the second, {c} after both.
TERSE = "({a} {o} {b}) {p} {d} = {c}."
START = "{who} has {n} {things}."
ASK = "how many {things} does {who} have?"

# Out of 10 calculations: which are validation's, test's and training's.
_BUCKETS: dict[Split, range] = {"validation": range(1), "test": range(1, 3), "train": range(3, 10)}
_PATIENCE = 5000  # draws in a row without a new problem, after which the space counts as exhausted


@dataclass(frozen=True, slots=True)
class Calculation:
    """A start and the (operation, operand) steps applied to it, left to right; every result is a positive integer."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def values(self) -> list[int]:
        """The start and the result of each step."""
        values = [self.start]
        for operation, operand in self.steps:
            values.append(_apply(operation, values[-1], operand))
        return values

    @property
    def split(self) -> Split:
        """The only split in which this calculation may occur."""
        bucket = int.from_bytes(hashlib.blake2b(repr(self).encode(), digest_size=8).digest()) % 10
        return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


class ArithmeticTask(MarkedTask):
    """See the module."""

    def __init__(self, data: DataConfig, name: str) -> None:
        super().__init__(name, data.prompt or "{question}", data.answer_marker)
        self.config = data.arithmetic

    def load(self, split: Split) -> Dataset:
        size: int = getattr(self.config, f"{split}_size")
        found = generate(self.config, split, size, self.marker)
        named = [replace(q, id=f"{self.name}-{split}-{index:06d}", task=self.name) for index, q in enumerate(found)]
        return dataset(named, f"data.arithmetic.{split}_size")


def generate(config: ArithmeticConfig, split: Split, size: int, marker: str = "####") -> list[Question]:
    """The first `size` questions of a split. Raises ConfigError when there are not that many different ones."""
    rng = random.Random(f"{config.seed}/{split}")
    found: list[Question] = []
    texts: set[str] = set()
    misses = 0
    while len(found) < size:
        question = _draw(config, split, rng, f"arithmetic-{split}-{len(found):06d}", marker)
        if question is not None and question.text not in texts:
            texts.add(question.text)
            found.append(question)
            misses = 0
            continue
        misses += 1
        if misses > _PATIENCE:
            raise ConfigError(
                f"only {len(found)} different {split} problems were found for data.arithmetic, and {size} are asked "
                f"for; raise max_steps, max_operand or max_value, allow more operations, or lower {split}_size"
            )
    return found


def _draw(config: ArithmeticConfig, split: Split, rng: random.Random, name: str, marker: str) -> Question | None:
    """One problem, or None when the calculation drawn cannot go on or is another split's."""
    calculation = _calculation(config, rng)
    if calculation is None or calculation.split != split:
        return None
    return pose(config, rng, calculation, name, marker)


def pose(config: ArithmeticConfig, rng: random.Random, calculation: Calculation, name: str, marker: str) -> Question:
    """A calculation as a word problem with its reference response; `name` is the question's id."""
    who, other = rng.sample(NAMES, 2)
    things = rng.choice(OBJECTS)
    text = [START.format(who=who, n=calculation.start, things=things)]
    for operation, operand in calculation.steps:
        text.append(rng.choice(SENTENCES[operation]).format(who=who, n=operand, things=things))
    if rng.random() < config.distractors:
        number = rng.randint(2, config.max_operand)
        sentence = rng.choice(DISTRACTORS).format(other=other, n=number, things=things)
        text.insert(rng.randint(1, len(text)), sentence)
    text.append(ASK.format(who=who, things=things))
    gold = str(calculation.values[-1])
    return Question(
        name, " ".join(text), f"{_thought(config, rng, calculation, things)} {marker} {gold}", gold, "arithmetic"
    )


def _thought(config: ArithmeticConfig, rng: random.Random, calculation: Calculation, things: str) -> str:
    """A valid chain of thought: each step in a wording of its own, or, tersely, two steps in one expression."""
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


def _calculation(config: ArithmeticConfig, rng: random.Random) -> Calculation | None:
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
    """The operands with which an operation on `value` gives a positive integer of at most max_value."""
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
