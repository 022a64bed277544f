"""The interface of a reasoning task: how it loads questions, writes prompts, and extracts and compares answers.

Invariant: a split is never empty, and a mistake in the user's data raises one ConfigError that says where it is.
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

    A task may also have the method `grade_steps` of `aft_ray.verify.feedback.StepGrader`, which `feedback.kind=steps`
    needs.

    Attributes:
        name: The value of `Question.task` for the questions of this task, and the prefix of the ids that it makes.
    """

    name: str

    def load(self, split: Split) -> Dataset:
        """The questions of a split; the columns are the fields of `Question`. Raises ConfigError."""

    def prompt(self, question: Question) -> str:
        """The prompt with which a model is asked the question."""

    def extract(self, text: str) -> str | None:
        """The final answer in a response, or None when the response has no final answer."""

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        """The verdict on an extracted answer, compared with the gold answer."""


class MarkedTask:
    """The common part of the tasks whose responses end in a marker and the final answer.

    Args:
        prompt: The template of the prompt; `{question}` in it stands for the text of the question.
        marker: The text before the final answer.
        kind: How answers are compared.
    """

    def __init__(self, name: str, prompt: str, marker: str, kind: Kind = "number") -> None:
        self.name = name
        self.marker = marker
        self._prompt = prompt
        self._kind = kind

    def prompt(self, question: Question) -> str:
        return self._prompt.replace("{question}", question.text)

    def extract(self, text: str) -> str | None:
        return extract_after_marker(text, self.marker)

    def same(self, answer: str | None, gold: str) -> VerificationResult:
        return compare(self._kind, answer, gold)


def to_dataset(questions: Sequence[Question], source: str) -> Dataset:
    """Questions as a data set. Raises ConfigError, which names `source`, when there are no questions."""
    from datasets import Dataset

    if not questions:
        raise ConfigError(f"{source} has no questions")
    return Dataset.from_list([asdict(question) for question in questions])


def to_questions(rows: Dataset) -> list[Question]:
    """The questions of a data set that `to_dataset` made."""
    return [Question(**row) for row in rows.to_list()]
