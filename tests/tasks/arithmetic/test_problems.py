"""Generated problems are right and reproducible, and two splits never share one."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.config.run import ArithmeticConfig, ConfigError, DataConfig
from aft_ray.storage.records import Question, Verdict
from aft_ray.tasks import SPLITS, build_task, load_split
from aft_ray.tasks.arithmetic.problems import Calculation, generate

CONFIG = ArithmeticConfig()
NUMBER = re.compile(r"[0-9]+")


def calculation(question: Question) -> list[tuple[int, ...]]:
    """The numbers of each step of the reference, read back from its text."""
    thought = question.reference.partition("####")[0]
    return [tuple(map(int, NUMBER.findall(step))) for step in thought.split(". ") if step.strip()]


def holds(step: str) -> bool:
    """Whether one sentence of a chain of thought states a true calculation."""
    a, b, c = map(int, NUMBER.findall(step))
    if "=" in step:
        operation = re.search(r"[-+*/]", step)
        assert operation is not None
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation[0]] == c
    if step.startswith("adding"):
        return a + b == c
    if step.startswith("taking"):
        return b - a == c
    return a / b == c if step.startswith("splitting") else a * b == c


def test_references_are_true_chains_that_end_in_the_gold_answer() -> None:
    task = build_task(DataConfig(), 0)
    for question in generate(CONFIG, "train", 1000):
        thought, _, answer = question.reference.rpartition("####")
        steps = [step for step in thought.strip().rstrip(".").split(". ") if step]
        assert CONFIG.min_steps <= len(steps) <= CONFIG.max_steps
        assert all(holds(step) for step in steps), question
        results = [int(NUMBER.findall(step)[-1]) for step in steps]
        for result, step in zip(results, steps[1:], strict=False):
            assert str(result) in NUMBER.findall(step)[:2]  # each step goes on from the one before
        assert int(answer) == results[-1] == int(question.gold)
        assert max(results) <= CONFIG.max_value
        assert task.same(task.extract(question.reference), question.gold).verdict is Verdict.RIGHT


def test_every_number_of_a_calculation_is_in_the_question() -> None:
    config = ArithmeticConfig(distractors=0)
    for question in generate(config, "train", 300):
        assert len(NUMBER.findall(question.text)) == len(calculation(question)) + 1


def test_distractors_add_a_number() -> None:
    config = ArithmeticConfig(distractors=1)
    for question in generate(config, "train", 300):
        assert len(NUMBER.findall(question.text)) == len(calculation(question)) + 2


def test_no_two_splits_share_a_question_whatever_the_seeds() -> None:
    texts = {
        split: {q.text for seed in (0, 1) for q in generate(ArithmeticConfig(seed=seed, max_operand=6), split, 400)}
        for split in SPLITS
    }
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@settings(deadline=None)
@given(st.integers(2, 20), st.lists(st.tuples(st.just("+"), st.integers(2, 20)), min_size=1, max_size=4))
def test_a_calculation_has_one_split(start: int, steps: list[tuple[str, int]]) -> None:
    assert Calculation(start, tuple(steps)).split == Calculation(start, tuple(steps)).split in SPLITS


def test_a_longer_split_starts_with_the_shorter_one() -> None:
    short, long = generate(CONFIG, "test", 50), generate(CONFIG, "test", 200)
    assert short == long[:50]
    assert long[123].id == "arithmetic-test-000123"
    assert len({q.text for q in long}) == 200
    assert generate(ArithmeticConfig(seed=1), "test", 50) != short


def test_right_responses_differ_from_the_reference() -> None:
    def wordings(phrasings: int) -> set[str]:
        found = generate(ArithmeticConfig(phrasings=phrasings, operations="+"), "train", 300)
        return {NUMBER.sub("", q.reference.split(".")[0]).rsplit(" ", 1)[0].strip() for q in found}

    assert len(wordings(1)) == 1
    assert len(wordings(2)) == 2
    assert len(wordings(3)) > 2


def test_an_exhausted_space_is_an_error_and_not_a_loop() -> None:
    tiny = ArithmeticConfig(min_steps=1, max_steps=1, max_operand=5, operations="/", distractors=0)
    with pytest.raises(ConfigError, match=r"only .* different train problems"):
        generate(tiny, "train", 5000)


def test_impossible_operations_are_an_error() -> None:
    with pytest.raises(ConfigError, match="only 0 different"):
        generate(ArithmeticConfig(min_steps=8, operations="/", max_steps=8), "train", 1)


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        ArithmeticConfig,
        min_steps=st.integers(1, 2),
        max_steps=st.integers(2, 8),
        max_operand=st.integers(10, 1000),
        max_value=st.integers(50, 5000),
        operations=st.sampled_from(["+", "-+", "+-*/", "*/+"]),
        distractors=st.floats(0, 1),
    )
)
def test_results_stay_in_bounds(config: ArithmeticConfig) -> None:
    for question in generate(config, "train", 20):
        values = [step[-1] for step in calculation(question)]
        assert all(1 <= value <= max(config.max_value, config.max_operand) for value in values)


def test_the_marker_and_the_prompt_are_configurable() -> None:
    data = DataConfig(answer_marker="Answer:", prompt="Q: {question} {braces}")
    task = build_task(data, 0)
    question = load_split(task, "validation", 1, 0)[0]
    assert question.reference.endswith(f" Answer: {question.gold}")
    assert task.extract(question.reference) == question.gold
    assert task.prompt(question) == f"Q: {question.text} {{braces}}"


def test_a_limit_is_a_seeded_draw_in_order() -> None:
    task = build_task(DataConfig(), 0)
    everything = load_split(task, "validation", None, 0)
    some = load_split(task, "validation", 50, 1)
    assert len(everything) == CONFIG.validation_size
    assert len(some) == 50
    assert set(some) < set(everything)
    assert all(a.id < b.id for a, b in pairwise(some))
    assert some == load_split(task, "validation", 50, 1) != load_split(task, "validation", 50, 2)
    assert load_split(task, "validation", 10**6, 0) == everything
