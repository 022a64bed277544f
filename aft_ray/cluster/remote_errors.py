"""The message of an error that was raised in another process and reached this one as Ray's traceback text."""

from __future__ import annotations

import re

# The prefix of an exception of this package in a traceback.
_OWN_EXCEPTION = re.compile(r"^aft_ray(\.\w+)+: ")


def traceback_message(text: str) -> str:
    """The error message in a remote traceback: that of this package's last exception in it, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    messages = [message for line in lines if (message := _OWN_EXCEPTION.sub("", line)) != line]
    return (messages or lines or ["no reason given"])[-1]
