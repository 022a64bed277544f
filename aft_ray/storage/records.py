"""The typed records that cross process boundaries, and the Arrow schema they are stored in.

A `Group` is the unit of storage and of training. Invariant: token ids are stored as they were sampled and are never
tokenised again, so a score means the same in sampling and in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa


class Verdict(StrEnum):
    """The verdict on one candidate. An `UNDECIDED` candidate is never trained on as wrong."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Question:
    """A problem with its reference response and gold answer. `id` is unique within a split."""

    id: str
    text: str
    reference: str
    gold: str
    task: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled response.

    Attributes:
        token_ids: The tokens as sampled, with the end-of-sequence token when `finish_reason` is "stop".
        logprob_sum: The sum of the tokens' log-probabilities under the sampler's weights at temperature 1, in nats.
        reward: 1.0 for right and 0.0 for wrong; graded feedback may use any finite number. It has no meaning when the
            verdict is undecided.
        reason: Why the verdict is undecided; empty otherwise.
    """

    token_ids: list[int]
    logprob_sum: float
    finish_reason: str
    text: str
    answer: str | None = None
    verdict: Verdict = Verdict.UNDECIDED
    reward: float = 0.0
    reason: str = ""

    @property
    def score(self) -> float:
        """The mean token log-probability, nats per token: s(c) of arXiv 2309.02144."""
        return self.logprob_sum / len(self.token_ids) if self.token_ids else -math.inf


@dataclass(frozen=True, slots=True)
class Group:
    """One question with its k labelled candidates, sampled in `round` by the weights of `policy_version`.

    Groups of round 0 (VFT) and of objectives that need no samples have no candidates.

    Attributes:
        reference_token_ids: The tokens of the reference response, with the end-of-sequence token.
    """

    round: int
    policy_version: int
    question: Question
    prompt_token_ids: list[int]
    reference_token_ids: list[int]
    candidates: list[Candidate]

    @property
    def has_signal(self) -> bool:
        """Whether two decided candidates differ in reward, so that a ranking objective has a pair to compare."""
        return len({c.reward for c in self.candidates if c.verdict is not Verdict.UNDECIDED}) > 1


def training_mask(group: Group) -> list[bool]:
    """Which candidates may be trained on, one entry per candidate.

    Left out are candidates with an undecided verdict, without tokens, or with the tokens of an earlier candidate: a
    response that was sampled twice must not count double.
    """
    seen: set[tuple[int, ...]] = set()
    mask = []
    for candidate in group.candidates:
        tokens = tuple(candidate.token_ids)
        mask.append(bool(tokens) and candidate.verdict is not Verdict.UNDECIDED and tokens not in seen)
        if mask[-1]:
            seen.add(tokens)
    return mask


QUESTION_TYPE = pa.struct(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("gold", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
    ]
)
CANDIDATE_TYPE = pa.struct(
    [
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprob_sum", pa.float64(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
GROUP_SCHEMA = pa.schema(
    [
        pa.field("round", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
        pa.field("question", QUESTION_TYPE, nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("reference_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("candidates", pa.list_(CANDIDATE_TYPE), nullable=False),
    ]
)


def groups_to_table(groups: Iterable[Group]) -> pa.Table:
    """An Arrow table of `GROUP_SCHEMA` with one row per group."""
    return pa.Table.from_pylist([_row(group) for group in groups], schema=GROUP_SCHEMA)


def table_to_groups(table: pa.Table) -> list[Group]:
    """The groups in a table that `groups_to_table` made. Raises ValueError when a column is missing."""
    missing = set(GROUP_SCHEMA.names) - set(table.column_names)
    if missing:
        raise ValueError(f"not a table of groups: the columns {sorted(missing)} are missing")
    return [_group(row) for row in table.to_pylist()]


def _row(group: Group) -> dict[str, Any]:
    # `dataclasses.asdict` copies every token, which is too slow for the one process that handles all questions.
    row = _fields(group)
    return {**row, "question": _fields(group.question), "candidates": [_fields(one) for one in group.candidates]}


def _fields(record: Question | Candidate | Group) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _group(row: dict[str, Any]) -> Group:
    candidates = [Candidate(**{**c, "verdict": Verdict(c["verdict"])}) for c in row["candidates"]]
    return Group(**{**row, "question": Question(**row["question"]), "candidates": candidates})


def unique_ids(questions: Sequence[Question]) -> Sequence[Question]:
    """The questions, unchanged. Raises ValueError when two have the same id, because the ledger counts by id."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"two questions have the id {question.id!r}; ids must be unique within a split")
        seen.add(question.id)
    return questions
