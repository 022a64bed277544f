"""ECQA: commonsense questions with five choices and an explanation, from the hub or from files in data.path.

The files are `train.jsonl`, `val.jsonl` and `test.jsonl`, with the columns `question`, `choices`, `answer` (a letter)
and, for training, `explanation`; or with the hub's columns `q_text`, `q_op1` to `q_op5`, `q_ans` and `taskB`. The
splits are the official ones, 7,598 / 1,090 / 2,194, which the paper uses, less the training questions that also stand
in validation or test, and the validation questions that also stand in test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.tasks.base import Split, dataset
from aft_ray.tasks.choices import ChoiceTask, Problem, held_apart
from aft_ray.tasks.sources import Row, column, read_first, read_hub, texts

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "tasksource/ecqa"
FILES = {"train": ("train.jsonl",), "validation": ("val.jsonl", "validation.jsonl"), "test": ("test.jsonl",)}


class EcqaTask(ChoiceTask):
    """See the module."""

    def __init__(self, data: DataConfig, name: str) -> None:
        super().__init__(name, data, "ABCDE")
        self._path = data.path

    def load(self, split: Split) -> Dataset:
        chosen = self._problems(split)
        if split == "train":
            apart = held_apart(chosen, [*self._problems("validation"), *self._problems("test")])
            chosen = [problem for problem in apart if not problem.is_ambiguous]
        elif split == "validation":
            chosen = held_apart(chosen, self._problems("test"))
        return dataset(self.questions(chosen), f"the {split} split of {self._path or HUB}")

    def _problems(self, split: Split) -> list[Problem]:
        if self._path is None:
            rows, source = read_hub(HUB, split), f"{HUB}'s {split} split"
        else:
            rows, source = read_first(self._path, FILES[split])
        return [self._problem(split, i, row, f"row {i + 1} of {source}") for i, row in enumerate(rows)]

    def _problem(self, split: Split, index: int, row: Row, where: str) -> Problem:
        if "q_text" in row:
            row = _plain(row, where)
        explained = split == "train" or row.get("explanation") is not None
        return self.problem(
            f"{split}-{index:06d}",
            column(row, "question", "ecqa", where),
            texts(row, "choices", where),
            column(row, "answer", "ecqa", where).strip(),
            column(row, "explanation", "ecqa", where) if explained else "",
            where,
        )


def _plain(row: Row, where: str) -> Row:
    """A row with the hub's columns as one with ours; its answer is the wording of a choice."""
    choices = [column(row, f"q_op{number}", "ecqa", where).strip() for number in range(1, 6)]
    answer = column(row, "q_ans", "ecqa", where).strip()
    if answer not in choices:
        raise ConfigError(f"{where} gives the answer {answer!r}, which is none of its choices; mend it or take it out")
    return {
        "question": row["q_text"],
        "choices": choices,
        "answer": "ABCDE"[choices.index(answer)],
        "explanation": row.get("taskB"),
    }
