"""Reads and compares answers that are numbers.

Invariant: an answer is wrong only when the verifier understood both sides, or when there was no answer. An answer that
it cannot read is undecided. The time is linear in a bounded input.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, comparable_text, quote, to_plain_notation
from aft_ray.verify.result import VerificationResult, decided, undecided

RELATIVE_TOLERANCE = Fraction(1, 10**6)

# Each alternative starts with a character that the ones before it cannot match, so there is little backtracking.
_NUMBER = re.compile(
    r"""
    (?P<sign>[+-]?) \s* (?P<currency>[$£€]|US\$)? \s* (?P<inner>[+-]?)
    (?: (?: (?P<whole>[0-9]+) [ ] )? (?P<over>[0-9][0-9,]*) [ ]? / [ ]? (?P<under>[0-9]+) (?![0-9.,]*[0-9])
      | (?P<digits> [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ )?
        (?P<decimals> \.[0-9]+ )? (?P<exponent> [eE][+-]?[0-9]{1,2} (?![0-9]) )?
    )
    """,
    re.VERBOSE,
)
# What may follow a number: nothing, a word after a space, "%", a currency, or a unit without a space ("5kg"). Nothing
# else may, because "5!" can mean 5 or 120. A single letter is more often a variable ("3x") than a unit, so only common
# units of one letter are accepted.
_UNIT = re.compile(r"(?:\s*[$£€%°/.,;:)]|\s+\S|[A-Za-z]{2}|[gmlhsLCF](?![A-Za-z])|[kK](?![A-Za-z])|$)")
_MAGNITUDES = {
    "k": 10**3,
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
# The units in which one quantity is often stated with different numbers. Other words after a number have no effect.
_SPELLINGS = """
    % percent pct | second s sec secs seconds | minute min mins minutes | hour h hr hrs hours | day days | week weeks
    month months | year yr yrs years | mm millimeters millimetres | cm centimeters centimetres
    m meter meters metre metres | km kilometers kilometres | inch in inches | foot ft feet | yard yd yards | mile miles
    mg milligrams | g gram grams | kg kilogram kilograms | ounce oz ounces | pound lb lbs pounds | ml milliliters
    liter l liters litre litres | gallon gallons | cent cents ¢ | dollar $ us$ usd dollars | euro € euros
"""
_UNITS = {word: line.split()[0] for line in re.split(r"[|\n]", _SPELLINGS) for word in line.split()}
_POWER_OF_TEN = re.compile(  # After a mantissa: × 10^{-3}
    r"(?<=[0-9])\s*[×x*]\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?[0-9]{1,2})\s*\}|([+-]?[0-9]{1,2})(?![0-9]))"
)
_GROUPING_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))")


class NumberWithUnit(NamedTuple):
    """A number with its unit. `unit` is one of the values of `_UNITS` ("hour", "%", "dollar") or empty."""

    value: Fraction
    unit: str


def read_number(text: str) -> Fraction | None:
    """The only number in `text`, which may have a currency, unit, percent sign or LaTeX around it; None when unsure.

    The result is None when there is text before the number, a second number, or a wrongly placed thousands separator.
    A percent sign is a unit, so "50%" is 50. Full-width digits are read; digits of other scripts are not.
    """
    quantity = read_number_with_unit(text)
    return quantity.value if quantity else None


def read_number_with_unit(text: str) -> NumberWithUnit | None:
    """The number that `read_number` returns, with its unit."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = _POWER_OF_TEN.sub(r"e\1\2", to_plain_notation(_GROUPING_SPACE.sub(",", text)))
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    rest = text[match.end() :]
    if not _UNIT.match(rest) or any(c.isnumeric() or c in "+=*×÷^√\\" for c in rest):
        return None
    value = _value(match)
    if value is None:
        return None
    if "-" in (match["sign"], match["inner"]):
        value = -value
    words = [word.strip(".,;:!)") for word in rest.casefold().replace("per cent", "percent").split()]
    while words and words[0].removesuffix("s") in _MAGNITUDES:
        value *= _MAGNITUDES[words.pop(0).removesuffix("s")]
    return NumberWithUnit(
        value, _UNITS.get(words[0] if words else "", _UNITS.get((match["currency"] or "").lower(), ""))
    )


def extract_after_marker(text: str, marker: str) -> str | None:
    """The text after the last `marker` up to the end of its line, stripped; None when there is no marker or no text."""
    _, marker_found, after = text.rpartition(marker)
    return (after.partition("\n")[0].strip() or None) if marker_found else None


def compare_numbers(answer: str | None, gold: str) -> VerificationResult:
    """The verdict on `answer`, compared with `gold` as numbers.

    A missing answer is wrong, because the model did not answer. A gold answer that is empty or too long is undecided.
    Two integers must be equal; other numbers may differ by a relative 1e-6. When only one side has a percent sign, it
    matches the other side with or without division by 100. Numbers in two different units are undecided. When the gold
    answer is not a number, both sides are compared as texts, without case, spaces and a final full stop.
    """
    if not gold.strip() or len(gold) > MAX_ANSWER_LENGTH:
        return undecided("the gold answer is empty or too long", answer)
    if answer is None or not answer.strip():
        return decided(False, answer)
    if len(answer) > MAX_ANSWER_LENGTH:
        return undecided(f"the answer has {len(answer)} characters")
    expected = read_number_with_unit(gold)
    if expected is None:
        return decided(comparable_text(answer) == comparable_text(gold), answer)
    given = read_number_with_unit(answer)
    if given is None:
        # An answer without any digit is not a number. One with digits may be right in a form that is unknown here.
        if any(c.isnumeric() for c in answer):
            return undecided(f"cannot read {quote(answer)} as one number", answer)
        return decided(False, answer)
    if given.unit == expected.unit or not (given.unit and expected.unit):
        equal = _is_close(given.value, expected.value)
        return decided(equal or _is_percentage_of(given, expected) or _is_percentage_of(expected, given), answer)
    if "%" in (given.unit, expected.unit):
        return decided(_is_close(given.value, expected.value), answer)
    return undecided(f"{quote(answer)} and {quote(gold)} have different units", answer)


def _is_percentage_of(percentage: NumberWithUnit, share: NumberWithUnit) -> bool:
    """Whether the first quantity is a percentage and the second the same share without the percent sign."""
    return percentage.unit == "%" != share.unit and _is_close(percentage.value / 100, share.value)


def _is_close(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers are equal, or, unless both are integers, differ by a relative 1e-6 at most."""
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b))


def _value(match: re.Match[str]) -> Fraction | None:
    """The unsigned value of a match of `_NUMBER`."""
    if match["under"]:
        if int(match["under"]) == 0:
            return None
        over = _NUMBER.fullmatch(match["over"])
        if over is None or not over["digits"]:
            return None
        return int(match["whole"] or 0) + Fraction(int(over["digits"].replace(",", "")), int(match["under"]))
    if not (match["digits"] or match["decimals"]):
        return None
    digits = (match["digits"] or "0").replace(",", "")
    return Fraction(digits + (match["decimals"] or "") + (match["exponent"] or ""))
