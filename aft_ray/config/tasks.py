"""The config of a reasoning task: which task it is, where its questions come from and how they are asked.

Invariant: a config that loads has all that its task needs. Messages call the section `data`; `rename_data_keys`
changes that for an entry of `tasks`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from aft_ray.config.section import ConfigError, Natural, Positive, Section

TaskName = Literal["arithmetic", "gsm8k", "aqua_rat", "ecqa", "mmlu", "custom"]
# The form of an entry's name in `tasks`, which is part of question ids and of `tasks.NAME.key=value`.
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
    seed: Natural = Field(0, description="seed of the generator; independent of the run's seed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_steps > self.max_steps:
            raise ConfigError(f"data.arithmetic.min_steps ({self.min_steps}) is more than max_steps ({self.max_steps})")
        return self


class CustomConfig(Section):
    """The columns and files of a custom task."""

    train: str | None = Field(None, description="file below data.path, or split name on the hub")
    validation: str | None = Field(None, description="the same for validation; none: drawn from the training split")
    test: str | None = Field(None, description="the same for test; none: no test split")
    question: str = Field("question", description="column of the question's text")
    reference: str = Field("answer", description="column of the reference response")
    gold: str | None = Field(None, description="column of the gold answer; none: extracted from the reference")
    id: str | None = Field(None, description="column of a unique id; none: split and row number")
    compare: Literal["number", "option", "yes_no", "math", "text"] = Field(
        "number", description="the kind of the answers; math: LaTeX expressions, by math-verify"
    )


class MmluConfig(Section):
    """Which subjects of MMLU are asked."""

    subjects: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)
    ] = Field((), description="such as anatomy,virology; none: all of them")


class DataConfig(Section):
    """The task and the source of its questions. It is the short form of `tasks` with one entry."""

    task: TaskName = Field("arithmetic", description="which reasoning task")
    path: str | None = Field(None, description="local directory, or hub name for custom; none: the task's hub data set")
    prompt: str | None = Field(None, description="prompt with {question} in it; none: the task's own")
    answer_marker: str = Field("####", min_length=1, description="text before the final answer")
    train_limit: Positive | None = Field(None, description="use this many training questions, drawn by the run's seed")
    validation_limit: Positive | None = Field(None, description="the same for validation")
    test_limit: Positive | None = Field(None, description="the same for test")
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    custom: CustomConfig = CustomConfig()
    mmlu: MmluConfig = MmluConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ConfigError("data.prompt must contain {question}, which the question's text replaces")
        if self.task == "custom" and not self.path:
            raise ConfigError("data.task=custom needs data.path: a directory of JSONL or Parquet files, or a hub name")
        if self.task == "custom" and not self.custom.train:
            raise ConfigError("data.task=custom needs data.custom.train: a file below data.path, or a split's name")
        return self


class TaskConfig(DataConfig):
    """One of several tasks, under a name of your choice; it has the keys of `data` and these."""

    # RunConfig fills this in for an entry that has the name of a task.
    task: TaskName = Field(description="which reasoning task; may be left out where NAME is a task's name")
    weight: float = Field(1.0, gt=0, description="the task's share of a round's questions relative to the others'")


def rename_data_keys(sentence: str, key: str) -> str:
    """The sentence with keys of the section `data` replaced by those of the section `key`, such as tasks.gsm8k."""
    return _KEY_OF_DATA.sub(f"{key}.", sentence)


_KEY_OF_DATA = re.compile(rf"(?<![\w./])data\.(?=(?:{'|'.join(DataConfig.model_fields)})\b)")
