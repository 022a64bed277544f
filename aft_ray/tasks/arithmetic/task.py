"""The task `arithmetic`: generated word problems, whose steps can be graded one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aft_ray.config.run import DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.arithmetic.problems import generate
from aft_ray.tasks.arithmetic.steps import grade_steps
from aft_ray.tasks.base import MarkedTask, Split, to_dataset

if TYPE_CHECKING:
    from datasets import Dataset


class ArithmeticTask(MarkedTask):
    """Generates its questions and grades the steps of a response. The run's seed does not change the questions."""

    def __init__(self, data: DataConfig, name: str, seed: int) -> None:
        super().__init__(name, data.prompt or "{question}", data.answer_marker)
        self.config = data.arithmetic

    def load(self, split: Split) -> Dataset:
        size: int = getattr(self.config, f"{split}_size")
        generated = generate(self.config, split, size, self.marker)
        questions = [
            replace(question, id=f"{self.name}-{split}-{index:06d}", task=self.name)
            for index, question in enumerate(generated)
        ]
        return to_dataset(questions, f"data.arithmetic.{split}_size")

    def grade_steps(self, question: Question, response: str, right: bool) -> float:
        """The share of right steps, 0 to 1; see `aft_ray.tasks.arithmetic.steps.grade_steps`."""
        return grade_steps(question.text, response, right)
