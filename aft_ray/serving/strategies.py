"""Which candidate answers, and when further candidates cannot matter.

Invariant: over the same candidates a strategy elects what the rule of the same name elects in an evaluation
(`aft_ray.evaluation.statistics.voting`): equal answers count as one, ties go to the larger sum of scores, then to the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.config.serve import Strategy


@dataclass(frozen=True, slots=True)
class Vote:
    """What of a candidate decides. key: equal for equal answers, None for a candidate that gives none."""

    index: int
    score: float
    key: str | None

    @property
    def weight(self) -> float:
        """exp(score): the geometric mean probability of its tokens."""
        return math.exp(self.score)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The candidates best first, and how far they speak for the first.

    agreement: votes of the first one's answer / candidates.
    confidence: the same with what the strategy counts: votes, or weights; of a single candidate its own weight.
    """

    order: tuple[Vote, ...]
    agreement: float
    confidence: float

    @property
    def winner(self) -> Vote:
        return self.order[0]


def rank(strategy: Strategy, votes: Sequence[Vote]) -> Ranking:
    """Needs at least one candidate."""
    parties = _parties(votes)
    if strategy in ("vote", "weighted_vote"):
        tallies = {key: _tally(strategy, party) for key, party in parties.items()}
        # A candidate without an answer stands for nothing but itself, after all that give one.
        none: tuple[float, ...] = (-1.0, 0.0, 0.0)
        ordered = sorted(votes, key=lambda vote: (tallies.get(vote.key, none), vote.score, -vote.index), reverse=True)
    else:
        ordered = sorted(votes, key=lambda vote: (-vote.score, vote.index))
    party = parties.get(ordered[0].key, [ordered[0]])
    if len(votes) == 1:
        confidence = ordered[0].weight
    elif strategy == "vote":
        confidence = len(party) / len(votes)
    else:
        confidence = _weight(party) / _weight(votes)
    return Ranking(tuple(ordered), len(party) / len(votes), confidence)


def certainty(strategy: Strategy, votes: Sequence[Vote], remaining: int) -> float:
    """How probable it is that the answer that leads now leads after `remaining` more candidates; 1: it must.

    Votes: the remaining ones are taken to go to the first two answers, by a share with a Beta(v1 + 1, v2 + 1)
    distribution (cf. Adaptive-Consistency, arXiv 2305.11860), which is the worst case for the leader; a remaining one
    weighs as the mean so far. Score: each of all candidates is equally likely to be the best, and a new best has
    another answer as often as by the rule of succession.
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
    parties = sorted(_parties(votes).values(), key=lambda party: _tally(strategy, party), reverse=True)
    if not parties:
        return 0.0
    first, second = parties[0], parties[1] if len(parties) > 1 else []
    if strategy == "vote":
        lead, heaviest, typical = float(len(first) - len(second)), 1.0, 1.0
    else:
        lead = _weight(first) - _weight(second)
        # No score is above 0, so no weight is above 1.
        heaviest, typical = 1.0, _weight(votes) / len(votes)
    if lead > remaining * heaviest:
        return 1.0
    stays = [won for won in range(remaining + 1) if lead + (2 * won - remaining) * typical > 0]
    probability = sum(_beta_binomial(won, remaining, len(first) + 1, len(second) + 1) for won in stays)
    return min(probability, math.nextafter(1.0, 0.0))


def next_wave(strategy: Strategy, votes: Sequence[Vote], n: int, stop_confidence: float) -> int:
    """How many candidates to sample next: the fewest after which sampling could stop, if all of them agreed.

    With stop_confidence 1 all at once: then only candidates that are still running can be saved.
    """
    remaining = n - len(votes)
    if stop_confidence >= 1:
        return remaining
    leader = rank(strategy, votes).winner if votes else None
    key = leader.key if leader is not None and leader.key is not None else "any"
    score = sum(vote.score for vote in votes) / len(votes) if votes else 0.0
    imagined = list(votes)
    for more in range(1, remaining):
        imagined.append(Vote(n + more, score, key))
        if certainty(strategy, imagined, remaining - more) >= stop_confidence:
            return more
    return remaining


def _parties(votes: Sequence[Vote]) -> dict[str | None, list[Vote]]:
    """The candidates that give an answer, by answer, in order of the answers' first mention."""
    parties: dict[str | None, list[Vote]] = {}
    for vote in sorted(votes, key=lambda vote: vote.index):
        if vote.key is not None:
            parties.setdefault(vote.key, []).append(vote)
    return parties


def _tally(strategy: Strategy, party: Sequence[Vote]) -> tuple[float, ...]:
    """What answers are compared by, the greatest first; rounded, so that the order of a sum cannot break a tie."""
    first = -min(vote.index for vote in party)
    if strategy == "vote":
        return len(party), round(math.fsum(vote.score for vote in party), 12), first
    return round(_weight(party), 12), first, 0.0


def _weight(votes: Sequence[Vote]) -> float:
    """The same whatever the order of the candidates."""
    return math.fsum(vote.weight for vote in votes)


def _beta_binomial(won: int, draws: int, a: int, b: int) -> float:
    """Probability of `won` successes in `draws`, when the share of successes is Beta(a, b)."""
    return math.comb(draws, won) * math.exp(_log_beta(won + a, draws - won + b) - _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
