"""Reads which option of a multiple-choice question an answer names.

Invariant: a letter is read only where it denotes an option. Letters inside words, the article "a" and the pronoun "I"
are never read as options. A text that names several options is not read as one of them. The time is linear in the
length of the text.
"""

from __future__ import annotations

import re

from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, remove_formatting, to_plain_notation

ALL_LETTERS = "ABCDEFGHIJ"  # The longest lists of options in use have ten.

# After a bare letter, there must be an end, punctuation, a bracket or a connective: "a." is an option, "a dog" is not.
_OPTION = r"""
    (?:the\s+)? (?:option\s*|choice\s*|letter\s*)? ["'(\[{]* \s? (?P<letter>[A-Z])
    (?: \s?[)\]}]
      | (?![\w'])(?= \s*(?: $ | [\n;:,!?"'|/&] | \.(?!\w) | [-–—]\s | \( )
                   | \s+(?: because|since|as|so|for|which|that|but|with|not|given|due|based|from|by|and|or )\b ) )
    (?! \s+(?: is|was|are|isn't|cannot|can't|does|doesn't|would|could )\b )
"""
_ANNOUNCEMENT = r"""
    (?: \b(?: answer (?:\s+(?:choice|option|letter))? | ans | (?:correct|right|best)\s+(?:option|choice|one)
            | option(?=:) | which\s+is | i\s+(?:choose|pick|select) | choosing | selecting )\b \.?
      | \#{4} | \\boxed(?=\s?\{) )
    (?: \s*(?: (?:is|was|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be)\b | [:,=→⇒–—] | -+>? ) )*
    (?: \s* (?:therefore|thus|clearly|simply|just|hence|definitely|most\s+likely|probably|indeed)\b,? )?
    \s*
"""
_JUDGEMENT = r"""
    (?<![\w'(\[{]) ["'(\[{]* (?P<letter>[A-Z]) ["')\]}]*
    \s+(?:is|must\s+be|should\s+be|seems) \s+(?:(?:therefore|thus|clearly|also)\s+)? (?:the\s+)?
    (?:correct|right|best|answer|true)\b
"""
_FLAGS = re.VERBOSE | re.IGNORECASE
_STATED_ANSWER = re.compile(_ANNOUNCEMENT + _OPTION, _FLAGS)  # "The answer is (B)".
_JUDGED_RIGHT = re.compile(_JUDGEMENT, _FLAGS)  # "(B) is correct".
_LONE_OPTION = re.compile(rf"""{_OPTION} ["'.:]*""", _FLAGS)  # A line that is only an option.
_NAMED_OPTION = re.compile(r"(?<![\w)])[(\[](?P<letter>[A-Z])[)\]] | \boption\s+(?P<named>[A-Z])(?![\w'])", _FLAGS)
_LIST_ITEM = re.compile(r"[(\[]?(?P<letter>[A-Z]) (?: [)\]] | [.:](?:\s|$) | \s[-–—]\s )", _FLAGS)  # "B) 12".
_SECOND_OPTION = re.compile(rf"""["')\]}}.]* \s* (?:,|/|&|\band\b|\bor\b) \s* (?:(?:and|or)\s+)? {_OPTION}""", _FLAGS)
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|incorrect|wrong|eliminat\w+|excluded?)\b|n't\b", re.IGNORECASE
)


def extract_option(text: str, letters: str = "ABCDE") -> str | None:
    """The option that a response chooses, as a capital letter; None when it names none.

    The last explicit statement counts: "The answer is (B)", "C is correct", "#### D", a box, or a last line that is
    only an option. Without such a statement, the option that the last line names counts. When a statement names several
    options, its words are returned ("A or B"); they compare as undecided. Lines that list the options name none.
    """
    lines = [line.strip() for line in remove_formatting(text).splitlines() if line.strip()]
    if not lines:
        return None
    last, text = lines[-1], "\n".join(lines)
    if lone := _letter(_LONE_OPTION.fullmatch(last), letters):
        return lone
    statements = [match for pattern in (_STATED_ANSWER, _JUDGED_RIGHT) for match in pattern.finditer(text)]
    for match in sorted(statements, key=lambda match: match.start("letter"), reverse=True):
        if option := _letter_or_words(text, match, letters):
            return option
    list_item = _LIST_ITEM.match(last)
    if list_item and len(lines) > 1 and _LIST_ITEM.match(lines[-2]):
        return None
    named = {(match["letter"] or match["named"]).upper() for match in _NAMED_OPTION.finditer(last)} & set(letters)
    named |= {letter for letter in [_letter(list_item, letters)] if letter}
    if not named or (_NEGATION.search(last) and not list_item):
        return None
    return named.pop() if len(named) == 1 else last


def read_option(text: str, letters: str = ALL_LETTERS) -> str | None:
    """The option that an answer states, as a capital letter: "B", "(b)", "B) 12" or "Option B"; None when unsure."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    option = extract_option(to_plain_notation(text), letters)
    return option if option and len(option) == 1 else None


def _letter_or_words(text: str, match: re.Match[str], letters: str) -> str | None:
    """The letter of a match, or its words, such as "A or B", when a second option follows."""
    letter = _letter(match, letters)
    second = _SECOND_OPTION.match(text, match.end()) if letter else None
    return text[match.start("letter") : second.end()] if second and _letter(second, letters) else letter


def _letter(match: re.Match[str] | None, letters: str) -> str | None:
    """The letter of a match as a capital letter; None when there is no match or the letter is not one of `letters`."""
    letter = match["letter"].upper() if match else ""
    return letter if letter and letter in letters else None
