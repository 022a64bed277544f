"""Reads and compares final answers.

Invariant: an answer is called wrong only when the verifier understood both sides (or there was no answer at all).
What it cannot read, and whatever fails inside it, is undecided. Time is linear in a bounded input.
"""

from __future__ import annotations

import re
from fractions import Fraction

from aft_ray.records import Verdict

MAX_ANSWER_LENGTH = 1000  # characters; a longer "answer" is a runaway sample, and is not read
RELATIVE_TOLERANCE = Fraction(1, 10**6)

# Every alternative starts with another character than the ones before it can take, so matching never backtracks far.
_NUMBER = re.compile(
    r"""
    (?P<sign>[+-]?) \s* (?:[$£€]|US\$)? \s* (?P<inner>[+-]?)
    (?: (?: (?P<whole>[0-9]+) [ ] )? (?P<over>[0-9][0-9,]*) [ ]? / [ ]? (?P<under>[0-9]+) (?![0-9.,]*[0-9])
      | (?P<digits> [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ )?
        (?P<decimals> \.[0-9]+ )? (?P<exponent> [eE][+-]?[0-9]{1,2} (?![0-9]) )?
    )
    """,
    re.VERBOSE,
)
# What may follow a number: nothing, a spaced-off word, "%", a currency, or a unit written together with it ("5kg").
# One letter alone is more often a variable ("3x") than a unit, so only the common ones are read as units.
_UNIT = re.compile(r"(?:\s*[$£€%°/.,;:!)]|\s+\S|[A-Za-z]{2}|[gmlhsLCF](?![A-Za-z])|[kK](?![A-Za-z])|$)")
_MAGNITUDES = {"k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "hundred": 100}
_LATEX = (
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\[,!;: ()\[\]]|\\(?=[$%£€])"), ""),
    (re.compile(r"\{,\}"), ","),
)
_MINUSES = str.maketrans({"−": "-", "–": "-", "‐": "-", "‑": "-", "-": "-", "\u00a0": " ", "\u202f": " "})


def read_number(text: str) -> Fraction | None:
    """The one number that `text` states, with its currency, unit, percent sign or LaTeX wrapping; None when unsure.

    Text before the number, a second number, and wrongly grouped commas make it None. A percent sign is a unit:
    "50%" reads as 50.
    """
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = _unwrap(text)
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    rest = text[match.end() :]
    if not _UNIT.match(rest) or any(c.isnumeric() or c in "+=*×÷^√\\" for c in rest):
        return None
    value = _value(match)
    if value is None:
        return None
    unit = rest.split()[0].strip(".,;:!)").lower() if rest.split() else ""
    value *= _MAGNITUDES.get(unit, 1)
    return -value if "-" in (match["sign"], match["inner"]) else value


def compare(answer: str | None, gold: str) -> Verdict:
    """Whether `answer` states what `gold` states.

    No answer is wrong: the model did not answer. A gold answer that is empty or too long to read is undecided.
    Two integers must be equal; otherwise numbers may differ by a relative 1e-6. A percent sign on one side only
    matches the number with or without the division by 100. A gold answer that is no number is compared as text,
    ignoring case, spaces and a final full stop.
    """
    try:
        return _compare(answer, gold)
    except Exception:
        return Verdict.UNDECIDED


def extract_after_marker(text: str, marker: str) -> str | None:
    """What follows the last `marker` on its line, stripped; None without a marker or with nothing after it."""
    _, found, after = text.rpartition(marker)
    return (after.partition("\n")[0].strip() or None) if found else None


def _compare(answer: str | None, gold: str) -> Verdict:
    if not gold.strip() or len(gold) > MAX_ANSWER_LENGTH:
        return Verdict.UNDECIDED
    if answer is None or not answer.strip():
        return Verdict.WRONG
    if len(answer) > MAX_ANSWER_LENGTH:
        return Verdict.UNDECIDED
    wanted = read_number(gold)
    if wanted is None:
        return _verdict(_plain(answer) == _plain(gold))
    given = read_number(answer)
    if given is None:
        # An answer without any digit is no number at all; one with digits may be right in a form unknown here.
        return Verdict.UNDECIDED if any(c.isnumeric() for c in answer) else Verdict.WRONG
    if _close(given, wanted):
        return Verdict.RIGHT
    by_answer, by_gold = "%" in answer, "%" in gold
    if by_answer != by_gold:
        return _verdict(_close(given / 100, wanted) if by_answer else _close(given, wanted / 100))
    return Verdict.WRONG


def _verdict(equal: bool) -> Verdict:
    return Verdict.RIGHT if equal else Verdict.WRONG


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


def _unwrap(text: str) -> str:
    """`text` without LaTeX, emphasis and leading equals signs, with plain minus signs and spaces."""
    text = text.translate(_MINUSES)
    _, boxed, inside = text.rpartition("\\boxed{")
    if boxed and "}" in inside:
        text = inside[: inside.rindex("}")]
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.strip().strip("*_`").lstrip("=≈: ").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":  # math mode, not a currency
        text = text[1:-1].strip()
    return text


def _plain(text: str) -> str:
    """Case, runs of spaces, a final full stop and the brackets of a lone option letter do not matter."""
    text = " ".join(_unwrap(text).casefold().split()).rstrip(".").rstrip()
    return re.sub(r"^\(([a-z])\)$", r"\1", text)
