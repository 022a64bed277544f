"""Grades the steps of a response to a generated word problem.

Invariant: a step counts as right only when it is the next step of the calculation. A response may state as many steps
as the calculation has; further statements are ignored. So a list of guesses never gets the grade of a right chain of
thought.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter

from aft_ray.tasks.arithmetic.problems import (
    DISTRACTORS,
    FINAL_QUESTION,
    NAMES,
    OBJECTS,
    SENTENCES,
    START,
    TERSE,
    WORDINGS,
    Calculation,
)

_FIELD_PATTERNS = {
    "who": "|".join(NAMES),
    "other": "|".join(NAMES),
    "things": "|".join(OBJECTS),
    "o": r"[-+*/]",
    "p": r"[-+*/]",
}
_NUMBER = "[0-9]{1,12}"  # A longer number comes from a degenerate sample.


def grade_steps(question_text: str, response: str, right: bool) -> float:
    """The share, 0 to 1, of a full solution that `response` states: each step of the calculation, and the answer.

    With n steps in the calculation, the grade is (right steps + 1 if the final answer is right) / (n + 1). A sentence
    in one of the generator's wordings states one step, or two in the terse form. A step is right when its operation,
    its operand and the values before and after it are those of the calculation's next step. A response may make n
    statements: wrong and superfluous ones count towards n, and statements after the n-th are ignored. Sentences that
    state no step do not change the grade.

    Args:
        right: Whether the verifier found the final answer right.

    Raises:
        ValueError: The question was not made by the generator.
    """
    calculation = read_calculation(question_text)
    return (_count_right_steps(calculation, response) + right) / (len(calculation.steps) + 1)


def read_calculation(question_text: str) -> Calculation:
    """The calculation in the text of a generated question. Raises ValueError when the generator did not make it."""
    first, *sentences = _sentences(question_text) or [""]
    start = _START.fullmatch(first)
    if start is None:
        raise ValueError(
            f"not a generated word problem: {question_text[:200]!r} does not begin with a sentence that says how many "
            f"things someone has"
        )
    steps = []
    for sentence in sentences:
        if step := _step_in_question(sentence, start["who"]):
            steps.append(step)
        elif not any(pattern.fullmatch(sentence) for pattern in _SENTENCES_WITHOUT_STEP):
            raise ValueError(f"not a generated word problem: {sentence[:200]!r} is no sentence of the generator")
    return Calculation(int(start["n"]), tuple(steps))


@dataclass(frozen=True, slots=True)
class _StepPattern:
    """The pattern of a sentence that states a step with this operation."""

    operation: str
    pattern: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class _Statement:
    """What a sentence of a response states: the steps, (operation, operand) each, lead from `before` to `after`."""

    before: int
    steps: tuple[tuple[str, int], ...]
    after: int


def _step_in_question(sentence: str, who: str) -> tuple[str, int] | None:
    """The step that a sentence of a question states about `who`, or None when it states none."""
    for step in _QUESTION_STEPS:
        if (match := step.pattern.fullmatch(sentence)) and match["who"] == who:
            return step.operation, int(match["n"])
    return None


def _count_right_steps(calculation: Calculation, response: str) -> int:
    """The number of the calculation's steps that the response states rightly and in order; see `grade_steps`."""
    steps, values = calculation.steps, calculation.values
    done = stated = 0
    for statement in _statements(response):
        stated += len(statement.steps)
        if stated > len(steps):
            break
        end = done + len(statement.steps)
        if statement == _Statement(values[done], steps[done:end], values[end]):
            done = end
    return done


def _statements(response: str) -> Iterator[_Statement]:
    for sentence in _sentences(response):
        if match := _TERSE.fullmatch(sentence):
            both = ((match["o"], int(match["b"])), (match["p"], int(match["d"])))
            yield _Statement(int(match["a"]), both, int(match["c"]))
            continue
        for step in _RESPONSE_STEPS:
            if match := step.pattern.fullmatch(sentence):
                yield _Statement(int(match["a"]), ((step.operation, int(match["b"])),), int(match["c"]))
                break


def _sentences(text: str) -> list[str]:
    """The sentences of a text with their full stops or question marks; white space becomes single spaces."""
    return [" ".join(sentence.split()) for sentence in re.findall(r"[^.?]+[.?]", text)]


def _pattern(template: str) -> re.Pattern[str]:
    """A pattern of all sentences that the generator makes from a template, with a named group for each field."""
    parts = []
    for literal, field, _, _ in Formatter().parse(template):
        parts.append(re.escape(literal))
        if field:
            parts.append(f"(?P<{field}>{_FIELD_PATTERNS.get(field, _NUMBER)})")
    return re.compile("".join(parts))


_START = _pattern(START)
_TERSE = _pattern(TERSE)
_SENTENCES_WITHOUT_STEP = [_pattern(template) for template in (*DISTRACTORS, FINAL_QUESTION)]
_QUESTION_STEPS = [_StepPattern(operation, _pattern(text)) for operation, texts in SENTENCES.items() for text in texts]
_RESPONSE_STEPS = [_StepPattern(operation, _pattern(text)) for operation, texts in WORDINGS.items() for text in texts]
