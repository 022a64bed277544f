import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.evaluation.answers import Response
from aft_ray.evaluation.statistics.curves import subsets
from aft_ray.evaluation.statistics.voting import best_of_n, majority_vote, sample_arrays, weighted_vote
from aft_ray.storage.records import Verdict
from aft_ray.verify.answers.canonical import normalise

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED
VERDICTS = {"4": RIGHT, "5": WRONG, "6": WRONG, "7": UNDECIDED, None: UNDECIDED}
SAMPLES = st.builds(
    lambda answer, score: Response(VERDICTS[answer], answer, score),
    st.sampled_from([*VERDICTS]),
    st.sampled_from([-2.0, -1.5, -1.0, -0.5, -0.25]),
)


def one(rule, samples, canonical=normalise) -> bool:
    (outcome,) = rule(sample_arrays(samples, canonical), np.arange(len(samples))[None])
    return bool(outcome)


def slow(samples, weights) -> bool:
    """Whether the first answer that no later one beats is right."""
    winner = None
    for answer in dict.fromkeys(s.answer for s in samples if s.answer is not None):
        if winner is None or weights(samples, answer) > weights(samples, winner):
            winner = answer
    return winner == "4"


def count_then_score(samples, answer):
    of = [s.score for s in samples if s.answer == answer]
    return len(of), sum(of)


def sum_of_probabilities(samples, answer):
    return round(math.fsum(math.exp(s.score) for s in samples if s.answer == answer), 12)


def slow_best(samples) -> bool:
    chosen = samples[0]
    for sample in samples:
        if sample.score > chosen.score:
            chosen = sample
    return chosen.right


@settings(deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=6), st.data())
def test_every_subset_agrees_with_slow_loops(samples, data):
    n = data.draw(st.integers(1, len(samples)))
    every = list(itertools.combinations(range(len(samples)), n))
    arrays, chosen = sample_arrays(samples, str), np.array(every)
    for subset, by_count, by_weight, by_score in zip(
        every, majority_vote(arrays, chosen), weighted_vote(arrays, chosen), best_of_n(arrays, chosen), strict=True
    ):
        drawn = [samples[i] for i in subset]
        assert by_count == slow(drawn, count_then_score)
        assert by_weight == slow(drawn, sum_of_probabilities)
        assert by_score == slow_best(drawn)


def test_a_majority_tie_goes_to_the_larger_summed_score_then_to_the_first():
    def right(score):
        return Response(RIGHT, "4", score)

    def wrong(score):
        return Response(WRONG, "5", score)

    assert one(majority_vote, [wrong(-1.0), right(-0.5)])
    assert not one(majority_vote, [wrong(-0.5), right(-1.0)])
    assert not one(majority_vote, [wrong(-1.0), right(-1.0)])
    assert one(majority_vote, [right(-1.0), wrong(-1.0)])
    # Without scores, to the first at once.
    assert not one(majority_vote, [wrong(None), right(None)])


def test_answers_that_are_the_same_vote_together():
    samples = [Response(RIGHT, "1,000.0", -1.0), Response(RIGHT, "$1000", -1.0)]
    samples += [Response(WRONG, "5", -0.1), Response(WRONG, "6", -0.1)]
    assert one(majority_vote, samples)
    assert not one(majority_vote, samples, str)


def test_a_missing_response_neither_votes_nor_is_chosen():
    missing = Response(UNDECIDED, None, -math.inf, 0, "", 0)
    right = Response(RIGHT, "4", -3.0)
    for rule in (majority_vote, weighted_vote, best_of_n):
        assert one(rule, [missing, missing, right])
        assert not one(rule, [missing])


def test_subsets_are_all_there_are_or_a_seeded_draw_of_distinct_samples():
    assert subsets(4, 2).tolist() == [list(pair) for pair in itertools.combinations(range(4), 2)]
    assert subsets(6, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    drawn = subsets(32, 8)
    assert drawn.shape == (64, 8)
    assert (np.diff(drawn, axis=1) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < 32
    assert (drawn == subsets(32, 8)).all()
    assert (drawn != subsets(32, 8, seed=1)).any()
