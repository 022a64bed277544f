"""AQuA-RAT: algebra word problems with five options and a rationale, from the hub or from files in data.path.

The files are `train.json` or `aqua_train.tsv`, `dev.json` and `test.json`. The public validation and test rows are 254
each, and the paper's splits are 5,000 / 400 / 1,254. So where the training rows can spare them, 146 and 1,000 of them,
drawn by a fixed seed, join validation and test; `data.train_limit: 5000` then gives the paper's splits. Where they are
fewer, as in `aqua_train.tsv`, validation and test are the public rows and nothing more.

Invariant: the splits depend on the data alone, and what is in one is in no other.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.tasks.base import Split, dataset
from aft_ray.tasks.choices import ChoiceTask, Problem, held_apart
from aft_ray.tasks.sources import Row, column, read_first, read_hub, texts

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "deepmind/aqua_rat"
FILES = {"train": ("train.json", "aqua_train.tsv"), "validation": ("dev.json",), "test": ("test.json",)}
# The columns of the TSV: the question with its options below a line `Options:`, `(C)`, and the rationale.
TSV_COLUMNS = ("question", "correct", "rationale")
PAPER_TRAIN, PAPER_VALIDATION, PAPER_TEST = 5000, 400, 1254
SPLIT_SEED = 2309
_OPTIONS = "\nOptions:\n"
_LETTERED = re.compile(r"^\(([A-E])\)", re.MULTILINE)  # "(A) 21"
_LABEL = re.compile(r"\s*([A-E])\s*\)")  # "A)21"


class AquaRatTask(ChoiceTask):
    """See the module."""

    def __init__(self, data: DataConfig, name: str) -> None:
        super().__init__(name, data, "ABCDE")
        self._path = data.path

    def load(self, split: Split) -> Dataset:
        test = self._problems("test")
        validation = held_apart(self._problems("validation"), test)
        train = [p for p in held_apart(self._problems("train"), [*validation, *test]) if not p.is_ambiguous]
        spare = [max(0, PAPER_VALIDATION - len(validation)), max(0, PAPER_TEST - len(test))]
        if len(train) >= PAPER_TRAIN + sum(spare):
            drawn = random.Random(SPLIT_SEED).sample(train, sum(spare))
            validation, test = validation + drawn[: spare[0]], test + drawn[spare[0] :]
            lent = {problem.id for problem in drawn}
            train = [problem for problem in train if problem.id not in lent]
        chosen = {"train": train, "validation": validation, "test": test}[split]
        return dataset(self.questions(chosen), f"the {split} split of {self._path or HUB}")

    def _problems(self, split: Split) -> list[Problem]:
        if self._path is None:
            rows, source = read_hub(HUB, split, config="raw"), f"{HUB}'s {split} split"
        else:
            rows, source = read_first(self._path, FILES[split], TSV_COLUMNS)
        return [self._problem(f"{split}-{i:06d}", row, f"row {i + 1} of {source}") for i, row in enumerate(rows)]

    def _problem(self, identity: str, row: Row, where: str) -> Problem:
        stem = column(row, "question", "aqua_rat", where)
        if "options" in row:
            labelled = [(_LABEL.match(option), option) for option in texts(row, "options", where)]
            letters = [match[1] if match else "" for match, _ in labelled]
            options = [option[match.end() :] if match else option for match, option in labelled]
        else:
            stem, _, listed = stem.rpartition(_OPTIONS)
            _, *parts = _LETTERED.split(listed)
            letters, options = parts[0::2], parts[1::2]
        if letters != list(self.letters):
            raise ConfigError(
                f"{where} has options lettered {', '.join(letter or 'nothing' for letter in letters) or 'nothing'}, "
                f"not {', '.join(self.letters)}; mend the row or take it out"
            )
        gold = column(row, "correct", "aqua_rat", where).strip().strip("()")
        return self.problem(identity, stem, options, gold, column(row, "rationale", "aqua_rat", where), where)
