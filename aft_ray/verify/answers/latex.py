"""Compares two mathematical expressions, LaTeX or plain, through math_verify.

Invariant: wrong is said only when both sides were parsed whole, and shown to differ where that can be computed. There
is no deadline here: parser and simplifier may take arbitrarily long, so untrusted answers belong into the process pool.
math_verify's own time limits are off: they need signals, which no thread but the main one may set.
"""

from __future__ import annotations

import logging
import random
import re
from functools import lru_cache
from itertools import product
from typing import Any

from aft_ray.verify.answers.markup import inside, shown
from aft_ray.verify.result import VerificationResult, decided, undecided

_SPAN = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+\*?(?:\{[a-z]*matrix\})?|\bsqrt\b")
_BARE = re.compile(r"(?<!\\)\b(sin|cos|tan|log|ln|exp|pi)\b")  # names that people write without the backslash
_POINTS = 3
_NEAR, _FAR = 1e-9, 1e-5  # between them lies what was rounded, which math_verify judges

# It warns of the time limits that are off, once per process.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def compare_latex(answer: str, gold: str) -> VerificationResult:
    """Whether two expressions are equal. Raises whatever the parser and the simplifier raise."""
    from math_verify import verify

    wanted = _parse(gold)
    if not wanted:
        return undecided(f"cannot read {shown(gold)} as a mathematical expression", answer)
    given = _parse(answer)
    if not given:
        return undecided(f"cannot read {shown(answer)} as a mathematical expression", answer)
    pairs = list(product(wanted, given))
    # Values at a few points tell most wrong answers apart, in a fraction of the time that simplifying takes.
    distances = [None if "%" in answer + gold else _distance(one, other) for one, other in pairs]
    if all(distance is not None and distance > _FAR for distance in distances):
        return decided(False, answer)
    if verify(wanted, given, timeout_seconds=None, raise_on_error=True):
        return decided(True, answer)
    # "Not equal" also comes from a simplification that gave up.
    if any(distance is not None and distance < _NEAR for distance in distances):
        return undecided("the expressions have the same values, but were not shown to be equal", answer)
    return decided(False, answer)


@lru_cache(maxsize=256)  # all candidates of a group share the gold answer
def _parse(text: str) -> list[Any]:
    """The expressions that `text` states; none when it is prose, or has several pieces of mathematics."""
    from math_verify import LatexExtractionConfig, parse

    text = inside(text)
    spans = [next(filter(None, span.groups())) for span in _SPAN.finditer(text)]
    if len(spans) > 1:
        return []
    text = _BARE.sub(r"\\\1", spans[0] if spans else text)
    # math_verify would read prose as a product of variables.
    if re.search(r"[^\W\d_]{3}", _COMMAND.sub(" ", text)) or "$" in text:
        return []
    found: list[Any] = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return found


def _distance(one: Any, other: Any) -> float | None:
    """The largest difference of two expressions at a few points, relative to their size.

    None for sets, equations, matrices, and where a value is no number.
    """
    from sympy import Expr

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return None
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    rng = random.Random(0)
    largest = 0.0
    for _ in range(_POINTS if names else 1):
        point = {name: rng.uniform(0.5, 2.0) for name in names}
        here, there = (expression.evalf(15, subs=point) for expression in (one, other))
        if not (here.is_finite and there.is_finite):
            return None
        largest = max(largest, float(abs(here - there)) / (1 + float(abs(here))))
    return largest
