"""AQuA-RAT: algebra word problems with five options and a rationale, from the hub or from files in `data.path`.

The files are `train.json` or `aqua_train.tsv`, `dev.json` and `test.json`. The public validation and test splits have
254 rows each, but the paper's splits have 5,000 / 400 / 1,254. So when the training split has enough rows, 146 of them
move to validation and 1,000 to test, drawn by a fixed seed; `data.train_limit: 5000` then gives the paper's splits.
When it has fewer, as in `aqua_train.tsv`, validation and test are the public rows alone.

Invariant: the splits depend on the data alone, and no question is in two splits.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.tasks.base import Split, to_dataset
from aft_ray.tasks.choices import ChoiceProblem, ChoiceTask, without_duplicates
from aft_ray.tasks.sources import Row, column_text, column_texts, read_first, read_hub

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "deepmind/aqua_rat"
FILES = {"train": ("train.json", "aqua_train.tsv"), "validation": ("dev.json",), "test": ("test.json",)}
# The columns of the TSV file: the question with its options below a line `Options:`, the answer, the rationale.
TSV_COLUMNS = ("question", "correct", "rationale")
PAPER_TRAIN, PAPER_VALIDATION, PAPER_TEST = 5000, 400, 1254
SPLIT_SEED = 2309
_OPTIONS = "\nOptions:\n"
_LETTERED = re.compile(r"^\(([A-E])\)", re.MULTILINE)  # "(A) 21"
_LABEL = re.compile(r"\s*([A-E])\s*\)")  # "A)21"


class AquaRatTask(ChoiceTask):
    """AQuA-RAT. The run's seed does not change the splits."""

    def __init__(self, data: DataConfig, name: str, seed: int) -> None:
        super().__init__(name, data, "ABCDE")
        self._path = data.path

    def load(self, split: Split) -> Dataset:
        test = self._problems("test")
        validation = without_duplicates(self._problems("validation"), test)
        train = [p for p in without_duplicates(self._problems("train"), [*validation, *test]) if not p.is_ambiguous]
        missing_validation = max(0, PAPER_VALIDATION - len(validation))
        missing_test = max(0, PAPER_TEST - len(test))
        if len(train) >= PAPER_TRAIN + missing_validation + missing_test:
            moved = random.Random(SPLIT_SEED).sample(train, missing_validation + missing_test)
            validation, test = validation + moved[:missing_validation], test + moved[missing_validation:]
            moved_ids = {problem.id for problem in moved}
            train = [problem for problem in train if problem.id not in moved_ids]
        problems = {"train": train, "validation": validation, "test": test}[split]
        return to_dataset(self.to_questions(problems), f"the {split} split of {self._path or HUB}")

    def _problems(self, split: Split) -> list[ChoiceProblem]:
        if self._path is None:
            rows, source = read_hub(HUB, split, config="raw"), f"{HUB}'s {split} split"
        else:
            rows, source = read_first(self._path, FILES[split], TSV_COLUMNS)
        return [self._problem(f"{split}-{i:06d}", row, f"row {i + 1} of {source}") for i, row in enumerate(rows)]

    def _problem(self, problem_id: str, row: Row, where: str) -> ChoiceProblem:
        stem = column_text(row, "question", "aqua_rat", where)
        if "options" in row:
            labelled = [(_LABEL.match(option), option) for option in column_texts(row, "options", where)]
            letters = [match[1] if match else "" for match, _ in labelled]
            options = [option[match.end() :] if match else option for match, option in labelled]
        else:
            stem, _, option_lines = stem.rpartition(_OPTIONS)
            _, *parts = _LETTERED.split(option_lines)
            letters, options = parts[0::2], parts[1::2]
        if letters != list(self.letters):
            raise ConfigError(
                f"{where} has options lettered {', '.join(letter or 'nothing' for letter in letters) or 'nothing'}, "
                f"not {', '.join(self.letters)}; mend the row or take it out"
            )
        gold = column_text(row, "correct", "aqua_rat", where).strip().strip("()")
        reasoning = column_text(row, "rationale", "aqua_rat", where)
        return self.check_problem(problem_id, stem, options, gold, reasoning, where)
