"""What a reasoning task is: where its questions come from, how they are asked, how an answer is read.

Invariant: a split never comes back empty, and a mistake in the user's data is one ConfigError that says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from aft_ray.config.run import ConfigError
from aft_ray.storage.records import Question
from aft_ray.verify.answers.compare import Kind, compare
from aft_ray.verify.answers.numbers import extract_after_marker
from aft_ray.verify.result import VerificationResult

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Task(Protocol):
    """A reasoning task. Its methods are pure: the same split, question or text always gives the same result.

    name: what its questions carry as `task`, and what the ids begin with that it makes.
    """

    name: str

    def load(self, split: Split) -> Dataset:
        """The questions of a split; the columns are the fields of `Question`. Raises ConfigError."""

    def prompt(self, question: Question) -> str:
        """How the question is put to a model."""

    def extract(self, text: str) -> str | None:
        """The final answer that a response gives, None when it gives none."""

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        """Whether an extracted answer is the gold one."""


class MarkedTask:
    """The part that tasks share whose responses end in a marker and the answer, which is compared as `kind` says."""

    def __init__(self, name: str, prompt: str, marker: str, kind: Kind = "number") -> None:
        self.name = name
        self._prompt = prompt
        self.marker = marker
        self._kind = kind

    def prompt(self, question: Question) -> str:
        return self._prompt.replace("{question}", question.text)

    def extract(self, text: str) -> str | None:
        return extract_after_marker(text, self.marker)

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        return compare(self._kind, answer, gold)


def dataset(rows: Sequence[Question], origin: str) -> Dataset:
    """Questions as a data set. Raises ConfigError when there are none; `origin` says where they were looked for."""
    from datasets import Dataset

    if not rows:
        raise ConfigError(f"{origin} has no questions")
    return Dataset.from_list([asdict(row) for row in rows])


def questions(rows: Dataset) -> list[Question]:
    """The inverse of `dataset`."""
    return [Question(**row) for row in rows.to_list()]
