"""Compares two mathematical expressions, in LaTeX or in plain notation, with math_verify.

Invariant: an answer is wrong only when both sides were parsed completely, and when their values differ, if these can be
computed. There is no deadline here: the parser and the simplifier can take arbitrarily long, so untrusted answers must
go through `verify.process_pool`. The time limits of math_verify are off, because they use signals, which only the main
thread may set.
"""

from __future__ import annotations

import logging
import random
import re
from functools import lru_cache
from itertools import product
from typing import Any

from aft_ray.verify.answers.markup import quote, unwrap_answer
from aft_ray.verify.result import VerificationResult, decided, undecided

_MATH_SPAN = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+\*?(?:\{[a-z]*matrix\})?|\bsqrt\b")
# Function names that are often written without the backslash.
_BARE_FUNCTION = re.compile(r"(?<!\\)\b(sin|cos|tan|log|ln|exp|pi)\b")
_POINTS = 3  # At so many points the values of two expressions are compared.
# Values closer than _NEAR are equal, values further apart than _FAR are different. Between the two, one side may be
# rounded, and math_verify decides.
_NEAR, _FAR = 1e-9, 1e-5

# math_verify warns once per process that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def compare_latex(answer: str, gold: str) -> VerificationResult:
    """Whether two expressions are equal. Raises the errors of the parser and the simplifier."""
    from math_verify import verify

    gold_expressions = _parse(gold)
    if not gold_expressions:
        return undecided(f"cannot read {quote(gold)} as a mathematical expression", answer)
    answer_expressions = _parse(answer)
    if not answer_expressions:
        return undecided(f"cannot read {quote(answer)} as a mathematical expression", answer)
    pairs = list(product(gold_expressions, answer_expressions))
    # Values at a few points show that most wrong answers differ, in a fraction of the time of a simplification.
    distances = [None if "%" in answer + gold else _distance(one, other) for one, other in pairs]
    if all(distance is not None and distance > _FAR for distance in distances):
        return decided(False, answer)
    if verify(gold_expressions, answer_expressions, timeout_seconds=None, raise_on_error=True):
        return decided(True, answer)
    # math_verify also returns "not equal" when its simplification gave up.
    if any(distance is not None and distance < _NEAR for distance in distances):
        return undecided("the expressions have the same values, but were not shown to be equal", answer)
    return decided(False, answer)


@lru_cache(maxsize=256)  # All candidates of a group have the same gold answer.
def _parse(text: str) -> list[Any]:
    """The expressions in `text`. The list is empty when the text is prose or has several mathematical parts."""
    from math_verify import LatexExtractionConfig, parse

    text = unwrap_answer(text)
    spans = [next(filter(None, span.groups())) for span in _MATH_SPAN.finditer(text)]
    if len(spans) > 1:
        return []
    text = _BARE_FUNCTION.sub(r"\\\1", spans[0] if spans else text)
    # math_verify reads prose as a product of variables.
    if re.search(r"[^\W\d_]{3}", _COMMAND.sub(" ", text)) or "$" in text:
        return []
    expressions: list[Any] = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return expressions


def _distance(one: Any, other: Any) -> float | None:
    """The largest difference between the values of two expressions at a few points, relative to their size.

    None for sets, equations and matrices, and when a value is not a finite number.
    """
    from sympy import Expr

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return None
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    rng = random.Random(0)
    largest = 0.0
    for _ in range(_POINTS if names else 1):
        point = {name: rng.uniform(0.5, 2.0) for name in names}
        first, second = (expression.evalf(15, subs=point) for expression in (one, other))
        if not (first.is_finite and second.is_finite):
            return None
        largest = max(largest, float(abs(first - second)) / (1 + float(abs(first))))
    return largest
