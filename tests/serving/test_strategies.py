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

scores = st.floats(-8, 0, allow_nan=False) | st.sampled_from([-0.5, -1.0])  # makes ties likely
votes = st.lists(st.tuples(scores, st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=12).map(
    lambda drawn: [Vote(index, score, key) for index, (score, key) in enumerate(drawn)]
)


@given(votes, st.sampled_from(RANKED), st.sampled_from(["a", "b", "c"]))
def test_a_strategy_chooses_what_its_rule_chooses_in_an_evaluation(candidates, strategy, right):
    """Compared by whether the chosen answer is right, since the rules of an evaluation return only that."""
    responses = [
        Response(Verdict.RIGHT if vote.key == right else Verdict.WRONG, vote.key, vote.score) for vote in candidates
    ]
    everything = np.arange(len(candidates))[None, :]
    offline = OFFLINE[strategy](sample_arrays(responses, lambda answer: answer), everything)[0]
    assert (rank(strategy, candidates).winner.key == right) == offline


@given(votes, st.sampled_from([*RANKED, "greedy"]), st.randoms(use_true_random=False))
def test_the_order_in_which_candidates_arrive_does_not_matter(candidates, strategy, random):
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert rank(strategy, shuffled) == rank(strategy, candidates)


@given(votes, st.sampled_from(RANKED))
def test_every_candidate_is_ranked_once_and_shares_are_shares(candidates, strategy):
    ranking = rank(strategy, candidates)
    assert sorted(vote.index for vote in ranking.order) == [vote.index for vote in candidates]
    assert 0 < ranking.agreement <= 1
    assert 0 < ranking.confidence <= 1


@given(votes, votes, st.sampled_from(RANKED))
def test_what_is_certain_no_further_candidate_changes(candidates, more, strategy):
    if leader_probability(strategy, candidates, len(more)) < 1:
        return
    later = [Vote(len(candidates) + vote.index, vote.score, vote.key) for vote in more]
    assert rank(strategy, [*candidates, *later]).winner.key == rank(strategy, candidates).winner.key


@given(votes, st.sampled_from(RANKED), st.integers(0, 40))
def test_the_leader_probability_ends_in_1(candidates, strategy, remaining):
    assert 0 <= leader_probability(strategy, candidates, remaining) <= 1
    assert leader_probability(strategy, candidates, 0) == 1


@given(votes, st.sampled_from(RANKED), st.integers(1, 20), st.floats(0.5, 1))
def test_a_wave_has_at_least_one_candidate_and_never_more_than_remain(candidates, strategy, more, stop_confidence):
    n = len(candidates) + more
    wave = next_wave_size(strategy, candidates, n, stop_confidence)
    assert 1 <= wave <= more
    if stop_confidence == 1:
        assert wave == more


@pytest.mark.parametrize(
    ("strategy", "unanimous"),
    [("vote", [1, 2, 3, 3, 4]), ("weighted_vote", [1, 2, 3, 3, 4]), ("score", [1, 2, 3, 6, 8])],
)
def test_the_first_wave_is_the_smallest_after_which_sampling_could_stop(strategy, unanimous):
    assert [next_wave_size(strategy, [], n, 0.95) for n in (1, 2, 4, 8, 16)] == unanimous


@settings(deadline=None, max_examples=20)
@given(st.floats(0.3, 0.95), st.integers(0, 2**32 - 1))
def test_stopping_at_a_confidence_keeps_the_vote_that_often(share, seed):
    """The answers are random, with a fixed probability of each. A vote that stops early has the winner of all 16 votes
    nearly as often as promised, although two answers are the worst case for the leader."""
    random = np.random.default_rng(seed)
    kept = 0
    questions = 150
    for _ in range(questions):
        drawn = [Vote(i, -1.0, "a" if random.random() < share else "b") for i in range(16)]
        asked = 0
        while leader_probability("vote", drawn[:asked], 16 - asked) < 0.9:
            asked += next_wave_size("vote", drawn[:asked], 16, 0.9)
        kept += rank("vote", drawn[:asked]).winner.key == rank("vote", drawn).winner.key
    # 0.9 less five standard deviations of a share of 150 questions, since a probability near a half is the hardest.
    assert kept / questions > 0.78


def test_the_answer_given_most_often_is_represented_by_its_best_candidate():
    candidates = [Vote(0, -0.1, "b"), Vote(1, -0.9, "a"), Vote(2, -0.5, "a"), Vote(3, -0.2, None)]
    assert [vote.index for vote in rank("vote", candidates).order] == [2, 1, 0, 3]
    assert rank("score", candidates).winner.index == 0
    assert rank("weighted_vote", candidates).winner.index == 2  # e^-0.9 + e^-0.5 > e^-0.1


def test_candidates_without_an_answer_do_not_vote_together():
    candidates = [Vote(0, -1.0, None), Vote(1, -1.0, None), Vote(2, -3.0, "a")]
    assert rank("vote", candidates).winner.index == 2
    assert rank("vote", candidates[:2]).agreement == 0.5
