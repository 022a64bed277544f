"""Reads and compares final answers.

Invariant: an answer is called wrong only when the verifier understood both sides (or there was no answer at all).
What it cannot read, and whatever fails inside it, is undecided. Time is linear in a bounded input.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, plain, shown, unwrap
from aft_ray.verify.result import VerificationResult, decided, undecided

RELATIVE_TOLERANCE = Fraction(1, 10**6)

# Every alternative starts with another character than the ones before it can take, so matching never backtracks far.
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
# What may follow a number: nothing, a spaced-off word, "%", a currency, or a unit written together with it ("5kg").
# "5!" may be 5 or 120. One letter alone is more often a variable ("3x") than a unit, so only common ones are read.
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
# Units in which one quantity is often stated by different numbers; every other word after a number is only a word.
_SPELLINGS = """
    % percent pct | second s sec secs seconds | minute min mins minutes | hour h hr hrs hours | day days | week weeks
    month months | year yr yrs years | mm millimeters millimetres | cm centimeters centimetres
    m meter meters metre metres | km kilometers kilometres | inch in inches | foot ft feet | yard yd yards | mile miles
    mg milligrams | g gram grams | kg kilogram kilograms | ounce oz ounces | pound lb lbs pounds | ml milliliters
    liter l liters litre litres | gallon gallons | cent cents ¢ | dollar $ us$ usd dollars | euro € euros
"""
_UNITS = {word: line.split()[0] for line in re.split(r"[|\n]", _SPELLINGS) for word in line.split()}
_POWER_OF_TEN = re.compile(  # behind a mantissa: × 10^{-3}
    r"(?<=[0-9])\s*[×x*]\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?[0-9]{1,2})\s*\}|([+-]?[0-9]{1,2})(?![0-9]))"
)
_GROUPING_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))")


class Quantity(NamedTuple):
    """unit: one of those in which a quantity has several numbers ("hour", "%", "dollar"); empty for any other."""

    value: Fraction
    unit: str


def read_number(text: str) -> Fraction | None:
    """The one number that `text` states, with its currency, unit, percent sign or LaTeX wrapping; None when unsure.

    Text before the number, a second number, and wrongly grouped commas make it None. A percent sign is a unit:
    "50%" reads as 50. Full-width digits are digits; those of other scripts are not read.
    """
    quantity = read_quantity(text)
    return quantity.value if quantity else None


def read_quantity(text: str) -> Quantity | None:
    """As `read_number`, with the unit."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = _POWER_OF_TEN.sub(r"e\1\2", unwrap(_GROUPING_SPACE.sub(",", text)))
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
    return Quantity(value, _UNITS.get(words[0] if words else "", _UNITS.get((match["currency"] or "").lower(), "")))


def extract_after_marker(text: str, marker: str) -> str | None:
    """What follows the last `marker` on its line, stripped; None without a marker or with nothing after it."""
    _, found, after = text.rpartition(marker)
    return (after.partition("\n")[0].strip() or None) if found else None


def compare_numbers(answer: str | None, gold: str) -> VerificationResult:
    """Whether `answer` states what `gold` states.

    No answer is wrong: the model did not answer. A gold answer that is empty or too long to read is undecided.
    Two integers must be equal; otherwise numbers may differ by a relative 1e-6. A percent sign on one side only
    matches the number with or without the division by 100. Numbers in two different units are undecided. A gold answer
    that is no number is compared as text, ignoring case, spaces and a final full stop.
    """
    if not gold.strip() or len(gold) > MAX_ANSWER_LENGTH:
        return undecided("the gold answer is empty or too long", answer)
    if answer is None or not answer.strip():
        return decided(False, answer)
    if len(answer) > MAX_ANSWER_LENGTH:
        return undecided(f"the answer has {len(answer)} characters")
    wanted = read_quantity(gold)
    if wanted is None:
        return decided(plain(answer) == plain(gold), answer)
    given = read_quantity(answer)
    if given is None:
        # An answer without any digit is no number at all; one with digits may be right in a form unknown here.
        if any(c.isnumeric() for c in answer):
            return undecided(f"cannot read {shown(answer)} as one number", answer)
        return decided(False, answer)
    if given.unit == wanted.unit or not (given.unit and wanted.unit):
        return decided(_close(given.value, wanted.value) or _percent(given, wanted) or _percent(wanted, given), answer)
    if "%" in (given.unit, wanted.unit):
        return decided(_close(given.value, wanted.value), answer)
    return undecided(f"{shown(answer)} and {shown(gold)} have different units", answer)


def _percent(one: Quantity, other: Quantity) -> bool:
    """Whether a percentage is the other's share: 50 % and 0.5."""
    return one.unit == "%" != other.unit and _close(one.value / 100, other.value)


def _close(a: Fraction, b: Fraction) -> bool:
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
