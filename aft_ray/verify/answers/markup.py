"""Removes the formatting of an answer: LaTeX, emphasis, math mode, boxes and variants of ordinary characters.

Invariant: the meaning of an answer does not change. The time is linear in the length of the text. Callers must reject
answers longer than `MAX_ANSWER_LENGTH`.
"""

from __future__ import annotations

import re

MAX_ANSWER_LENGTH = 1000  # Characters. A longer "answer" comes from a degenerate sample and is not compared.

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_LATEX_REPLACEMENTS = (
    (re.compile(r"(?<=[0-9])\s*(?=\\[dtc]?frac)"), " "),  # 1\frac{1}{2} is a mixed number, not 11/2.
    # Single terms only: without its braces, \frac{x+1}{2} would have another value.
    (re.compile(r"\\[dtc]?frac\s*\{(\s*-?[^{}+*/^=-]*)\}\s*\{([^{}+*/^=-]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])"), r"\1/\2"),
    (_TEXT, r" \1"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![a-zA-Z])"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\[,!;: ()\[\]]|\\(?=[$%£€])"), ""),
    (re.compile(r"\{,\}"), ","),
)
# Full-width forms, which East Asian models write, are the same characters. Digits of other scripts stay unchanged.
_PLAIN_CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    dict.fromkeys("−–‐‑", "-") | dict.fromkeys("\u00a0\u202f\u2009\u3000", " ") | {"’": "'"}
)
_FORMATTING = dict.fromkeys(map(ord, "*_`$"))


def remove_formatting(text: str) -> str:
    """A whole response without emphasis, math mode and \\text{...}, and with full-width forms made plain."""
    return _TEXT.sub(r" \1", text.translate(_PLAIN_CHARACTERS)).translate(_FORMATTING)


def unwrap_answer(text: str) -> str:
    """The content of the last box in `text`, or all of it, without emphasis, leading equals signs and math mode."""
    text = text.translate(_PLAIN_CHARACTERS)
    _, boxed, rest = text.rpartition("\\boxed{")
    if boxed and "}" in rest:
        text = rest[: rest.rindex("}")]
    text = text.strip().strip("*_`").lstrip("=≈: ").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":  # Math mode, not a currency.
        text = text.strip("$").strip()
    return text


def to_plain_notation(text: str) -> str:
    """The unwrapped answer with the LaTeX of ordinary answers in plain notation: "1\\frac{1}{2}" becomes "1 1/2"."""
    text = unwrap_answer(text)
    for pattern, replacement in _LATEX_REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return unwrap_answer(text)


def comparable_text(text: str) -> str:
    """The text without case, repeated spaces, a final full stop and brackets around a lone letter."""
    text = " ".join(to_plain_notation(text).casefold().split()).rstrip(".").rstrip()
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


def quote(text: str, length: int = 40) -> str:
    """`text` in quotation marks for a message, cut to about `length` characters."""
    return repr(text if len(text) <= length else text[:length] + "…")
