"""The canonical form of an answer, by which answers are counted as equal in votes, in metrics and in the service.

Invariant: two answers are counted as the same answer if and only if their canonical forms are the same string.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A number with a larger decimal exponent stays as it is spelled: 1e999999999 would be written out with all its digits.
_MAX_EXPONENT = 60


def normalise(answer: str) -> str:
    """Returns the answer without differences of case, spacing, currency sign, thousands separators and final full stop.

    A number is written with the fewest digits: "4.0", "$4" and "4." all give "4".
    """
    text = _THOUSANDS_SEPARATOR.sub("", " ".join(answer.casefold().split()))
    text = text.strip("$ ").removesuffix(".")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    if not number.is_finite() or abs(number.adjusted()) > _MAX_EXPONENT:
        return text
    digits = f"{number:f}"  # not normalize(): it rounds to the context's precision
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if number else "0"
