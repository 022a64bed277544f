"""MMLU: questions with four choices in 57 subjects, asked without examples; for evaluation only.

The rows come from the hub, or from `validation` and `test` files (JSON-lines or Parquet) in `data.path` with the hub's
columns: `question`, `subject`, `choices`, and `answer`, which is the index of the right choice, from 0, or its letter.

Invariant: there is no training split, so no run can train on MMLU.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.tasks.base import Split, to_dataset
from aft_ray.tasks.choices import ChoiceProblem, ChoiceTask
from aft_ray.tasks.sources import Row, column_text, column_texts, read_first, read_hub

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "cais/mmlu"


class MmluTask(ChoiceTask):
    """MMLU. The run's seed does not change the splits."""

    def __init__(self, data: DataConfig, name: str, seed: int) -> None:
        super().__init__(name, data, "ABCD")
        self._path = data.path
        self._subjects = data.mmlu.subjects

    def load(self, split: Split) -> Dataset:
        if split == "train":
            raise ConfigError(
                f"{self.name} is MMLU, which is for evaluation only and has no training split; train on another task, "
                f"and measure the model with `aft-ray evaluate MODEL` and data.task=mmlu"
            )
        if self._path is None:
            rows, source = read_hub(HUB, split, config="all"), f"{HUB}'s {split} split"
        else:
            rows, source = read_first(self._path, [f"{split}.{kind}" for kind in ("jsonl", "json", "parquet")])
        row_names = [f"row {index + 1} of {source}" for index in range(len(rows))]
        subjects = [column_text(row, "subject", "mmlu", where) for row, where in zip(rows, row_names, strict=True)]
        self._check_subjects(set(subjects), source)
        problems = [
            self._problem(f"{split}-{index:06d}", rows[index], row_names[index])
            for index, subject in enumerate(subjects)
            if not self._subjects or subject in self._subjects
        ]
        return to_dataset(self.to_questions(problems), source)

    def _check_subjects(self, known: set[str], source: str) -> None:
        for subject in self._subjects:
            if subject not in known:
                close = difflib.get_close_matches(subject, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}"
                raise ConfigError(f"data.mmlu.subjects names {subject!r}, which is no subject of {source}; {hint}")

    def _problem(self, problem_id: str, row: Row, where: str) -> ChoiceProblem:
        answer = column_text(row, "answer", "mmlu", where).strip()
        gold = self.letters[int(answer)] if answer in ("0", "1", "2", "3") else answer
        stem = column_text(row, "question", "mmlu", where)
        return self.check_problem(problem_id, stem, column_texts(row, "choices", where), gold, "", where)
