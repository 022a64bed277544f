"""Reads whether an answer says yes or no.

Invariant: an answer is read only when it begins or ends with one clear word for yes or no, and does not say both.
"""

from __future__ import annotations

import re

from aft_ray.verify.answers.markup import MAX_ANSWER_LENGTH, remove_formatting, to_plain_notation

_YES = {"yes", "true", "yeah", "yep", "yup", "correct", "right", "affirmative", "y", "t"}
_NO = {"no", "false", "nope", "nah", "incorrect", "wrong", "negative", "n", "f"}
_WORD = re.compile(r"[a-z']+")
_ANNOUNCEMENT = re.compile(r".*\banswer\b(?:\s+is\b)?[\s:]*", re.DOTALL)  # "So the answer is: ".
# The words that an explanation may follow.
_WITH_EXPLANATION = {"yes", "no", "true", "false", "nope", "yeah", "yep"}


def read_yes_no(text: str) -> bool | None:
    """True for yes, False for no, None when unsure.

    Examples of what is read: "Yes.", "No, because …", "the answer is **false**", "not true".
    """
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = _ANNOUNCEMENT.sub("", remove_formatting(to_plain_notation(text)).casefold(), count=1)
    words = _WORD.findall(text)
    if words[:2] == ["it", "is"] or words[:2] == ["that", "is"] or words[:1] == ["it's"]:
        words = words[2 if words[1:2] == ["is"] else 1 :]
    if words[:1] == ["not"] and len(words) == 2:
        opposite = _read_word(words[1])
        return None if opposite is None else not opposite
    if not words or (len(words) > 1 and (words[0] not in _WITH_EXPLANATION or _contradicts(words))):
        return None
    return _read_word(words[0])


def _read_word(word: str) -> bool | None:
    return True if word in _YES else False if word in _NO else None


def _contradicts(words: list[str]) -> bool:
    """Whether the words say both yes and no."""
    return any(_read_word(word) is (not _read_word(words[0])) for word in words[1:] if word in _WITH_EXPLANATION)
