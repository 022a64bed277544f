"""Strategies: which candidate wins, and how probable it is that further candidates would not change the answer.

Invariant: among the same candidates, a strategy chooses the answer that the rule of the same name chooses in an
evaluation (`aft_ray.evaluation.statistics.voting`): equal answers are counted together, a tie goes to the larger sum of
scores, and then to the answer that appeared first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.serve import Strategy


@dataclass(frozen=True, slots=True)
class Vote:
    """What a candidate contributes to the choice of the answer.

    Attributes:
        index: number of the candidate.
        score: mean log-probability of its tokens, nats per token.
        key: canonical form of its answer, equal for equal answers; None if it gives no answer.
    """

    index: int
    score: float
    key: str | None

    @property
    def weight(self) -> float:
        """exp(score): the geometric mean of the probabilities of the candidate's tokens, at most 1."""
        return math.exp(self.score)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The ranked candidates of a question.

    Attributes:
        order: the candidates, best first.
        agreement: share of the candidates that give the first one's answer.
        confidence: the same share counted as the strategy counts, by votes or by weights; the weight of the candidate
            if there is only one.
    """

    order: tuple[Vote, ...]
    agreement: float
    confidence: float

    @property
    def winner(self) -> Vote:
        return self.order[0]


def rank(strategy: Strategy, votes: Sequence[Vote]) -> Ranking:
    """Returns the ranking of one or more candidates. It does not depend on the order of `votes`."""
    by_answer = _by_answer(votes)
    if strategy in ("vote", "weighted_vote"):
        tallies = {key: _tally(strategy, same) for key, same in by_answer.items()}
        # Candidates without an answer are ranked last, and are not counted together.
        no_answer: tuple[float, ...] = (-1.0, 0.0, 0.0)
        ordered = sorted(
            votes, key=lambda vote: (tallies.get(vote.key, no_answer), vote.score, -vote.index), reverse=True
        )
    else:
        ordered = sorted(votes, key=lambda vote: (-vote.score, vote.index))
    same_answer = by_answer.get(ordered[0].key, [ordered[0]])
    if len(votes) == 1:
        confidence = ordered[0].weight
    elif strategy == "vote":
        confidence = len(same_answer) / len(votes)
    else:
        confidence = _total_weight(same_answer) / _total_weight(votes)
    return Ranking(tuple(ordered), len(same_answer) / len(votes), confidence)


def leader_probability(strategy: Strategy, votes: Sequence[Vote], remaining: int) -> float:
    """Returns the probability that the answer that leads now still leads after `remaining` more candidates.

    It is 1 only if no further candidates could change the answer.

    vote and weighted_vote: the remaining candidates are assumed to vote for the two leading answers only, which is the
    worst case for the leader. With v1 and v2 votes so far, the leader's share of them has the distribution
    Beta(v1 + 1, v2 + 1), as in Adaptive-Consistency (arXiv 2305.11860). Each weighs as much as the mean vote so far.

    score: each candidate is equally likely to have the best score of all. A new best candidate has another answer than
    the leader's with the probability that Laplace's rule of succession gives.
    """
    if remaining == 0:
        return 1.0
    if not votes:
        return 0.0
    if strategy in ("score", "greedy"):
        best = rank(strategy, votes).winner
        agreeing = 0 if best.key is None else sum(vote.key == best.key for vote in votes)
        other_answer = 1 - (agreeing + 1) / (len(votes) + 2)
        return 1 - remaining / (len(votes) + remaining) * other_answer
    answers = sorted(_by_answer(votes).values(), key=lambda same: _tally(strategy, same), reverse=True)
    if not answers:
        return 0.0
    first, second = answers[0], answers[1] if len(answers) > 1 else []
    if strategy == "vote":
        lead, max_weight, mean_weight = float(len(first) - len(second)), 1.0, 1.0
    else:
        lead = _total_weight(first) - _total_weight(second)
        # No score is above 0, so that no weight is above 1.
        max_weight, mean_weight = 1.0, _total_weight(votes) / len(votes)
    if lead > remaining * max_weight:
        return 1.0
    sufficient = [won for won in range(remaining + 1) if lead + (2 * won - remaining) * mean_weight > 0]
    probability = sum(_beta_binomial(won, remaining, len(first) + 1, len(second) + 1) for won in sufficient)
    return min(probability, math.nextafter(1.0, 0.0))


def next_wave_size(strategy: Strategy, votes: Sequence[Vote], n: int, stop_confidence: float) -> int:
    """Returns the fewest further candidates after which sampling could stop, if all of them agreed with the leader.

    With stop_confidence 1 it returns all that remain of the n; those that still run are ended when the answer is
    certain.
    """
    remaining = n - len(votes)
    if stop_confidence >= 1:
        return remaining
    leader = rank(strategy, votes).winner if votes else None
    key = leader.key if leader is not None and leader.key is not None else "any"
    score = sum(vote.score for vote in votes) / len(votes) if votes else 0.0
    assumed = list(votes)
    for more in range(1, remaining):
        assumed.append(Vote(n + more, score, key))
        if leader_probability(strategy, assumed, remaining - more) >= stop_confidence:
            return more
    return remaining


def _by_answer(votes: Sequence[Vote]) -> dict[str | None, list[Vote]]:
    """Returns the votes of each answer, in the order in which the answers first appeared."""
    by_answer: dict[str | None, list[Vote]] = {}
    for vote in sorted(votes, key=lambda vote: vote.index):
        if vote.key is not None:
            by_answer.setdefault(vote.key, []).append(vote)
    return by_answer


def _tally(strategy: Strategy, same_answer: Sequence[Vote]) -> tuple[float, ...]:
    """Returns the sort key of an answer; the largest wins. Sums are rounded, so that their order cannot break a tie."""
    first = -min(vote.index for vote in same_answer)
    if strategy == "vote":
        return len(same_answer), round(math.fsum(vote.score for vote in same_answer), 12), first
    return round(_total_weight(same_answer), 12), first, 0.0


def _total_weight(votes: Sequence[Vote]) -> float:
    """Returns the exact sum of the weights, which does not depend on the order of the votes."""
    return math.fsum(vote.weight for vote in votes)


def _beta_binomial(won: int, draws: int, a: int, b: int) -> float:
    """Returns the probability of `won` successes in `draws` when the success rate is Beta(a, b) distributed."""
    return math.comb(draws, won) * math.exp(_log_beta(won + a, draws - won + b) - _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
