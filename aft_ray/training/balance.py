"""Spreads what an optimiser step computes over forward passes of equal work.

The work of a pass is its tokens and the pairs of tokens that attend to each other. A model of hidden size h with L
layers has about 12 h² weights in each, so a token takes 24 h² L floating-point operations of matrix products, and a
pair 4 h L of attention (the product of query and key, and the weighted value): 6 h pairs are worth one token. This is
the count of arXiv 2001.08361, table 1. Here h is 4,096, the width of a model of 7 billion parameters; at the lengths of
grade-school mathematics the second term is a few per cent for any width.

Invariants: no pass has more tokens than its capacity; everything is computed in whole numbers, so that all ranks get
the same result on different processors.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_PAIRS_OF_A_TOKEN = 6 * 4096
# The heaviest pass is good enough when its work exceeds the mean by this share.
_GOOD = 0.005


@dataclass(frozen=True, slots=True)
class Load:
    """What one group, or one piece of it, adds to a pass.

    Attributes:
        tokens: tokens that are computed if prompts are shared.
        rows, longest: responses, and the tokens of the longest one with its prompt, if each response has a row.
        work: in units of one pair of tokens.
    """

    tokens: int
    rows: int
    longest: int
    work: int


# Loads, passes, capacity -> for each pass the indexes of its loads; None if they do not fit. No pass is empty if there
# are at least as many loads as passes.
Spread = Callable[[Sequence[Load], int, int], list[list[int]] | None]


def load_of(prompt: int, responses: Sequence[int]) -> Load:
    """The load of a prompt with some of its responses. The last token of a response is predicted and not computed.

    Args:
        prompt: tokens; zero for responses that join a prompt which is counted already.
        responses: tokens of each.
    """
    inputs = [response - 1 for response in responses]
    tokens = prompt + sum(inputs)
    pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in inputs)
    return Load(tokens, len(inputs), prompt + max(inputs), tokens * _PAIRS_OF_A_TOKEN + pairs)


def packed_tokens(loads: Sequence[Load]) -> int:
    """Tokens of a pass in which every prompt is computed once."""
    return sum(load.tokens for load in loads)


def padded_tokens(loads: Sequence[Load]) -> int:
    """Tokens of a pass in which every response has a row, all as long as the longest."""
    return sum(load.rows for load in loads) * max((load.longest for load in loads), default=0)


def spread_packed(loads: Sequence[Load], passes: int, capacity: int) -> list[list[int]] | None:
    """A `Spread` for passes in which every prompt is computed once.

    The heaviest first, each to the lightest pass that has room; where that finds no place for a load, the longest
    first, each to the fullest pass that has room. Then the heaviest pass gives loads away as long as that helps.
    """
    if sum(load.tokens for load in loads) > passes * capacity:
        return None
    by_work = sorted(range(len(loads)), key=lambda i: (-loads[i].work, i))
    by_tokens = sorted(range(len(loads)), key=lambda i: (-loads[i].tokens, i))
    members = _to_the_lightest(loads, by_work, passes, capacity) or _to_the_fullest(loads, by_tokens, passes, capacity)
    return _improved(loads, members, capacity) if members is not None else None


def spread_padded(loads: Sequence[Load], passes: int, capacity: int) -> list[list[int]] | None:
    """A `Spread` for passes in which every response has a row: loads of similar length share a pass.

    The sorted loads are cut into runs, with the smallest capacity that leaves no more runs than passes.
    """
    order = sorted(range(len(loads)), key=lambda i: (-loads[i].longest, i))

    def runs(limit: int) -> list[list[int]]:
        cut: list[list[int]] = []
        rows = longest = 0
        for i in order:
            rows += loads[i].rows
            if not cut or rows * longest > limit:
                cut.append([])
                rows, longest = loads[i].rows, loads[i].longest
            cut[-1].append(i)
        return cut

    if len(runs(capacity)) > passes or any(padded_tokens([load]) > capacity for load in loads):
        return None
    low, high = max((padded_tokens([load]) for load in loads), default=0), capacity
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= passes else (middle + 1, high)
    members = runs(high)
    while len(members) < min(passes, len(loads)):
        largest = max((run for run in members if len(run) > 1), key=lambda run: padded_tokens([loads[i] for i in run]))
        members.append(largest[len(largest) // 2 :])
        del largest[len(largest) // 2 :]
    return members + [[] for _ in range(passes - len(members))]


def _to_the_lightest(loads: Sequence[Load], order: Sequence[int], passes: int, capacity: int) -> list[list[int]] | None:
    """Each load to the pass with the least work among those that have room."""
    members: list[list[int]] = [[] for _ in range(passes)]
    tokens = [0] * passes
    lightest = [(0, number) for number in range(passes)]
    for i in order:
        full = []
        while lightest and tokens[lightest[0][1]] + loads[i].tokens > capacity:
            full.append(heapq.heappop(lightest))
        if not lightest:
            return None
        work, number = lightest[0]
        heapq.heapreplace(lightest, (work + loads[i].work, number))
        members[number].append(i)
        tokens[number] += loads[i].tokens
        for one in full:
            heapq.heappush(lightest, one)
    return members


def _to_the_fullest(loads: Sequence[Load], order: Sequence[int], passes: int, capacity: int) -> list[list[int]] | None:
    """Each load to the pass with the most tokens among those that have room; an empty pass then takes one from it."""
    members: list[list[int]] = [[] for _ in range(passes)]
    room = [capacity] * passes
    for i in order:
        fitting = [number for number in range(passes) if room[number] >= loads[i].tokens]
        if not fitting:
            return None
        number = min(fitting, key=lambda one: (room[one], one))
        members[number].append(i)
        room[number] -= loads[i].tokens
    for empty in (number for number in range(passes) if not members[number]):
        longest = max(range(passes), key=lambda number: (len(members[number]), -number))
        if len(members[longest]) > 1:
            members[empty].append(members[longest].pop())
    return members


def _improved(loads: Sequence[Load], members: list[list[int]], capacity: int) -> list[list[int]]:
    """The passes after the heaviest has moved a load to another pass, or exchanged one, as long as that helps.

    A pass that cannot be helped is left as it is, and the next heaviest follows.
    """
    passes = len(members)
    # Behind the loads each pass has one of zero, whose exchange for a load is the move of the load into the pass.
    work = np.array([load.work for load in loads] + [0] * passes, dtype=np.int64)
    tokens = np.array([load.tokens for load in loads] + [0] * passes, dtype=np.int64)
    place = np.empty(len(loads) + passes, dtype=np.int64)
    for number, one in enumerate(members):
        place[one] = number
    place[len(loads) :] = np.arange(passes)
    total, used = (np.zeros(passes, dtype=np.int64) for _ in range(2))
    np.add.at(total, place, work)
    np.add.at(used, place, tokens)
    movable = np.ones(passes, dtype=bool)
    while movable.sum() > 1:
        heaviest = int(np.argmax(np.where(movable, total, -1)))
        if float(total[heaviest]) <= (1 + _GOOD) * float(total[movable].sum()) / int(movable.sum()):
            break
        own = np.flatnonzero(place[: len(loads)] == heaviest)
        others = np.flatnonzero(movable[place] & (place != heaviest))
        to = place[others]
        less = work[own][:, None] - work[others]
        fewer = tokens[own][:, None] - tokens[others]
        worst = np.maximum(total[heaviest] - less, total[to] + less)
        fits = (used[heaviest] - fewer <= capacity) & (used[to] + fewer <= capacity)
        worst = np.where(fits, worst, np.iinfo(np.int64).max)
        best = int(np.argmin(worst)) if worst.size else 0
        if not worst.size or worst.flat[best] >= total[heaviest]:
            movable[heaviest] = False
            continue
        given, taken = own[best // len(others)], others[best % len(others)]
        other = place[taken]
        for array, sums in ((work, total), (tokens, used)):
            difference = array[given] - array[taken]
            sums[heaviest] -= difference
            sums[other] += difference
        place[given] = other
        if taken < len(loads):
            place[taken] = heaviest
    return [np.flatnonzero(place[: len(loads)] == number).tolist() for number in range(passes)]
