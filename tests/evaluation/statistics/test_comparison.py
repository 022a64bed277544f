import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import results_text

from aft_ray.config.run import ConfigError
from aft_ray.evaluation.answers import AnsweredQuestion, Response
from aft_ray.evaluation.statistics.comparison import (
    EXACT_LIMIT,
    compare,
    match_questions,
    mcnemar_test,
    permutation_test,
)
from aft_ray.evaluation.statistics.metrics import measure
from aft_ray.storage.records import Verdict


def response(right, score=-1.0, seed=0) -> Response:
    return Response(Verdict.RIGHT if right else Verdict.WRONG, "4" if right else "5", score, seed)


def greedy(verdicts, first=0, task="", text="") -> list[AnsweredQuestion]:
    return [
        AnsweredQuestion(f"q{i:04}", response(right), (), task, text and f"{text}{i}")
        for i, right in enumerate(verdicts, first)
    ]


@settings(deadline=None)
@given(st.integers(0, 7), st.integers(0, 7))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(b, c):
    tosses = itertools.product([0, 1], repeat=b + c)
    as_uneven = sum(abs(2 * sum(toss) - (b + c)) >= abs(b - c) for toss in tosses)
    assert mcnemar_test(b, c) == pytest.approx(as_uneven / 2 ** (b + c))


def test_mcnemar_of_thousands_of_questions_is_the_normal_approximation():
    z = (abs(2200 - 2000) - 1) / math.sqrt(4200)
    assert mcnemar_test(2000, 2200) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def columns(values) -> np.ndarray:
    """The columns of one metric with one seed, as the permutation test takes them."""
    return np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=-1)[None]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 0.5, 1])), min_size=1, max_size=7))
def test_the_permutation_test_counts_every_permutation(both):
    a, b = ([values[side] for values in both] for side in (0, 1))
    observed = abs(sum(b) - sum(a))
    as_large = sum(
        abs(sum(sign * (y - x) for sign, x, y in zip(signs, a, b, strict=True))) >= observed - 1e-9
        for signs in itertools.product([-1, 1], repeat=len(both))
    )
    p = permutation_test(columns(a), columns(b), np.random.default_rng(0))
    assert p == pytest.approx(as_large / 2 ** len(both))


def test_a_random_permutation_test_is_close_to_mcnemar_of_the_same_answers():
    """For one right or wrong answer per question, both tests have the same null hypothesis."""
    rng = np.random.default_rng(5)
    a = (rng.random(300) < 0.5).astype(float)
    b = np.where(rng.random(300) < 0.8, a, (rng.random(300) < 0.75).astype(float))
    exact = mcnemar_test(int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()))
    assert (a != b).sum() > EXACT_LIMIT
    assert 0.001 < exact < 0.2
    assert permutation_test(columns(a), columns(b), np.random.default_rng(0)) == pytest.approx(exact, rel=0.15)


def test_equal_models_are_found_different_as_often_as_the_level_says():
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        hardness = rng.random(60)
        a, b = ((rng.random(60) < hardness).astype(float) for _ in range(2))
        found += mcnemar_test(int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())) <= 0.05
    assert found <= 14  # at most 5 in 100; the exact test errs to the safe side


def test_the_paired_interval_covers_the_true_difference_and_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(1)
    covered, paired, unpaired = 0, 0.0, 0.0
    for _ in range(150):
        hardness = rng.beta(0.5, 0.5, size=120)  # most questions are easy for both or hard for both
        a, b = rng.random(120) < hardness, rng.random(120) < hardness * 0.9 + 0.1
        one, other = greedy(map(bool, a)), greedy(map(bool, b))
        difference = compare(one, other, resamples=200).differences["greedy"]
        covered += difference.low <= 0.05 <= difference.high  # 0.1 x (1 - mean hardness)
        paired += difference.high - difference.low
        unpaired += math.hypot(
            *(e.high - e.low for e in (measure(x, resamples=200).estimates["greedy"] for x in (one, other)))
        )
    assert 134 <= covered <= 149
    assert paired < 0.8 * unpaired


def test_the_difference_is_that_of_the_two_values_for_every_metric():
    rng = np.random.default_rng(2)

    def model(skill):
        return [
            AnsweredQuestion(
                f"q{i:04}",
                response(rng.random() < skill),
                [response(rng.random() < skill, -rng.random(), seed) for seed in (0, 1) for _ in range(4)],
            )
            for i in range(60)
        ]

    weak, strong = model(0.3), model(0.8)
    results = {"weak": measure(weak), "strong": measure(strong)}
    comparison = compare(weak, strong)
    assert comparison.differences.keys() == results["weak"].estimates.keys()
    for name, difference in comparison.differences.items():
        expected = results["strong"].estimates[name].value - results["weak"].estimates[name].value
        assert difference.value == pytest.approx(expected), name
        assert difference.low <= difference.value <= difference.high
    assert comparison.differences["maj@4"].p < 0.001
    assert comparison.differences["assessment"].p > 0.01  # scores are noise on both sides
    back = compare(strong, weak).differences
    assert back["maj@4"].value == pytest.approx(-comparison.differences["maj@4"].value)
    text = results_text(results, None, {"strong": comparison})
    gained = 100 * comparison.differences["greedy"].value
    assert f"{gained:+.1f} [" in text
    assert "p<0.001" in text
    assert "its difference to weak" in " ".join(text.split())


def test_a_model_equals_itself():
    model = [
        AnsweredQuestion(f"q{i}", response(i % 2), [response(i % 3, -i / 9), response(i % 2, -1.0)]) for i in range(9)
    ]
    for difference in compare(model, model).differences.values():
        assert (difference.value, difference.low, difference.high) == (0, 0, 0) or math.isnan(difference.value)
        assert difference.p == 1.0 or math.isnan(difference.value)


def test_only_common_questions_are_compared_and_the_others_counted():
    comparison = compare(greedy([True] * 6), greedy([False] * 3 + [True] * 4, first=3))
    assert (comparison.questions, comparison.only_baseline, comparison.only_other) == (3, 3, 4)
    assert comparison.differences["greedy"].value == -1.0
    assert comparison.differences["greedy"].p == 0.25
    results = {"a": measure(greedy([True] * 6)), "b": measure(greedy([True] * 7))}
    caption = " ".join(results_text(results, None, {"b": comparison}).split())
    assert "the 3 common questions, not on 3 of the baseline alone and 4 of its own" in caption


def test_what_only_one_side_has_of_a_question_is_left_out_on_both():
    one = [AnsweredQuestion("a", response(True)), AnsweredQuestion("b", None, [response(True)])]
    other = [
        AnsweredQuestion("a", response(False), [response(False)]),
        AnsweredQuestion("b", response(True), [response(False)]),
    ]
    comparison = compare(one, other)
    assert comparison.questions == 2
    assert (comparison.differences["greedy"].value, comparison.differences["greedy"].questions) == (-1.0, 1)
    assert (comparison.differences["pass@1"].value, comparison.differences["pass@1"].questions) == (-1.0, 1)


def test_tasks_are_compared_separately():
    one = [*greedy([True, True], task="gsm8k"), *greedy([True, False], first=2, task="ecqa")]
    other = [*greedy([True, True], task="gsm8k"), *greedy([False, False], first=2, task="ecqa")]
    comparison = compare(one, other)
    assert comparison.differences["greedy"].value == -0.25
    assert comparison.tasks["ecqa"].differences["greedy"].value == -0.5
    assert comparison.tasks["gsm8k"].differences["greedy"].value == 0.0
    assert json.loads(json.dumps(comparison.to_json(), allow_nan=False))["tasks"]["ecqa"]["questions"] == 2


def test_questions_are_matched_by_text_if_ids_differ():
    one = greedy([True, False], text="How many? ")
    other = [AnsweredQuestion(f"x{i}", q.greedy, (), "", q.question) for i, q in enumerate(one)]
    assert [(a.id, b.id) for a, b in match_questions(one, other)] == [("q0000", "x0"), ("q0001", "x1")]


def test_other_questions_are_refused():
    with pytest.raises(ConfigError, match="no question in common"):
        compare(greedy([True]), greedy([True], first=7))
    with pytest.raises(ConfigError, match="'q0000' is not the same question for both"):
        compare(greedy([True], text="How many? "), greedy([True], text="How much? "))
