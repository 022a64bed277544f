"""The comparisons that a task chooses from, by name.

Invariant: an answer is called wrong only when both sides were understood, or there was no answer at all. Everything
else, a failure included, is undecided with its reason. Nothing here limits time: see the pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from aft_ray.verify.answers.latex import compare_latex
from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, inside, plain, shown
from aft_ray.verify.answers.numbers import compare_numbers, read_number
from aft_ray.verify.answers.options import read_option
from aft_ray.verify.answers.yes_no import read_yes_no
from aft_ray.verify.result import VerificationResult, decided, undecided

_WORDS = re.compile(
    r"(?=.*[^\W\d_]{3})[^\W\d_]+(?: [^\W\d_]+)*"
)  # "no solution"; a letter may be a variable, whose case counts

Kind = Literal["number", "option", "yes_no", "math", "text"]


def compare(kind: Kind, answer: str | None, gold: str) -> VerificationResult:
    """Whether `answer` states what `gold` states, read as `kind`. Never raises.

    number: see `compare_numbers`. option: a letter in any usual spelling. yes_no: also true and false. math: numbers,
    else expressions, through math_verify. text: the same words, whatever their case and spacing.
    """
    try:
        if not gold.strip() or len(gold) > MAX_ANSWER_LENGTH:
            return undecided("the gold answer is empty or too long", answer)
        if answer is None or not answer.strip():
            return decided(False, answer)
        if len(answer) > MAX_ANSWER_LENGTH:
            return undecided(f"the answer has {len(answer)} characters", shown(answer))
        return _COMPARISONS[kind](answer, gold)
    except Exception as error:
        return undecided(failure(error), answer)


def failure(error: BaseException) -> str:
    """An exception as a reason: its name and the first words of its message."""
    message = " ".join(str(error)[:200].split())
    return f"{type(error).__name__}: {message}"[:120] if message else type(error).__name__


def _options(answer: str, gold: str) -> VerificationResult:
    return _as_read(read_option, "one option", answer, gold)


def _yes_no(answer: str, gold: str) -> VerificationResult:
    return _as_read(read_yes_no, "yes or no", answer, gold)


def _as_read(read: Callable[[str], object], what: str, answer: str, gold: str) -> VerificationResult:
    wanted, given = read(gold), read(answer)
    for text, value in ((gold, wanted), (answer, given)):
        if value is None:
            return undecided(f"cannot read {shown(text)} as {what}", answer)
    return decided(given == wanted, answer)


def _math(answer: str, gold: str) -> VerificationResult:
    same_words = _WORDS.fullmatch(plain(gold)) and plain(answer) == plain(gold)
    if same_words or _compact(answer) == _compact(gold):
        return decided(True, answer)
    if read_number(answer) is not None and read_number(gold) is not None:
        return compare_numbers(answer, gold)
    return compare_latex(answer, gold)


def _compact(text: str) -> str:
    return "".join(inside(text).split())


def _texts(answer: str, gold: str) -> VerificationResult:
    return decided(plain(answer) == plain(gold), answer)


_COMPARISONS: dict[Kind, Callable[[str, str], VerificationResult]] = {
    "number": compare_numbers,
    "option": _options,
    "yes_no": _yes_no,
    "math": _math,
    "text": _texts,
}
