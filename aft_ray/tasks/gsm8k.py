"""GSM8K: grade-school word problems, from the hub or from `train.jsonl` and `test.jsonl` in data.path.

Invariant: the splits are the paper's, 7,473 / 400 / 919; validation is drawn from the 1,319 test rows by a fixed
seed, so no run trains on, or tunes on, what it is tested on.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask, Split, dataset
from aft_ray.tasks.sources import Row, column, read_file, read_hub
from aft_ray.verify.answers.numbers import extract_after_marker

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_SIZE = 400
VALIDATION_SEED = 2309
SOURCE_MARKER = "####"
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class Gsm8kTask(MarkedTask):
    """See the module."""

    def __init__(self, data: DataConfig, name: str) -> None:
        super().__init__(name, data.prompt or "Question: {question}\nAnswer:", data.answer_marker)
        self._path = data.path

    def load(self, split: Split) -> Dataset:
        source = "train" if split == "train" else "test"
        rows = self._rows(source)
        indices = list(range(len(rows)))
        if source == "test":
            if len(rows) <= VALIDATION_SIZE:
                raise ConfigError(f"the test rows of gsm8k are {len(rows)}; {VALIDATION_SIZE} of them are validation")
            validation = set(random.Random(VALIDATION_SEED).sample(indices, VALIDATION_SIZE))
            indices = [index for index in indices if (index in validation) == (split == "validation")]
        return dataset([self._question(source, i, rows[i]) for i in indices], f"the {source} file of gsm8k")

    def _rows(self, source: str) -> list[Row]:
        if self._path is None:
            return read_hub("openai/gsm8k", source, config="main")
        return read_file(Path(self._path).expanduser() / f"{source}.jsonl")

    def _question(self, source: str, index: int, row: Row) -> Question:
        where = f"row {index + 1} of gsm8k's {source} split"
        text = column(row, "question", "gsm8k", where)
        reference = _CALCULATOR_MARK.sub("", column(row, "answer", "gsm8k", where)).strip()
        gold = extract_after_marker(reference, SOURCE_MARKER)
        if gold is None:
            raise ConfigError(f"{where} has no answer after {SOURCE_MARKER}")
        reasoning, _, answer = reference.rpartition(SOURCE_MARKER)
        return Question(f"{self.name}-{source}-{index:06d}", text, f"{reasoning}{self.marker}{answer}", gold, self.name)
