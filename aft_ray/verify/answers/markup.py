"""Takes the wrapping off an answer: LaTeX, emphasis, math mode, boxes, odd spellings of ordinary characters.

Invariant: what is taken off never changes what is said. Time is linear in the text; answers longer than
`MAX_ANSWER_LENGTH` are for the callers to refuse.
"""

from __future__ import annotations

import re

MAX_ANSWER_LENGTH = 1000  # characters; a longer "answer" is a runaway sample, and is not read

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_LATEX = (
    (re.compile(r"(?<=[0-9])\s*(?=\\[dtc]?frac)"), " "),  # 1\frac{1}{2} is a mixed number, not 11/2
    # Only of single terms: without its braces, \frac{x+1}{2} would be another number.
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
# Full-width forms are the same characters, as East Asian models write them; other scripts' digits are left alone.
_SAME = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    dict.fromkeys("−–‐‑", "-") | dict.fromkeys("\u00a0\u202f\u2009\u3000", " ") | {"’": "'"}
)
_MARKS = dict.fromkeys(map(ord, "*_`$"))


def tidy(text: str) -> str:
    """A whole response without the marks around words: emphasis, math mode, \\text{...}; full-width forms are plain."""
    return _TEXT.sub(r" \1", text.translate(_SAME)).translate(_MARKS)


def inside(text: str) -> str:
    """What the last box in `text` holds, or all of it, without emphasis, leading equals signs and math mode."""
    text = text.translate(_SAME)
    _, boxed, rest = text.rpartition("\\boxed{")
    if boxed and "}" in rest:
        text = rest[: rest.rindex("}")]
    text = text.strip().strip("*_`").lstrip("=≈: ").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":  # math mode, not a currency
        text = text.strip("$").strip()
    return text


def unwrap(text: str) -> str:
    """What is inside, with the LaTeX of ordinary answers written plainly: "1\\frac{1}{2}" is "1 1/2"."""
    text = inside(text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return inside(text)


def plain(text: str) -> str:
    """For comparing as text: case, runs of spaces, a final full stop and the brackets of a lone letter do not count."""
    text = " ".join(unwrap(text).casefold().split()).rstrip(".").rstrip()
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


def shown(text: str, length: int = 40) -> str:
    """`text` quoted for a reason, cut to about `length` characters."""
    return repr(text if len(text) <= length else text[:length] + "…")
