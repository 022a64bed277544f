"""A table of ordinary answers of every kind, with the verdict that a careful reader would give."""

import pickle
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.storage.records import Verdict
from aft_ray.verify.answers.compare import Kind, compare

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED

NUMBERS = [
    ("18", "18", RIGHT),
    ("$18.00", "18", RIGHT),
    ("18 dollars", "$18", RIGHT),
    ("1,000", "1000", RIGHT),
    ("1\\,000", "1000", RIGHT),
    ("1\u202f000", "1000", RIGHT),
    ("1\u00a0000 apples", "1000", RIGHT),
    ("5\u00a0apples", "5", RIGHT),
    ("１２", "12", RIGHT),
    ("1.5 × 10^3", "1500", RIGHT),
    ("1.5 \\times 10^{3}", "1500", RIGHT),
    ("2.5*10^-3", "0.0025", RIGHT),
    ("1.5e3", "1,500", RIGHT),
    ("1\\frac{1}{2}", "1.5", RIGHT),
    ("-\\dfrac{3}{4}", "-0.75", RIGHT),
    ("\\frac12", "0.5", RIGHT),
    ("2 dozen", "24", RIGHT),
    ("3 hundred thousand", "300000", RIGHT),
    ("1.2 lakh", "120000", RIGHT),
    ("2 millions", "2e6", RIGHT),
    ("50 percent", "0.5", RIGHT),
    ("50 per cent", "50%", RIGHT),
    ("0.5", "50 percent", RIGHT),
    ("90^\\circ", "90", RIGHT),
    ("90°", "90 degrees", RIGHT),
    ("12 eggs", "12 apples", RIGHT),
    ("2 hrs", "2 hours", RIGHT),
    ("19", "18", WRONG),
    ("-18", "18", WRONG),
    ("2 dozen", "2", WRONG),
    ("1\\frac{1}{2}", "5.5", WRONG),
    ("1.5 × 10^3", "1.5", WRONG),
    ("50 percent", "5", WRONG),
    ("2 hours", "3 hours", WRONG),
    ("many", "18", WRONG),
    ("2 hours", "120 minutes", UNDECIDED),
    ("500 cents", "$5", UNDECIDED),
    ("3 or 4", "4", UNDECIDED),
    ("10^6", "1000000", UNDECIDED),
    ("१२", "12", UNDECIDED),
    ("1½", "1.5", UNDECIDED),
    ("1 000", "1000", UNDECIDED),
    ("3,5", "3.5", UNDECIDED),
    ("5!", "5", UNDECIDED),
    ("5!", "120", UNDECIDED),
    ("\\frac{1+2}{3}", "1", UNDECIDED),
]
OPTIONS = [
    ("B", "B", RIGHT),
    ("(b)", "B", RIGHT),
    ("b)", "(B)", RIGHT),
    ("Option B", "B", RIGHT),
    ("The answer is (B).", "B", RIGHT),
    ("B) 12", "B", RIGHT),
    ("**B. 12**", "B", RIGHT),
    ("\\boxed{\\text{(B)}}", "B", RIGHT),
    ("C", "B", WRONG),
    ("F", "B", WRONG),
    ("The answer is (C), a dog.", "B", WRONG),
    ("A or B", "B", UNDECIDED),
    ("A dog", "A", UNDECIDED),
    ("12", "B", UNDECIDED),
    ("none of them", "B", UNDECIDED),
    ("B", "the second", UNDECIDED),
]
YES_NO = [
    ("yes", "yes", RIGHT),
    ("Yes.", "true", RIGHT),
    ("**True**", "yes", RIGHT),
    ("\\boxed{\\text{Yes}}", "Yes", RIGHT),
    ("Yes, because 3 is odd", "yes", RIGHT),
    ("The answer is no.", "no", RIGHT),
    ("So the answer is: false", "no", RIGHT),
    ("Nope", "no", RIGHT),
    ("not true", "no", RIGHT),
    ("It is false.", "no", RIGHT),
    ("No", "yes", WRONG),
    ("yes", "no", WRONG),
    ("incorrect", "yes", WRONG),
    ("yes and no", "yes", UNDECIDED),
    ("maybe", "yes", UNDECIDED),
    ("nothing", "no", UNDECIDED),
    ("not sure", "no", UNDECIDED),
    ("right angle", "yes", UNDECIDED),
    ("yes", "perhaps", UNDECIDED),
]
MATH = [
    ("12", "12", RIGHT),
    ("\\frac{1}{2}", "0.5", RIGHT),
    ("$x^2+2x+1$", "(x+1)^2", RIGHT),
    ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{\\sqrt{2}}{2}", RIGHT),
    ("\\sqrt{25}", "5", RIGHT),
    ("2*pi", "2\\pi", RIGHT),
    ("5!", "120", RIGHT),
    ("The result is $x+1$.", "1+x", RIGHT),
    ("x = 5", "5", RIGHT),
    ("2, 1", "\\{1, 2\\}", RIGHT),
    ("\\text{no solution}", "No solution", RIGHT),
    ("\\left[0, 1\\right)", "[0,1)", RIGHT),
    ("5 > x", "x < 5", RIGHT),
    ("13", "12", WRONG),
    ("x+1", "x+2", WRONG),
    ("3x+2", "3", WRONG),
    ("\\frac{x+1}{2}", "x+\\frac{1}{2}", WRONG),
    ("(2,1)", "(1,2)", WRONG),
    ("[0,1]", "[0,1)", WRONG),
    ("1.4142", "\\sqrt{2}", WRONG),
    ("x > 5", "x < 5", WRONG),
    ("a dog", "x", UNDECIDED),
    ("east", "west", UNDECIDED),
    ("either $x$ or $y$", "x", UNDECIDED),
    ("\\frac{1}{", "\\sqrt{2}", UNDECIDED),
    ("x", "apples", UNDECIDED),
    ("\\sqrt{x^2}", "x", UNDECIDED),
]
TEXTS = [
    ("New  York.", "new york", RIGHT),
    ("**New York**", "New York", RIGHT),
    ("\\text{east}", "east", RIGHT),
    ("Boston", "New York", WRONG),
]
TABLE = [
    (kind, *row)
    for kind, rows in (("number", NUMBERS), ("option", OPTIONS), ("yes_no", YES_NO), ("math", MATH), ("text", TEXTS))
    for row in rows
]


@pytest.mark.parametrize(("kind", "answer", "gold", "verdict"), TABLE)
def test_ordinary_answers(kind: Kind, answer: str, gold: str, verdict: Verdict) -> None:
    result = compare(kind, answer, gold)
    assert result.verdict is verdict, result
    assert result.answer == answer
    assert bool(result.reason) == (verdict is UNDECIDED)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_no_answer_is_wrong_and_no_gold_is_undecided(kind: Kind) -> None:
    assert compare(kind, None, "B").verdict is WRONG
    assert compare(kind, "  ", "B").verdict is WRONG
    assert compare(kind, "B", "  ").verdict is UNDECIDED
    assert compare(kind, "1" * 2000, "1").verdict is UNDECIDED
    assert compare(kind, "1", "1" * 2000).verdict is UNDECIDED


def test_a_failure_inside_is_undecided_and_named() -> None:
    result = compare("number", 12, "12")  # type: ignore[arg-type]
    assert result.verdict is UNDECIDED
    assert result.reason.startswith("AttributeError")


def test_results_can_be_sent_between_processes() -> None:
    result = compare("number", "3 or 4", "4")
    assert pickle.loads(pickle.dumps(result)) == result


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["number", "option", "yes_no", "text"]), st.text(max_size=60), st.text(max_size=60))
def test_any_text_gets_a_verdict_and_undecided_a_reason(kind: Kind, answer: str, gold: str) -> None:
    result = compare(kind, answer, gold)
    assert bool(result.reason) == (result.verdict is UNDECIDED)


@settings(deadline=None)
@given(st.sampled_from(["number", "option", "yes_no", "text"]), st.text(min_size=1, max_size=30))
def test_a_text_is_never_wrong_against_itself(kind: Kind, text: str) -> None:
    assert compare(kind, text, text).verdict is not WRONG
