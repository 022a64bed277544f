"""Compares answers by kind: numbers, options, yes or no, mathematical expressions, or texts.

Invariant: an answer is wrong only when both sides were understood, or when there was no answer. Everything else,
including an error, is undecided and has a reason. Nothing here limits the time of a comparison; `verify.process_pool`
does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from aft_ray.verify.answers.latex import compare_latex
from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, comparable_text, quote, unwrap_answer
from aft_ray.verify.answers.numbers import compare_numbers, read_number
from aft_ray.verify.answers.options import read_option
from aft_ray.verify.answers.yes_no import read_yes_no
from aft_ray.verify.result import VerificationResult, decided, undecided

# Words such as "no solution". One letter alone may be a variable, whose case matters.
_WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+(?: [^\W\d_]+)*")

Kind = Literal["number", "option", "yes_no", "math", "text"]


def compare(kind: Kind, answer: str | None, gold: str) -> VerificationResult:
    """The verdict on `answer`, compared with `gold` as answers of a kind. Never raises.

    number: see `compare_numbers`. option: the letter of an option, in any usual spelling. yes_no: yes or no, also as
    true or false. math: numbers, or else expressions, which math_verify compares. text: the same words; case and
    spacing do not matter. Missing answers are wrong. Answers longer than `MAX_ANSWER_LENGTH` are undecided.
    """
    try:
        if not gold.strip() or len(gold) > MAX_ANSWER_LENGTH:
            return undecided("the gold answer is empty or too long", answer)
        if answer is None or not answer.strip():
            return decided(False, answer)
        if len(answer) > MAX_ANSWER_LENGTH:
            return undecided(f"the answer has {len(answer)} characters", quote(answer))
        return _COMPARISONS[kind](answer, gold)
    except Exception as error:
        return undecided(error_reason(error), answer)


def error_reason(error: BaseException) -> str:
    """An exception as the reason of an undecided result: its class and the beginning of its message."""
    message = " ".join(str(error)[:200].split())
    return f"{type(error).__name__}: {message}"[:120] if message else type(error).__name__


def _compare_options(answer: str, gold: str) -> VerificationResult:
    return _compare_parsed(read_option, "one option", answer, gold)


def _compare_yes_no(answer: str, gold: str) -> VerificationResult:
    return _compare_parsed(read_yes_no, "yes or no", answer, gold)


def _compare_parsed(parse: Callable[[str], object], what: str, answer: str, gold: str) -> VerificationResult:
    gold_value, answer_value = parse(gold), parse(answer)
    for text, value in ((gold, gold_value), (answer, answer_value)):
        if value is None:
            return undecided(f"cannot read {quote(text)} as {what}", answer)
    return decided(answer_value == gold_value, answer)


def _compare_math(answer: str, gold: str) -> VerificationResult:
    same_words = _WORDS.fullmatch(comparable_text(gold)) and comparable_text(answer) == comparable_text(gold)
    if same_words or _without_spaces(answer) == _without_spaces(gold):
        return decided(True, answer)
    if read_number(answer) is not None and read_number(gold) is not None:
        return compare_numbers(answer, gold)
    return compare_latex(answer, gold)


def _without_spaces(text: str) -> str:
    return "".join(unwrap_answer(text).split())


def _compare_texts(answer: str, gold: str) -> VerificationResult:
    return decided(comparable_text(answer) == comparable_text(gold), answer)


_COMPARISONS: dict[Kind, Callable[[str, str], VerificationResult]] = {
    "number": compare_numbers,
    "option": _compare_options,
    "yes_no": _compare_yes_no,
    "math": _compare_math,
    "text": _compare_texts,
}
