import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.evaluation.answers import AnsweredQuestion, Response
from aft_ray.evaluation.statistics.curves import accuracy_curves, sample_counts
from aft_ray.evaluation.statistics.histograms import BINS, score_histograms
from aft_ray.evaluation.statistics.metrics import measure
from aft_ray.storage.records import Verdict

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED


def sampled(id, pattern, scores=None, seed=0) -> AnsweredQuestion:
    """A question whose samples are right where the pattern has an "r"."""
    scores = scores or [-1.0 - i / 7 for i in range(len(pattern))]
    samples = [
        Response(RIGHT, "4", score, seed) if letter == "r" else Response(WRONG, letter, score, seed)
        for letter, score in zip(pattern, scores, strict=True)
    ]
    return AnsweredQuestion(id, None, samples)


def test_the_numbers_of_samples_double_up_to_k():
    assert [sample_counts(k) for k in (2, 6, 8)] == [[1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("rab", min_size=5, max_size=5), min_size=1, max_size=5))
def test_a_point_is_the_mean_over_all_subsets(patterns):
    """Compares with `measure` of each subset, as if only these samples had been drawn."""
    questions = [sampled(f"q{i}", pattern) for i, pattern in enumerate(patterns)]
    grown = accuracy_curves(questions)
    assert grown.n == [1, 2, 4, 5]
    for place, n in enumerate(grown.n):
        found = []
        for subset in itertools.combinations(range(5), n):
            drawn = [AnsweredQuestion(q.id, None, [q.samples[i] for i in subset]) for q in questions]
            found.append(measure(drawn, resamples=100).estimates)
        for rule in ("maj@n", "best-of-n", "vote@n", "pass@n"):
            expected = np.mean([estimates[rule.replace("n", str(n)) if "@" in rule else f"best-of-{n}"].value
                                for estimates in found])  # fmt: skip
            assert grown.rules[rule][place].value == pytest.approx(expected), (rule, n)


def test_the_last_point_is_the_metric_itself_and_the_first_is_the_same_for_all_rules():
    rng = np.random.default_rng(0)
    questions = [sampled(f"q{i:02}", "".join(rng.choice(list("rrab"), 24)), list(-rng.random(24))) for i in range(40)]
    result, grown = measure(questions), accuracy_curves(questions)
    assert grown.n == [1, 2, 4, 8, 16, 24]
    for rule, name in (("maj@n", "maj@24"), ("best-of-n", "best-of-24"), ("vote@n", "vote@24"), ("pass@n", "pass@24")):
        last, metric = grown.rules[rule][-1], result.estimates[name]
        assert last.value == pytest.approx(metric.value)
        assert (last.low, last.high) == pytest.approx((metric.low, metric.high))
    assert grown.rules["pass@n"][0].value == pytest.approx(result.estimates["pass@1"].value)
    assert len({grown.rules[rule][0].value for rule in ("maj@n", "best-of-n", "vote@n")}) == 1


def test_a_random_choice_of_subsets_is_close_to_all_of_them():
    """pass@n is computed exactly; the other rules use 64 of the 10,626 subsets of 4."""
    rng = np.random.default_rng(1)
    questions = [sampled(f"q{i:03}", "".join(rng.choice(list("rab"), 24)), list(-rng.random(24))) for i in range(200)]
    grown = accuracy_curves(questions)
    assert grown.rules["maj@n"][0].value == pytest.approx(grown.rules["pass@n"][0].value, abs=0.02)


def test_seeds_are_averaged():
    one, two = "rrrr", "aaaa"
    both = AnsweredQuestion("q", None, [*sampled("q", one, seed=1).samples, *sampled("q", two, seed=2).samples])
    grown = accuracy_curves([both])
    assert grown.n == [1, 2, 4]
    assert grown.rules["maj@n"][2].per_seed == (1.0, 0.0)
    assert grown.rules["maj@n"][2].value == 0.5


def test_a_single_sample_makes_no_curve_and_missing_scores_no_curve_by_score():
    assert accuracy_curves([sampled("q", "r")]) is None
    assert accuracy_curves([AnsweredQuestion("q", Response(RIGHT))]) is None
    unscored = AnsweredQuestion("q", None, [Response(RIGHT, "4"), Response(WRONG, "5")])
    assert accuracy_curves([unscored]).rules.keys() == {"maj@n", "pass@n"}


def test_histograms_count_every_decided_sample_once_in_common_bins():
    before = [sampled("a", "rab", [-1.0, -2.0, -3.0]), AnsweredQuestion("b", None, [Response(UNDECIDED, None, -1.5)])]
    after = [sampled("a", "rrb", [-0.1, -0.2, -4.0])]
    counted = score_histograms({"before": before, "after": after, "none": [AnsweredQuestion("c", Response(RIGHT))]})
    assert counted.keys() == {"before", "after"}
    assert counted["before"].edges == counted["after"].edges
    assert len(counted["before"].edges) == BINS + 1
    assert [sum(h.right) for h in counted.values()] == [1, 2]
    assert [sum(h.wrong) for h in counted.values()] == [2, 1]
    assert counted["after"].right[-1] == 1  # the highest score of all
    assert counted["after"].wrong[0] == 1  # the lowest


def test_scores_that_are_all_the_same_have_a_histogram_too():
    (counted,) = score_histograms({"x": [sampled("a", "ra", [-1.0, -1.0])]}).values()
    assert (sum(counted.right), sum(counted.wrong)) == (1, 1)
    assert score_histograms({"x": [AnsweredQuestion("a", None, [Response(RIGHT, "4")])]}) == {}
