"""Which candidate wins, and when sampling may stop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.evaluation.answers import Response
from aft_ray.evaluation.statistics.voting import best_of_n, majority_vote, sample_arrays, weighted_vote
from aft_ray.serving.strategies import Vote, leader_probability, next_wave_size, rank
from aft_ray.storage.records import Verdict

OFFLINE = {"vote": majority_vote, "weighted_vote": weighted_vote, "score": best_of_n}
RANKED = tuple(OFFLINE)

scores = st.floats(-8, 0, allow_nan=False) | st.sampled_from([-0.5, -1.0])  # ties are worth meeting
votes = st.lists(st.tuples(scores, st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=12).map(
    lambda drawn: [Vote(index, score, key) for index, (score, key) in enumerate(drawn)]
)


@given(votes, st.sampled_from(RANKED), st.sampled_from(["a", "b", "c"]))
def test_a_strategy_elects_what_its_rule_elects_in_an_evaluation(cast, strategy, right):
    """As seen by which answers are right: the rules of an evaluation tell only whether the elected one is."""
    responses = [Response(Verdict.RIGHT if vote.key == right else Verdict.WRONG, vote.key, vote.score) for vote in cast]
    everything = np.arange(len(cast))[None, :]
    offline = OFFLINE[strategy](sample_arrays(responses, lambda answer: answer), everything)[0]
    assert (rank(strategy, cast).winner.key == right) == offline


@given(votes, st.sampled_from([*RANKED, "greedy"]), st.randoms(use_true_random=False))
def test_the_order_in_which_candidates_arrive_does_not_matter(cast, strategy, random):
    shuffled = list(cast)
    random.shuffle(shuffled)
    assert rank(strategy, shuffled) == rank(strategy, cast)


@given(votes, st.sampled_from(RANKED))
def test_every_candidate_is_ranked_once_and_shares_are_shares(cast, strategy):
    ranking = rank(strategy, cast)
    assert sorted(vote.index for vote in ranking.order) == [vote.index for vote in cast]
    assert 0 < ranking.agreement <= 1
    assert 0 < ranking.confidence <= 1


@given(votes, votes, st.sampled_from(RANKED))
def test_what_is_certain_no_further_candidate_changes(cast, more, strategy):
    if leader_probability(strategy, cast, len(more)) < 1:
        return
    later = [Vote(len(cast) + vote.index, vote.score, vote.key) for vote in more]
    assert rank(strategy, [*cast, *later]).winner.key == rank(strategy, cast).winner.key


@given(votes, st.sampled_from(RANKED), st.integers(0, 40))
def test_certainty_is_a_probability_that_ends_in_1(cast, strategy, remaining):
    assert 0 <= leader_probability(strategy, cast, remaining) <= 1
    assert leader_probability(strategy, cast, 0) == 1


@given(votes, st.sampled_from(RANKED), st.integers(1, 20), st.floats(0.5, 1))
def test_a_wave_asks_for_something_and_never_for_too_much(cast, strategy, more, stop_confidence):
    n = len(cast) + more
    wave = next_wave_size(strategy, cast, n, stop_confidence)
    assert 1 <= wave <= more
    if stop_confidence == 1:
        assert wave == more


@pytest.mark.parametrize(
    ("strategy", "unanimous"),
    [("vote", [1, 2, 3, 3, 4]), ("weighted_vote", [1, 2, 3, 3, 4]), ("score", [1, 2, 3, 6, 8])],
)
def test_the_first_wave_is_the_smallest_that_could_settle_it(strategy, unanimous):
    assert [next_wave_size(strategy, [], n, 0.95) for n in (1, 2, 4, 8, 16)] == unanimous


@settings(deadline=None, max_examples=20)
@given(st.floats(0.3, 0.95), st.integers(0, 2**32 - 1))
def test_stopping_at_a_confidence_keeps_the_vote_that_often(share, seed):
    """Questions whose answers come by chance with a fixed share: the vote stopped early is that of all 16 nearly as
    often as promised; the two-answer model behind it is the worst case, so there is no question to spare."""
    random = np.random.default_rng(seed)
    kept = 0
    questions = 150
    for _ in range(questions):
        drawn = [Vote(i, -1.0, "a" if random.random() < share else "b") for i in range(16)]
        asked = 0
        while leader_probability("vote", drawn[:asked], 16 - asked) < 0.9:
            asked += next_wave_size("vote", drawn[:asked], 16, 0.9)
        kept += rank("vote", drawn[:asked]).winner.key == rank("vote", drawn).winner.key
    # 0.9 less five standard deviations of a share of 150: the prior is uniform, a share near a half is the hardest.
    assert kept / questions > 0.78


def test_the_answer_given_most_often_is_spoken_for_by_its_best_candidate():
    cast = [Vote(0, -0.1, "b"), Vote(1, -0.9, "a"), Vote(2, -0.5, "a"), Vote(3, -0.2, None)]
    assert [vote.index for vote in rank("vote", cast).order] == [2, 1, 0, 3]
    assert rank("score", cast).winner.index == 0
    assert rank("weighted_vote", cast).winner.index == 2  # e^-0.9 + e^-0.5 > e^-0.1


def test_candidates_without_an_answer_do_not_vote_together():
    cast = [Vote(0, -1.0, None), Vote(1, -1.0, None), Vote(2, -3.0, "a")]
    assert rank("vote", cast).winner.index == 2
    assert rank("vote", cast[:2]).agreement == 0.5
