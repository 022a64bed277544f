"""The verifier reads numbers as people and models write them, and never calls an answer wrong that it cannot read."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.storage.records import Verdict
from aft_ray.verify.answers.compare import compare
from aft_ray.verify.answers.numbers import extract_after_marker, read_number

READ = [
    ("18", 18),
    ("18.", 18),
    ("18.00", 18),
    (" 18 dollars", 18),
    ("$18", 18),
    ("18$", 18),
    ("$18$", 18),
    ("\\$18", 18),
    ("£1,234.50", Fraction("1234.5")),
    ("5 €", 5),
    ("1,234,567", 1234567),
    ("-7", -7),
    ("−7", -7),
    ("-$7", -7),
    ("$-7", -7),
    ("+7", 7),
    (".5", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)),
    ("1 1/2", Fraction(3, 2)),
    ("-1 1/2", Fraction(-3, 2)),
    ("1,500/3", 500),
    ("50%", 50),
    ("50 %", 50),
    ("\\boxed{42}", 42),
    ("The result is \\boxed{\\frac{3}{4}}.", Fraction(3, 4)),
    ("\\boxed{1{,}000}", 1000),
    ("\\(12\\)", 12),
    ("\\boxed{12 \\text{ apples}}", 12),
    ("**18**", 18),
    ("= 18", 18),
    ("5kg", 5),
    ("5m", 5),
    ("18 apples.", 18),
    ("$3/hour", 3),
    ("3 million", 3_000_000),
    ("$5k", 5000),
    ("1.5e3", 1500),
    ("007", 7),
]
UNREADABLE = [
    "",
    "apples",
    "-",
    "$",
    "1,23",
    "1234,567",
    "1.2.3",
    "1 2",
    "3 or 4",
    "3-4",
    "3 + 4 = 7",
    "3x",
    "2^3",
    "3/0",
    "--3",
    "1½",
    "10:30",
    "about 5",
    "5/x+1",
    "1e999999999",
    "१२",
]


@pytest.mark.parametrize(("text", "value"), READ)
def test_reads(text: str, value: Fraction | int) -> None:
    assert read_number(text) == value


@pytest.mark.parametrize("text", UNREADABLE)
def test_does_not_guess(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("18", "18", Verdict.RIGHT),
        ("$18.00", "18", Verdict.RIGHT),
        ("1,000", "1000", Verdict.RIGHT),
        ("19", "18", Verdict.WRONG),
        ("10000001", "10000000", Verdict.WRONG),  # integers are exact, however large
        ("0.3333333", "1/3", Verdict.RIGHT),
        ("0.33", "1/3", Verdict.WRONG),
        ("50%", "50", Verdict.RIGHT),
        ("50%", "0.5", Verdict.RIGHT),
        ("0.5", "50%", Verdict.RIGHT),
        ("5", "50%", Verdict.WRONG),
        (None, "18", Verdict.WRONG),
        ("", "18", Verdict.WRONG),
        ("many", "18", Verdict.WRONG),
        ("3 or 18", "18", Verdict.UNDECIDED),
        ("18", "", Verdict.UNDECIDED),
        (None, " ", Verdict.UNDECIDED),
        ("A", "A", Verdict.RIGHT),
        ("(a)", "A", Verdict.RIGHT),
        ("B.", "A", Verdict.WRONG),
        ("New  York.", "new york", Verdict.RIGHT),
        ("3x", "3x", Verdict.RIGHT),
        ("3", "3x", Verdict.WRONG),
        ("2020-01-02", "2020-01-02", Verdict.RIGHT),
        ("[0,1)", "(0,1]", Verdict.WRONG),
    ],
)
def test_compares(answer: str | None, gold: str, verdict: Verdict) -> None:
    assert compare("number", answer, gold).verdict is verdict


@pytest.mark.parametrize("piece", ["1", "1,", "1 ", "-", "$", "(", "\\boxed{", "1/", "\\frac{", "a", " ", "."])
def test_a_megabyte_is_undecided_at_once(piece: str) -> None:
    long = piece * (1_000_000 // len(piece)) + "1"
    started = time.process_time()
    assert read_number(long) is None
    assert compare("number", long, "1").verdict is Verdict.UNDECIDED
    assert compare("number", "1", long).verdict is Verdict.UNDECIDED
    for _ in range(20):  # the longest that is read, in shapes that make careless patterns backtrack
        read_number((piece * 1000)[:999] + "!")
    assert time.process_time() - started < 1


def test_a_failure_inside_is_undecided() -> None:
    assert compare("number", 12, "12").verdict is Verdict.UNDECIDED  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_an_integer_is_right(number: int) -> None:
    for text in (
        str(number),
        f"{number:,}",
        f"${number}",
        f"{number}.00",
        f"{number} apples",
        f"\\boxed{{{number:,}}}",
    ):
        assert compare("number", text, str(number)).verdict is Verdict.RIGHT
        assert compare("number", text, str(number + 1)).verdict is Verdict.WRONG


@settings(deadline=None)
@given(st.integers(-1000, 1000), st.integers(1, 1000))
def test_fractions_are_exact(over: int, under: int) -> None:
    assert read_number(f"{over}/{under}") == Fraction(over, under)


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_gets_a_verdict(answer: str, gold: str) -> None:
    assert compare("number", answer, gold).verdict in Verdict


@settings(deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_a_text_is_never_wrong_against_itself(text: str) -> None:
    assert compare("number", text, text).verdict is not Verdict.WRONG


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a #### 12", "12"),
        ("#### 1\nno wait\n#### 2\nbye", "2"),
        ("#### 1 #### 2", "2"),
        ("no marker", None),
        ("####", None),
        ("#### 5\n####   \n", None),
        ("#### 12\r\nmore", "12"),
    ],
)
def test_the_last_marker_counts(text: str, answer: str | None) -> None:
    assert extract_after_marker(text, "####") == answer


def test_any_marker() -> None:
    assert extract_after_marker("so The answer is: $5.", "The answer is:") == "$5."
