import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.evaluation.metrics import (
    Answered,
    Result,
    Sample,
    assessment,
    best_is_right,
    majority_is_right,
    measure,
    normalise,
    pass_at,
    weighted_vote_is_right,
)
from aft_ray.evaluation.table import results_table, results_text

# Few answers and coarse scores, so that ties are common; an answer always has the same verdict.
VERDICTS = {"4": True, "5": False, "6": False, "7": None, None: None}
SCORES = st.sampled_from([-2.0, -1.5, -1.0, -0.5, -0.25])
SAMPLES = st.builds(lambda answer, score: Sample(VERDICTS[answer], answer, score), st.sampled_from([*VERDICTS]), SCORES)


def right(score: float) -> Sample:
    return Sample(True, "4", score)


def wrong(score: float, answer: str = "5") -> Sample:
    return Sample(False, answer, score)


def answered(*samples: Sample, greedy: bool | None = True, id: str = "q") -> Answered:
    return Answered(id, greedy, samples)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one(case):
    n, c, k = case
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@7 cannot be estimated from 6 samples"):
        pass_at(6, 1, 7)


@given(st.lists(SAMPLES, min_size=1, max_size=9))
def test_votes_equal_slow_loops(samples):
    def winner(weights):  # the first answer that no later one beats
        best = None
        for answer in dict.fromkeys(s.answer for s in samples if s.answer is not None):
            if best is None or weights(answer) > weights(best):
                best = answer
        return best

    def count_then_score(answer):
        of = [s.score for s in samples if s.answer == answer]
        return len(of), sum(of)

    assert majority_is_right(samples, str) == (winner(count_then_score) == "4")
    by_weight = winner(lambda a: math.fsum(math.exp(s.score) for s in samples if s.answer == a))
    assert weighted_vote_is_right(samples, str) == (by_weight == "4")

    best = samples[0]
    for sample in samples:
        if sample.score > best.score:
            best = sample
    assert best_is_right(samples) == (best.verdict is True)


@given(st.lists(SAMPLES, max_size=14), st.integers(1, 3))
def test_assessment_equals_a_slow_loop(samples, assessed):
    rights = [s.score for s in samples if s.verdict is True][:assessed]
    wrongs = [s.score for s in samples if s.verdict is False][:assessed]
    if len(rights) < assessed or len(wrongs) < assessed:
        assert assessment(samples, assessed) is None
        return
    points = sum(1.0 if r > w else 0.5 if r == w else 0.0 for r in rights for w in wrongs)
    assert assessment(samples, assessed) == pytest.approx(points / assessed**2)


def test_a_majority_tie_goes_to_the_larger_summed_score_then_to_the_first():
    assert majority_is_right([wrong(-1.0), right(-0.5)], normalise)
    assert not majority_is_right([wrong(-0.5), right(-1.0)], normalise)
    assert not majority_is_right([wrong(-1.0), right(-1.0)], normalise)
    assert majority_is_right([right(-1.0), wrong(-1.0)], normalise)


def test_answers_that_are_the_same_vote_together():
    samples = [Sample(True, "1,000.0", -1.0), Sample(True, "$1000", -1.0), wrong(-0.1), wrong(-0.1, "6")]
    assert majority_is_right(samples, normalise)
    assert not majority_is_right(samples, str)


@pytest.mark.parametrize(
    ("one", "other"),
    [("4", "4.0"), ("1,234", "1234"), (" $7. ", "7"), ("-0", "0"), ("Yes", "yes"), ("0.50", ".5"), ("a  b", "a b")],
)
def test_normalise_joins(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("4", "40"), ("1,2", "12"), ("4", "-4"), ("nan", "4"), ("1e999999999", "1"), ("0e-999999999", "1")],
)
def test_normalise_separates(one, other):
    assert normalise(one) != normalise(other)


def test_the_figures_of_a_small_split():
    result = measure(
        [
            answered(*[right(-0.1)] * 3, *[wrong(-0.2)] * 3, greedy=True, id="a"),
            answered(*[right(-0.4)] * 3, *[wrong(-0.2)] * 3, greedy=False, id="b"),
            answered(*[Sample(None, None, -0.1)] * 6, greedy=None, id="c"),
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


def test_a_figure_that_no_question_qualifies_for_is_a_dash():
    result = measure([answered(*[right(-0.1)] * 6)])
    assert math.isnan(result.estimates["assessment"].value)
    assert result.estimates["assessment"].questions == 0
    assert "–" in results_text({"x": result})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda greedy, samples: answered(*samples, greedy=greedy),
            st.sampled_from([True, False, None]),
            st.lists(SAMPLES, max_size=8),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_answers_give_ordered_intervals_and_survive_json(questions):
    result = measure(questions, resamples=100)
    again = Result.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
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
    estimate = measure([Answered(str(i), v) for i, v in enumerate(verdicts)], seed=3).estimates["greedy"]
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
        questions = [Answered(str(i), bool(v)) for i, v in enumerate(rng.random(100) < 0.7)]
        e = measure(questions, resamples=200).estimates["greedy"]
        covered += e.low <= 0.7 <= e.high
    assert 180 <= covered <= 199


def test_the_table_has_a_column_for_each_model():
    vft = measure([answered(greedy=i < 6, id=str(i)) for i in range(10)])
    aft = measure([answered(*[right(-0.5)] * 6, greedy=None, id="a")])
    text = results_text({"VFT": vft, "AFT": aft}, title="Arithmetic")
    low, high = (100 * bound for bound in (vft.estimates["greedy"].low, vft.estimates["greedy"].high))
    assert f"60.0 [{low:.1f}, {high:.1f}]" in text
    assert "1.65 [1.65, 1.65]" in text
    assert "AFT: 1 undecided" in " ".join(text.split())
    assert [column.header for column in results_table({"VFT": vft, "AFT": aft}).columns] == ["", "VFT", "AFT"]
