import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import results_text

from aft_ray.evaluation.answers import AnsweredQuestion, Response
from aft_ray.evaluation.report.table import results_table
from aft_ray.evaluation.statistics.metrics import (
    EvaluationMetrics,
    assessment_accuracy,
    measure,
    pass_at_k,
    right_perplexity,
)
from aft_ray.storage.records import Verdict

# Few answers and coarse scores, so that ties are common; an answer always has the same verdict.
VERDICTS = {"4": Verdict.RIGHT, "5": Verdict.WRONG, "6": Verdict.WRONG, "7": Verdict.UNDECIDED, None: Verdict.UNDECIDED}
SCORES = st.sampled_from([-2.0, -1.5, -1.0, -0.5, -0.25])
SAMPLES = st.builds(
    lambda answer, score: Response(VERDICTS[answer], answer, score), st.sampled_from([*VERDICTS]), SCORES
)
QUESTIONS = st.lists(
    st.builds(
        lambda greedy, samples, task: answered(*samples, greedy=greedy, task=task),
        st.sampled_from([*Verdict]),
        st.lists(SAMPLES, max_size=8),
        st.sampled_from(["gsm8k", "ecqa"]),
    ),
    min_size=1,
    max_size=8,
).map(lambda questions: [replace(question, id=f"q{i}") for i, question in enumerate(questions)])


def right(score: float, seed: int = 0) -> Response:
    return Response(Verdict.RIGHT, "4", score, seed)


def wrong(score: float, answer: str = "5", seed: int = 0) -> Response:
    return Response(Verdict.WRONG, answer, score, seed)


def answered(*samples: Response, greedy: Verdict | bool = True, id: str = "q", task: str = "") -> AnsweredQuestion:
    verdict = greedy if isinstance(greedy, Verdict) else (Verdict.RIGHT if greedy else Verdict.WRONG)
    return AnsweredQuestion(id, Response(verdict), samples, task)


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one(case):
    n, c, k = case
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@7 cannot be estimated from 6 samples"):
        pass_at_k(6, 1, 7)


@settings(deadline=None)
@given(st.lists(SAMPLES, max_size=14), st.integers(1, 3))
def test_assessment_equals_a_slow_loop(samples, assessed):
    rights = [s.score for s in samples if s.verdict is Verdict.RIGHT][:assessed]
    wrongs = [s.score for s in samples if s.verdict is Verdict.WRONG][:assessed]
    if len(rights) < assessed or len(wrongs) < assessed:
        assert assessment_accuracy(samples, assessed) is None
        return
    points = sum(1.0 if r > w else 0.5 if r == w else 0.0 for r in rights for w in wrongs)
    assert assessment_accuracy(samples, assessed) == pytest.approx(points / assessed**2)


def test_the_metrics_of_a_small_split():
    result = measure(
        [
            answered(*[right(-0.1)] * 3, *[wrong(-0.2)] * 3, greedy=True, id="a"),
            answered(*[right(-0.4)] * 3, *[wrong(-0.2)] * 3, greedy=False, id="b"),
            answered(*[Response(Verdict.UNDECIDED, None, -0.1)] * 6, greedy=Verdict.UNDECIDED, id="c"),
            answered(*[right(-0.1)] * 6, greedy=True, id="d"),
        ]
    )
    values = {name: round(e.value, 6) for name, e in result.estimates.items()}
    perplexity = (9 * math.exp(0.1) + 3 * math.exp(0.4)) / 12
    assert values == {
        "greedy": 0.5,
        "pass@1": 0.5,
        "pass@6": 0.75,
        "maj@6": 0.5,  # b ties 3 : 3 and the wrong answer scores higher
        "best-of-6": 0.5,
        "vote@6": 0.5,
        "assessment": 0.5,  # a: 9 of 9, b: 0 of 9
        "perplexity": round(perplexity, 6),
    }
    assert result.estimates["assessment"].questions == 2
    assert result.estimates["perplexity"].questions == 3
    assert (result.undecided_greedy, result.undecided_samples) == (1, 6)


def test_fewer_than_six_samples_are_assessed_in_smaller_sets_and_say_so():
    four = measure([answered(right(-0.1), right(-0.3), wrong(-0.2), wrong(-0.2))])
    assert (four.k, four.assessed) == (4, 2)
    assert four.estimates["assessment"].value == 0.5
    assert "2 right against as many wrong" in " ".join(results_text({"x": four}).split())


def test_without_samples_only_the_greedy_accuracy_is_known():
    result = measure([answered(), answered(greedy=False)])
    assert result.estimates.keys() == {"greedy"}
    with pytest.raises(ValueError, match="no question was answered"):
        measure([])


def test_a_metric_that_no_question_qualifies_for_is_a_dash():
    result = measure([answered(*[right(-0.1)] * 6)])
    assert math.isnan(result.estimates["assessment"].value)
    assert result.estimates["assessment"].questions == 0
    assert "–" in results_text({"x": result})


@settings(max_examples=30, deadline=None)
@given(QUESTIONS)
def test_any_answers_give_ordered_intervals_and_survive_json(questions):
    result = measure(questions, resamples=100)
    again = EvaluationMetrics.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again.to_json() == result.to_json()
    for name, e in result.estimates.items():
        assert math.isnan(e.value) == (e.questions == 0)
        if e.questions:
            assert e.low <= e.high
            assert name == "perplexity" or 0 <= e.low <= e.high <= 1
    assert measure(questions, resamples=100).to_json() == result.to_json()


def test_the_bootstrap_equals_a_slow_one_and_the_normal_approximation():
    rng = np.random.default_rng(7)
    verdicts = [bool(v) for v in rng.random(400) < 0.6]
    estimate = measure([answered(greedy=v, id=f"{i:03}") for i, v in enumerate(verdicts)], seed=3).estimates["greedy"]
    p = np.mean(verdicts)
    assert estimate.value == p
    draws = np.random.default_rng(3)
    slow = [np.mean([verdicts[i] for i in draws.integers(400, size=400)]) for _ in range(1000)]
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]))
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert (estimate.low, estimate.high) == pytest.approx((p - half, p + half), abs=0.008)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        questions = [answered(greedy=bool(v), id=f"{i:03}") for i, v in enumerate(rng.random(100) < 0.7)]
        e = measure(questions, resamples=200).estimates["greedy"]
        covered += e.low <= 0.7 <= e.high
    assert 180 <= covered <= 199


def test_the_table_has_a_column_for_each_model():
    vft = measure([answered(greedy=i < 6, id=str(i)) for i in range(10)])
    aft = measure([answered(*[right(-0.5)] * 6, greedy=Verdict.UNDECIDED, id="a")])
    text = results_text({"VFT": vft, "AFT": aft}, title="Arithmetic")
    low, high = (100 * bound for bound in (vft.estimates["greedy"].low, vft.estimates["greedy"].high))
    assert f"60.0 [{low:.1f}, {high:.1f}]" in text
    assert "1.65 [1.65, 1.65]" in text
    assert "AFT: 1 undecided" in " ".join(text.split())
    assert [column.header for column in results_table({"VFT": vft, "AFT": aft}).columns] == ["", "VFT", "AFT"]


def test_seeds_are_averaged_and_their_spread_is_kept():
    """The majority is right on 1 of 2 questions with the first seed, and on 2 of 2 with the second."""
    result = measure(
        [
            answered(right(-0.1, seed=7), wrong(-0.5, seed=7), right(-0.1, seed=8), right(-0.2, seed=8), id="a"),
            answered(wrong(-0.1, seed=7), wrong(-0.2, seed=7), right(-0.1, seed=8), wrong(-0.2, seed=8), id="b"),
        ]
    )
    assert (result.seeds, result.k) == (2, 2)
    majority = result.estimates["maj@2"]
    assert majority.per_seed == (0.5, 1.0)
    assert majority.value == 0.75
    assert majority.std == pytest.approx(math.sqrt(0.125))
    assert "75.0 ± 35.4" in results_text({"x": result})
    assert result.estimates["greedy"].per_seed == (1.0,)
    assert math.isnan(result.estimates["greedy"].std)


def test_all_seeds_of_a_question_stay_together_in_a_resample():
    """All samples of a question are right or all are wrong, so more seeds must not narrow the interval."""
    verdicts = np.random.default_rng(0).random(100) < 0.5

    def of(seeds):
        return measure(
            [
                answered(*[right(-1.0, s) if v else wrong(-1.0, seed=s) for s in range(seeds)], id=f"{i:03}")
                for i, v in enumerate(verdicts)
            ]
        ).estimates["pass@1"]

    one, five = of(1), of(5)
    assert (five.low, five.high) == pytest.approx((one.low, one.high))
    assert five.std == pytest.approx(0.0, abs=1e-12)


def test_tasks_are_measured_separately_and_have_equal_weight_in_their_mean():
    small = [answered(greedy=False, id=f"e{i}", task="ecqa") for i in range(2)]
    large = [answered(right(-0.1), greedy=i < 6, id=f"g{i}", task="gsm8k") for i in range(8)]
    result = measure([*large, *small])
    assert result.estimates["greedy"].value == 0.6
    assert result.tasks["gsm8k"].estimates["greedy"].value == 0.75
    assert result.tasks["gsm8k"].questions == 8
    assert result.tasks["ecqa"].estimates["greedy"].value == 0.0
    assert result.macro["greedy"].value == 0.375
    assert result.macro["greedy"].low <= 0.375 <= result.macro["greedy"].high
    assert math.isnan(result.macro["pass@1"].value)  # ecqa has no samples
    values = result.flat_values()
    assert (values["greedy"], values["gsm8k/greedy"], values["ecqa/greedy"]) == (0.6, 0.75, 0.0)
    assert values["ecqa/pass_1"] is None
    text = results_text({"x": result})
    assert "mean over the tasks" in text
    assert "gsm8k (8 questions)" in text


def test_one_task_has_no_section_of_its_own():
    result = measure([answered(task="gsm8k")])
    assert (result.tasks, result.macro) == ({}, {})


def test_without_scores_the_metrics_that_need_them_are_absent():
    samples = [replace(right(0.0), score=None), replace(wrong(0.0), score=None), right(-0.1)]
    result = measure([answered(*samples)])
    assert result.estimates.keys() == {"greedy", "pass@1", "pass@3", "maj@3"}
    assert result.estimates["maj@3"].value == 1.0


def test_fewer_samples_can_be_asked_for_but_not_more():
    questions = [answered(*[wrong(-0.1)] * 4, *[right(-0.1)] * 4)]
    four = measure(questions, k=4)
    assert (four.k, four.estimates["maj@4"].value) == (4, 0.0)
    assert four.estimates["pass@4"].value == pass_at_k(8, 4, 4)  # all eight samples are used
    assert measure(questions, k=100).k == 8


@settings(max_examples=30, deadline=None)
@given(QUESTIONS, st.randoms(use_true_random=False))
def test_the_order_of_the_questions_does_not_matter(questions, random):
    shuffled = random.sample(questions, len(questions))
    assert measure(shuffled, resamples=100).to_json() == measure(questions, resamples=100).to_json()


@settings(max_examples=30, deadline=None)
@given(QUESTIONS)
def test_what_the_answers_are_called_does_not_matter(questions):
    names = {"4": "four", "5": "five", "6": "six", "7": "seven", None: None}
    renamed = [
        replace(question, samples=[replace(sample, answer=names[sample.answer]) for sample in question.samples])
        for question in questions
    ]
    assert measure(renamed, resamples=100).to_json() == measure(questions, resamples=100).to_json()


def test_the_perplexity_is_that_of_right_samples_alone():
    assert right_perplexity([right(-0.5), wrong(-9.0), right(-1.0)]) == pytest.approx((math.exp(0.5) + math.exp(1), 2))
