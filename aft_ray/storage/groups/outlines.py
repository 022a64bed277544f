"""What is known of a group without reading it: the lengths from which training is planned, and how many were right.

The ledger keeps the outlines of a file beside its path. They name no objective, since one outline serves every
objective. Invariant: an outline says what `outline_of` says of the stored group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.storage.records import Group, Verdict, training_mask


@dataclass(frozen=True, slots=True)
class GroupOutline:
    """The lengths and verdicts of a group.

    Attributes:
        prompt, reference: tokens of the prompt and of the reference response.
        right, decided: candidates that are right, and that are right or wrong.
        tokens: tokens of each candidate that may be trained on (`training_mask`), in their order in the group.
        rewards: the reward of each of them.
        kinds: one letter for each of them: `r` for right, `w` for wrong, and a capital letter when the candidate has
            the tokens of the reference response.
    """

    prompt: int
    reference: int
    right: int
    decided: int
    tokens: tuple[int, ...]
    rewards: tuple[float, ...]
    kinds: str


def outline_of(group: Group) -> GroupOutline:
    """The outline of a group."""
    verdicts = [candidate.verdict for candidate in group.candidates]
    kept = [one for one, keep in zip(group.candidates, training_mask(group), strict=True) if keep]
    letters = ["r" if one.verdict is Verdict.RIGHT else "w" for one in kept]
    repeats = [one.token_ids == group.reference_token_ids for one in kept]
    return GroupOutline(
        prompt=len(group.prompt_token_ids),
        reference=len(group.reference_token_ids),
        right=verdicts.count(Verdict.RIGHT),
        decided=len(verdicts) - verdicts.count(Verdict.UNDECIDED),
        tokens=tuple(len(one.token_ids) for one in kept),
        rewards=tuple(one.reward for one in kept),
        kinds="".join(letter.upper() if same else letter for letter, same in zip(letters, repeats, strict=True)),
    )


def outlines_to_json(outlines: Sequence[GroupOutline]) -> dict[str, list[Any]]:
    """The outlines as the ledger writes them: for each field a list with one value per group."""
    return {name: [getattr(one, name) for one in outlines] for name in GroupOutline.__dataclass_fields__}


def outlines_from_json(columns: dict[str, list[Any]]) -> tuple[GroupOutline, ...]:
    """The outlines that `outlines_to_json` wrote."""
    rows = zip(*(columns[name] for name in GroupOutline.__dataclass_fields__), strict=True)
    return tuple(
        GroupOutline(prompt, reference, right, decided, tuple(tokens), tuple(rewards), kinds)
        for prompt, reference, right, decided, tokens, rewards, kinds in rows
    )
