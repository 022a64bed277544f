"""The config of a reasoning task: which one, where its questions come from, how they are asked.

Invariant: a task's config that loads has what its task needs. Sentences about it call it `data`; `in_place` puts that
right for an entry of `tasks`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from aft_ray.config.section import ConfigError, Natural, Positive, Section

TaskName = Literal["arithmetic", "gsm8k", "aqua_rat", "ecqa", "mmlu", "custom"]
# What an entry of `tasks` may be called: it becomes part of question ids and of `tasks.NAME.key=value`.
ENTRY_NAME = re.compile(r"[A-Za-z0-9_-]+")


class ArithmeticConfig(Section):
    """Difficulty of the generated word problems."""

    min_steps: int = Field(2, ge=1, le=8, description="fewest dependent calculations in a problem")
    max_steps: int = Field(4, ge=1, le=8, description="most dependent calculations in a problem")
    max_operand: int = Field(20, ge=5, le=1000, description="largest number in a problem")
    max_value: int = Field(200, ge=20, le=100_000, description="largest intermediate result")
    operations: str = Field("+-*/", pattern=r"^[+\-*/]+$", description="which of + - * / occur")
    distractors: float = Field(0.3, ge=0, le=1, description="probability of a sentence with an irrelevant number")
    phrasings: int = Field(3, ge=1, le=3, description="how many wordings of a step's chain of thought occur")
    terse: float = Field(0.0, ge=0, le=1, description="probability that a reference works out two steps at once")
    train_size: Positive = Field(4000, description="questions in the training split")
    validation_size: Positive = Field(400, description="questions in the validation split")
    test_size: Positive = Field(2000, description="questions in the test split")
    seed: Natural = Field(0, description="of the generator; independent of the run's seed")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.min_steps > self.max_steps:
            raise ConfigError(f"data.arithmetic.min_steps ({self.min_steps}) is more than max_steps ({self.max_steps})")
        return self


class CustomConfig(Section):
    """Where a custom task's columns and files are."""

    train: str | None = Field(None, description="file below data.path, or split name on the hub")
    validation: str | None = Field(None, description="likewise; none: drawn from the training split")
    test: str | None = Field(None, description="likewise; none: no test split")
    question: str = Field("question", description="column of the question's text")
    reference: str = Field("answer", description="column of the reference response")
    gold: str | None = Field(None, description="column of the gold answer; none: read off the reference")
    id: str | None = Field(None, description="column of a unique id; none: split and row number")
    compare: Literal["number", "option", "yes_no", "math", "text"] = Field(
        "number", description="what answers are; math: LaTeX expressions, by math-verify"
    )


class MmluConfig(Section):
    """Which part of MMLU is asked."""

    subjects: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)
    ] = Field((), description="such as anatomy,virology; none: all of them")


class DataConfig(Section):
    """The task and where its questions come from. Short for `tasks` with one entry."""

    task: TaskName = Field("arithmetic", description="which reasoning task")
    path: str | None = Field(None, description="local directory, or hub name for custom; none: the task's hub data set")
    prompt: str | None = Field(None, description="prompt with {question} in it; none: the task's own")
    answer_marker: str = Field("####", min_length=1, description="what stands before the final answer")
    train_limit: Positive | None = Field(None, description="use this many training questions, drawn by the run's seed")
    validation_limit: Positive | None = Field(None, description="likewise for validation")
    test_limit: Positive | None = Field(None, description="likewise for test")
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    custom: CustomConfig = CustomConfig()
    mmlu: MmluConfig = MmluConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ConfigError("data.prompt must contain {question}, the place of the question's text")
        if self.task == "custom" and not self.path:
            raise ConfigError("data.task=custom needs data.path: a directory of JSONL or Parquet files, or a hub name")
        if self.task == "custom" and not self.custom.train:
            raise ConfigError("data.task=custom needs data.custom.train: a file below data.path, or a split's name")
        return self


class TaskConfig(DataConfig):
    """One of a run's tasks, by a name of your choice; it takes the keys of `data` and these."""

    # Required, but for an entry that is called like a task: RunConfig fills that in.
    task: TaskName = Field(description="which reasoning task; may be left out where NAME is a task's name")
    weight: float = Field(1.0, gt=0, description="the task's share of a round's questions relative to the others'")


def in_place(sentence: str, key: str) -> str:
    """A sentence about keys of `data` as one about those of the entry of `tasks` at `key`."""
    return _KEY_OF_DATA.sub(f"{key}.", sentence)


_KEY_OF_DATA = re.compile(rf"(?<![\w./])data\.(?=(?:{'|'.join(DataConfig.model_fields)})\b)")
