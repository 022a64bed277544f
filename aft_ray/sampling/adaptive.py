"""The decisions of `sampling.adaptive`: how many candidates a question gets, and which questions a round leaves out.

A ranking loss learns only from a group with right and wrong candidates. So a question gets few candidates first, and
more only while all verdicts on them are the same; and a question to which every answer was right several rounds in a
row is asked in some rounds only.

Invariant: the functions are pure. What they decide about a question depends on its own candidates, its own results in
earlier rounds, the run's seed and the config alone, so it does not depend on what was interrupted or which sampler
answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from aft_ray.config.sections import AdaptiveConfig
from aft_ray.storage.records import Candidate, Verdict


def needs_more(candidates: Iterable[Candidate]) -> bool:
    """Whether the labelled candidates lack a right or a wrong one. Undecided ones count as neither.

    With graded feedback too the verdicts decide, because rewards are known only after all candidates of a group.
    """
    verdicts = {candidate.verdict for candidate in candidates}
    return not {Verdict.RIGHT, Verdict.WRONG} <= verdicts


def next_candidates(count: int, most: int, step: int) -> int:
    """How many candidates a question with `count` of them gets next if it needs more; 0: it has as many as it may get.

    Args:
        most: `sampling.k`.
        step: `sampling.adaptive.step`.
    """
    return max(0, min(step, most - count))


def all_right(right: int, decided: int) -> bool:
    """Whether a question was answered right in a round by every candidate on which there is a verdict."""
    return 0 < decided == right


def streaks(
    rounds: Iterable[Iterable[tuple[str, bool]]], question_ids: Collection[str], longest: int
) -> dict[str, int]:
    """For each question: in how many of the latest rounds that asked it every answer was right.

    Args:
        rounds: the questions that earlier rounds asked, each with what `all_right` says of it; the latest round first.
            If a round did not ask a question, its streak goes on in the round before. No more rounds are taken than
            are needed.
        longest: where counting ends.

    Returns:
        The streaks of at least 1.
    """
    found: dict[str, int] = {}
    unfinished = set(question_ids)
    for results in rounds:
        for id, is_right in results:
            if id not in unfinished:
                continue
            if is_right:
                found[id] = found.get(id, 0) + 1
            if not is_right or found[id] == longest:
                unfinished.discard(id)
        if not unfinished:
            break
    return found


def ask_probability(length: int, adaptive: AdaptiveConfig) -> float:
    """The probability with which a round asks a question that has a streak of this length.

    It is 1 for a streak below `skip_after`, `ask_probability` at `skip_after`, and falls by that factor with each
    further round of the streak, but not below `min_ask_probability`.
    """
    if not adaptive.skip_after or length < adaptive.skip_after:
        return 1.0
    decayed = adaptive.ask_probability ** (length - adaptive.skip_after + 1)
    return max(adaptive.min_ask_probability, decayed)


def longest_streak(adaptive: AdaptiveConfig) -> int:
    """The streak from which on a longer one does not lower the probability of asking."""
    length = adaptive.skip_after
    while ask_probability(length, adaptive) > adaptive.min_ask_probability:
        length += 1
    return length


def questions_to_skip(
    question_ids: Sequence[str],
    lengths: Mapping[str, int],
    adaptive: AdaptiveConfig,
    seed: int,
    round_number: int,
    least: int,
) -> list[str]:
    """The questions that a round leaves out, sorted by id.

    Every question draws a number between 0 and 1 from the seed, the round and its id, and is asked if the number is
    below its probability. If fewer than `least` would be asked, those that missed it least are asked too, so that a
    round is never without a step to train.

    Args:
        question_ids: all questions of the round.
        lengths: the streaks of those that have one.
        least: the fewest questions that the round asks; all, if it has fewer.
    """
    missed = []
    for id in question_ids:
        excess = _draw(seed, round_number, id) - ask_probability(lengths.get(id, 0), adaptive)
        if excess >= 0:
            missed.append((excess, id))
    missed.sort()
    spare = max(0, least - (len(question_ids) - len(missed)))
    return sorted(id for _, id in missed[spare:])


def _draw(seed: int, round_number: int, question_id: str) -> float:
    """A number from 0 up to but not including 1."""
    digest = hashlib.sha256(f"{seed}/ask in round {round_number}/{question_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
