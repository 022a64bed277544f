"""Reads which option of a multiple-choice question an answer names.

Invariant: a letter is read only where it stands as an option; one inside a word, the article "a" and the pronoun "I"
are never taken for one. What names several options is no option. Time is linear in the text.
"""

from __future__ import annotations

import re

from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, tidy, unwrap

ALL_LETTERS = "ABCDEFGHIJ"  # the longest lists of options in use have ten

# A bare letter must be followed by an end, punctuation, a bracket or a connective: "a dog" is no option, "a." is one.
_OPTION = r"""
    (?:the\s+)? (?:option\s*|choice\s*|letter\s*)? ["'(\[{]* \s? (?P<letter>[A-Z])
    (?: \s?[)\]}]
      | (?![\w'])(?= \s*(?: $ | [\n;:,!?"'|/&] | \.(?!\w) | [-–—]\s | \( )
                   | \s+(?: because|since|as|so|for|which|that|but|with|not|given|due|based|from|by|and|or )\b ) )
    (?! \s+(?: is|was|are|isn't|cannot|can't|does|doesn't|would|could )\b )
"""
_ANNOUNCED = r"""
    (?: \b(?: answer (?:\s+(?:choice|option|letter))? | ans | (?:correct|right|best)\s+(?:option|choice|one)
            | option(?=:) | which\s+is | i\s+(?:choose|pick|select) | choosing | selecting )\b \.?
      | \#{4} | \\boxed(?=\s?\{) )
    (?: \s*(?: (?:is|was|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be)\b | [:,=→⇒–—] | -+>? ) )*
    (?: \s* (?:therefore|thus|clearly|simply|just|hence|definitely|most\s+likely|probably|indeed)\b,? )?
    \s*
"""
_JUDGED = r"""
    (?<![\w'(\[{]) ["'(\[{]* (?P<letter>[A-Z]) ["')\]}]*
    \s+(?:is|must\s+be|should\s+be|seems) \s+(?:(?:therefore|thus|clearly|also)\s+)? (?:the\s+)?
    (?:correct|right|best|answer|true)\b
"""
_FLAGS = re.VERBOSE | re.IGNORECASE
_STATED = re.compile(_ANNOUNCED + _OPTION, _FLAGS)  # "The answer is (B)"
_PRAISED = re.compile(_JUDGED, _FLAGS)  # "(B) is correct"
_LONE = re.compile(rf"""{_OPTION} ["'.:]*""", _FLAGS)  # nothing but an option
_POINTED = re.compile(r"(?<![\w)])[(\[](?P<letter>[A-Z])[)\]] | \boption\s+(?P<named>[A-Z])(?![\w'])", _FLAGS)
_LISTED = re.compile(r"[(\[]?(?P<letter>[A-Z]) (?: [)\]] | [.:](?:\s|$) | \s[-–—]\s )", _FLAGS)  # "B) 12"
_AND_MORE = re.compile(rf"""["')\]}}.]* \s* (?:,|/|&|\band\b|\bor\b) \s* (?:(?:and|or)\s+)? {_OPTION}""", _FLAGS)
_NEGATED = re.compile(
    r"\b(?:not|never|neither|nor|cannot|incorrect|wrong|eliminat\w+|excluded?)\b|n't\b", re.IGNORECASE
)


def extract_option(text: str, letters: str = "ABCDE") -> str | None:
    """The option that a response settles on, as a capital letter; None when it names none.

    The last explicit statement wins ("The answer is (B)", "C is correct", "#### D", a box, a last line that is a lone
    option); without one, the option named in the last line. What names several is given back in its own words
    ("A or B"), which compares as undecided. Lines that list the options name none.
    """
    lines = [line.strip() for line in tidy(text).splitlines() if line.strip()]
    if not lines:
        return None
    last, text = lines[-1], "\n".join(lines)
    if lone := _letter(_LONE.fullmatch(last), letters):
        return lone
    statements = [match for pattern in (_STATED, _PRAISED) for match in pattern.finditer(text)]
    for match in sorted(statements, key=lambda match: match.start("letter"), reverse=True):
        if option := _with_others(text, match, letters):
            return option
    listed = _LISTED.match(last)
    if listed and len(lines) > 1 and _LISTED.match(lines[-2]):
        return None
    named = {(match["letter"] or match["named"]).upper() for match in _POINTED.finditer(last)} & set(letters)
    named |= {letter for letter in [_letter(listed, letters)] if letter}
    if not named or (_NEGATED.search(last) and not listed):
        return None
    return named.pop() if len(named) == 1 else last


def read_option(text: str, letters: str = ALL_LETTERS) -> str | None:
    """The one option that an answer is, as a capital letter: "B", "(b)", "B) 12", "Option B"; None when unsure."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    option = extract_option(unwrap(text), letters)
    return option if option and len(option) == 1 else None


def _with_others(text: str, match: re.Match[str], letters: str) -> str | None:
    """The letter of a match; "A or B" when another option is named in the same breath."""
    letter = _letter(match, letters)
    more = _AND_MORE.match(text, match.end()) if letter else None
    return text[match.start("letter") : more.end()] if more and _letter(more, letters) else letter


def _letter(match: re.Match[str] | None, letters: str) -> str | None:
    letter = match["letter"].upper() if match else ""
    return letter if letter and letter in letters else None
