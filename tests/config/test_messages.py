"""Errors of libraries as a part of one sentence."""

import pytest

from aft_ray.config.messages import first_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("\n  the store is closed\nException raised from wait\n"), "the store is closed"),
        (TimeoutError(), "TimeoutError"),
        (AssertionError("  \n"), "AssertionError"),
    ],
)
def test_the_first_line_says_what_happened_even_without_a_message(error, text):
    assert first_line(error) == text
