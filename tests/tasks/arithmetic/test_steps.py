"""A question's calculation is read exactly, and a chain of thought gets credit only for its right steps."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.config.run import ArithmeticConfig
from aft_ray.tasks.arithmetic.problems import Calculation, generate, word_problem
from aft_ray.tasks.arithmetic.steps import grade_steps, read_calculation

# 8 + 4 = 12, 12 * 2 = 24, 24 - 5 = 19
QUESTION = (
    "Ana has 8 coins. Ana finds 4 more. Ben has 7 coins. then Ana gets 2 times as many. Ana loses 5. "
    "how many coins does Ana have?"
)
CHAIN = "8 + 4 = 12. 12 * 2 = 24. 24 - 5 = 19. #### 19"
SHARED = {"max_operand": 40, "max_value": 2000, "max_steps": 6, "min_steps": 1, "operations": "+-*/"}

calculations = st.builds(
    Calculation,
    st.integers(2, 10**6),
    st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(2, 1000)), min_size=1, max_size=8).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(calculations, st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0]))
def test_the_calculation_of_a_question_is_read_back(calculation, seed, distractors, terse):
    config = ArithmeticConfig(distractors=distractors, terse=terse)
    question = word_problem(config, random.Random(seed), calculation, "id", "####")
    assert read_calculation(question.text) == calculation


@pytest.mark.parametrize("terse", [0.0, 0.5, 1.0])
def test_references_get_the_full_grade_and_parts_of_them_less(terse):
    config = ArithmeticConfig(**SHARED, terse=terse, distractors=0.5)
    for question in generate(config, "train", 2000):
        assert grade_steps(question.text, question.reference, True) == 1.0
        steps = len(read_calculation(question.text).steps)
        assert grade_steps(question.text, f"#### {question.gold}", True) == 1 / (steps + 1)
        thought = question.reference.partition(" ####")[0]
        assert grade_steps(question.text, thought, False) == steps / (steps + 1)
        first = thought.index(".") + 1
        assert grade_steps(question.text, thought[first:], True) < 1


@pytest.mark.parametrize(
    ("response", "right", "earned"),
    [
        (CHAIN, True, 4),
        (CHAIN, False, 3),
        ("#### 19", True, 1),
        ("#### 18", False, 0),
        ("", False, 0),
        # other wordings, and two steps at once
        ("adding 4 to 8 gives 12. 2 times 12 is 24. now 24 - 5 = 19 coins. #### 19", True, 4),
        ("(8 + 4) * 2 = 24. taking 5 from 24 leaves 19. #### 19", True, 4),
        ("8 + 4 = 12.\n(12 * 2) - 5 = 19.\n#### 19", True, 4),
        # two steps at once with a wrong result earn neither
        ("(8 + 4) * 2 = 20. 24 - 5 = 19. #### 19", True, 1),
        # a wrong value after, before, operand or operation
        ("8 + 4 = 13. 12 * 2 = 24. 24 - 5 = 19. #### 19", True, 1),
        ("8 + 4 = 12. 13 * 2 = 24. 24 - 5 = 19. #### 19", True, 2),
        ("8 + 4 = 12. 12 * 3 = 24. 24 - 5 = 19. #### 19", True, 2),
        ("8 + 4 = 12. 12 + 2 = 24. 24 - 5 = 19. #### 19", True, 2),
        # a wrong end after a right beginning
        ("8 + 4 = 12. 12 * 2 = 24. 24 - 5 = 18. #### 18", False, 2),
        # out of order
        ("12 * 2 = 24. 8 + 4 = 12. 24 - 5 = 19. #### 19", True, 2),
        # a step with the distractor's number
        ("8 + 4 = 12. 12 + 7 = 19. #### 19", True, 2),
        ("8 + 4 = 12. 12 + 7 = 19. 12 * 2 = 24. 24 - 5 = 19. #### 19", True, 3),
        # a step stated twice counts once
        ("8 + 4 = 12. 8 + 4 = 12. 12 * 2 = 24. #### 19", True, 3),
        # sentences that state no step do not change the grade
        ("Ana is happy. 8 + 4 = 12. so far so good. 12 * 2 = 24. 8 4 12 2 24 5 19. 24 - 5 = 19. #### 19", True, 4),
        # a sentence must be whole
        ("8 + 4 = 12, 12 * 2 = 24, 24 - 5 = 19 #### 19", True, 1),
        ("not 8 + 4 = 12. #### 19", True, 1),
        ("1" * 5000 + " + 4 = 12. #### 19", True, 1),
    ],
)
def test_the_grade_of_a_response(response, right, earned):
    assert grade_steps(QUESTION, response, right) == earned / 4


def test_stating_everything_earns_less_than_the_true_chain():
    numbers = (2, 4, 5, 7, 8, 12, 19, 24)
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    guesses = " ".join(f"{a} {o} {b} = {apply[o](a, b)}." for a, b, o in product(numbers, numbers, "+-*"))
    assert all(step in guesses for step in CHAIN.split(". ")[:-1])
    assert grade_steps(QUESTION, guesses + " #### 19", True) == 1 / 4
    assert grade_steps(QUESTION, CHAIN.replace(" ####", f" {guesses} ####"), True) == 1.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CHAIN.split(" ####")[0].replace(". ", ".|").split("|"), "8 + 7 = 15."]), max_size=12))
def test_no_list_of_statements_earns_more_than_its_right_beginning_within_the_steps(sentences):
    expected, chain = 0, ["8 + 4 = 12.", "12 * 2 = 24.", "24 - 5 = 19."]
    for sentence in sentences[:3]:
        if expected < 3 and sentence == chain[expected]:
            expected += 1
    assert grade_steps(QUESTION, " ".join(sentences), False) == expected / 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "what is 2 + 2?",
        "Ana has 8 coins. Ana finds four more. how many coins does Ana have?",
        "Ana has 8 coins. Ben finds 4 more. how many coins does Ana have?",
    ],
)
def test_a_question_of_another_task_is_an_error(text):
    with pytest.raises(ValueError, match="not a generated word problem"):
        grade_steps(text, "8 + 4 = 12.", False)
