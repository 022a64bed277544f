"""ECQA: commonsense questions with five choices and an explanation, from the hub or from files in `data.path`.

The files are `train.jsonl`, `val.jsonl` and `test.jsonl`. Their columns are `question`, `choices`, `answer` (a letter)
and, for training, `explanation`; or the hub's columns `q_text`, `q_op1` to `q_op5`, `q_ans` and `taskB`. The splits are
the official ones of 7,598 / 1,090 / 2,194 rows, which the paper uses, without the training questions that also occur in
validation or test and the validation questions that also occur in test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.tasks.base import Split, to_dataset
from aft_ray.tasks.choices import ChoiceProblem, ChoiceTask, without_duplicates
from aft_ray.tasks.sources import Row, column_text, column_texts, read_first, read_hub

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "tasksource/ecqa"
FILES = {"train": ("train.jsonl",), "validation": ("val.jsonl", "validation.jsonl"), "test": ("test.jsonl",)}


class EcqaTask(ChoiceTask):
    """ECQA. The run's seed does not change the splits."""

    def __init__(self, data: DataConfig, name: str, seed: int) -> None:
        super().__init__(name, data, "ABCDE")
        self._path = data.path

    def load(self, split: Split) -> Dataset:
        problems = self._problems(split)
        if split == "train":
            distinct = without_duplicates(problems, [*self._problems("validation"), *self._problems("test")])
            problems = [problem for problem in distinct if not problem.is_ambiguous]
        elif split == "validation":
            problems = without_duplicates(problems, self._problems("test"))
        return to_dataset(self.to_questions(problems), f"the {split} split of {self._path or HUB}")

    def _problems(self, split: Split) -> list[ChoiceProblem]:
        if self._path is None:
            rows, source = read_hub(HUB, split), f"{HUB}'s {split} split"
        else:
            rows, source = read_first(self._path, FILES[split])
        return [self._problem(split, i, row, f"row {i + 1} of {source}") for i, row in enumerate(rows)]

    def _problem(self, split: Split, index: int, row: Row, where: str) -> ChoiceProblem:
        if "q_text" in row:
            row = _rename_hub_columns(row, where)
        needs_explanation = split == "train" or row.get("explanation") is not None
        return self.check_problem(
            f"{split}-{index:06d}",
            column_text(row, "question", "ecqa", where),
            column_texts(row, "choices", where),
            column_text(row, "answer", "ecqa", where).strip(),
            column_text(row, "explanation", "ecqa", where) if needs_explanation else "",
            where,
        )


def _rename_hub_columns(row: Row, where: str) -> Row:
    """A row of the hub with the columns of the files. On the hub the answer is the wording of a choice."""
    choices = [column_text(row, f"q_op{number}", "ecqa", where).strip() for number in range(1, 6)]
    answer = column_text(row, "q_ans", "ecqa", where).strip()
    if answer not in choices:
        raise ConfigError(f"{where} gives the answer {answer!r}, which is none of its choices; mend it or take it out")
    return {
        "question": row["q_text"],
        "choices": choices,
        "answer": "ABCDE"[choices.index(answer)],
        "explanation": row.get("taskB"),
    }
