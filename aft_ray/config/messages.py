"""The text of an error as a part of one sentence."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class when it has none.

    Libraries add stack frames or explanations in the lines below.
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
