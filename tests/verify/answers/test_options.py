"""An option is read from every usual spelling, and never from an ordinary word."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.verify.answers.options import extract_option, read_option

SPELLINGS = [
    "B",
    "b",
    "(B)",
    "(b)",
    "b)",
    "[B]",
    "B.",
    "B) 12",
    "(B) 12",
    "B. 12 apples",
    "B: a dog",
    "**B**",
    '"B"',
    "Option B",
    "option (b)",
    "choice B",
    "Answer: B",
    "Answer - B",
    "Ans. B",
    "The answer is B.",
    "The answer is (B).",
    "The answer is **(B) 12**.",
    "The answer is: B",
    "The correct option is B",
    "the right answer is option B",
    "The best choice would be B, a dog",
    "So the answer must be B because 3 is odd.",
    "Therefore, the answer is:\nB. 12",
    "(B) is correct.",
    "#### B",
    "#### B) 12",
    "\\boxed{B}",
    "\\boxed{\\text{(B)}}",
    "$\\boxed{\\textbf{(B) }12}$",
    "\\text{(B)}",
    "Ｂ",
    "（Ｂ）",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_reads_every_spelling(text: str) -> None:
    assert extract_option(text) == "B"
    assert read_option(text) == "B"


@pytest.mark.parametrize("text", SPELLINGS)
def test_reads_them_after_reasoning(text: str) -> None:
    assert extract_option(f"Let A be a set. I think a dog is an animal; option C is too small.\n{text}") == "B"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("First I said the answer is A.\nBut no, the answer is C.", "C"),
        ("The answer is A. Wait. (D) is correct, since 3 is odd.", "D"),
        ("The answer is A.\nD", "D"),
        ("Option B is wrong. Option D is correct.", "D"),
        ("(A) 1\n(B) 2\n(C) 3\nThe answer is (C).", "C"),
        ("That is 12, so it has to be (C)", "C"),
        ("12 apples, option C", "C"),
        ("The answer is (B), not (A).", "B"),
        ("The answer is A because a dog is an animal", "A"),
        ("The answer is a.", "A"),
    ],
)
def test_the_last_explicit_statement_wins(text: str, option: str) -> None:
    assert extract_option(text) == option


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "A dog",
        "a dog",
        "I think a dog is the best pet",
        "The answer is a dog.",
        "The answer is an egg.",
        "The answer is I think 12",
        "The answer is D-day",
        "The answer is E = mc^2",
        "The answer is Ben's",
        "The answer is not (B)",
        "It cannot be (B)",
        "The area of ABC is 12",
        "P(A) = 3",
        "12",
        "A) 1\nB) 2\nC) 3",
        "F",
        "The answer is F",
    ],
)
def test_no_option_is_read_from_other_text(text: str) -> None:
    assert extract_option(text) is None


@pytest.mark.parametrize(
    "text", ["The answer is A or B.", "The answer is (A) and (B)", "The answer is A, B", "#### A/B", "Both (A) and (B)"]
)
def test_several_options_are_returned_in_the_words_of_the_response(text: str) -> None:
    answer = extract_option(text)
    assert answer is not None
    assert len(answer) > 1
    assert read_option(text) is None
    assert read_option(answer) is None


def test_only_the_letters_of_the_question() -> None:
    assert extract_option("The answer is D", letters="ABC") is None
    assert extract_option("The answer is (H)", letters="ABCDEFGH") == "H"


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_a_letter_or_words_or_nothing(text: str) -> None:
    option = extract_option(text)
    assert option is None or len(option) > 1 or option in "ABCDE"
    assert read_option(text) in (None, *"ABCDEFGHIJ")


@pytest.mark.parametrize(
    "piece", ["A", "a ", "(", "A)", "answer is ", "answer ", " ", "\n", "A, ", "which is", "\\boxed{", "#"]
)
def test_time_is_bounded_by_the_length(piece: str) -> None:
    started = time.process_time()
    extract_option("answer" + piece * (100_000 // len(piece)))
    assert time.process_time() - started < 2
