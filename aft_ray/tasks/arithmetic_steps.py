"""Grades the chain of thought of a generated word problem, step by step.

Invariant: a step earns only when it is the calculation's next one, and a response states no more steps than the
calculation has: what it states beyond them is not read. So a list of guesses never earns what the true chain earns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter

from aft_ray.tasks.arithmetic import (
    ASK,
    DISTRACTORS,
    NAMES,
    OBJECTS,
    SENTENCES,
    START,
    TERSE,
    WORDINGS,
    Calculation,
)

_FIELDS = {
    "who": "|".join(NAMES),
    "other": "|".join(NAMES),
    "things": "|".join(OBJECTS),
    "o": r"[-+*/]",
    "p": r"[-+*/]",
}
_NUMBER = "[0-9]{1,12}"  # a longer one is a runaway sample


def grade_steps(question_text: str, response: str, right: bool) -> float:
    """The share of what a full solution states that `response` states: each step of the calculation, and the answer.

    A sentence in one of the generator's wordings states one step, a terse one two. A step is right when operation,
    operand and the values before and after are those of the calculation's next step. Sentences that state no step
    neither earn nor cost; those that state a wrong or a superfluous one use up one of as many statements as the
    calculation has steps. `right`: whether the verifier found the final answer right. Raises ValueError when the
    question is not one of the generator's.
    """
    calculation = read_calculation(question_text)
    return (_right_steps(calculation, response) + right) / (len(calculation.steps) + 1)


def read_calculation(question_text: str) -> Calculation:
    """The calculation that a generated question tells. Raises ValueError when it is not one of the generator's."""
    first, *sentences = _sentences(question_text) or [""]
    told = _START.fullmatch(first)
    if told is None:
        raise ValueError(f"not a generated word problem: {question_text[:200]!r} does not begin with what someone has")
    steps = []
    for sentence in sentences:
        if step := _told_step(sentence, told["who"]):
            steps.append(step)
        elif not any(pattern.fullmatch(sentence) for pattern in _IDLE):
            raise ValueError(f"not a generated word problem: it tells no step with {sentence[:200]!r}")
    return Calculation(int(told["n"]), tuple(steps))


@dataclass(frozen=True, slots=True)
class _Kind:
    """A sentence that tells or works out one operation."""

    operation: str
    pattern: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a sentence states: these steps lead from `before` to `after`."""

    before: int
    steps: tuple[tuple[str, int], ...]
    after: int


def _told_step(sentence: str, who: str) -> tuple[str, int] | None:
    """The step that a sentence of a question tells of `who`; None when it tells none."""
    for kind in _TOLD:
        if (told := kind.pattern.fullmatch(sentence)) and told["who"] == who:
            return kind.operation, int(told["n"])
    return None


def _right_steps(calculation: Calculation, response: str) -> int:
    """How many steps of the calculation are stated rightly and in order, within as many statements as it has steps."""
    steps, values = calculation.steps, calculation.values
    done = stated = 0
    for claim in _claims(response):
        stated += len(claim.steps)
        if stated > len(steps):
            break
        end = done + len(claim.steps)
        if claim == _Claim(values[done], steps[done:end], values[end]):
            done = end
    return done


def _claims(response: str) -> Iterator[_Claim]:
    for sentence in _sentences(response):
        if said := _TERSE.fullmatch(sentence):
            both = ((said["o"], int(said["b"])), (said["p"], int(said["d"])))
            yield _Claim(int(said["a"]), both, int(said["c"]))
            continue
        for kind in _WORKED_OUT:
            if said := kind.pattern.fullmatch(sentence):
                yield _Claim(int(said["a"]), ((kind.operation, int(said["b"])),), int(said["c"]))
                break


def _sentences(text: str) -> list[str]:
    """Each sentence with its full stop or question mark, white space reduced to single spaces."""
    return [" ".join(sentence.split()) for sentence in re.findall(r"[^.?]+[.?]", text)]


def _pattern(template: str) -> re.Pattern[str]:
    """What a template of the generator can become, with a group for each of its fields."""
    parts = []
    for literal, field, _, _ in Formatter().parse(template):
        parts.append(re.escape(literal))
        if field:
            parts.append(f"(?P<{field}>{_FIELDS.get(field, _NUMBER)})")
    return re.compile("".join(parts))


_START = _pattern(START)
_TERSE = _pattern(TERSE)
_IDLE = [_pattern(template) for template in (*DISTRACTORS, ASK)]
_TOLD = [_Kind(operation, _pattern(text)) for operation, texts in SENTENCES.items() for text in texts]
_WORKED_OUT = [_Kind(operation, _pattern(text)) for operation, texts in WORDINGS.items() for text in texts]
