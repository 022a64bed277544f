"""GSM8K: grade-school word problems, from the hub or from `train.jsonl` and `test.jsonl` in `data.path`.

Invariant: the splits are the paper's, 7,473 / 400 / 919. A fixed seed draws the validation split from the 1,319 test
rows, so no test question is used for training or for choosing settings.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask, Split, to_dataset
from aft_ray.tasks.sources import Row, column_text, read_file, read_hub
from aft_ray.verify.answers.numbers import extract_after_marker

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_SIZE = 400
VALIDATION_SEED = 2309
SOURCE_MARKER = "####"
_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


class Gsm8kTask(MarkedTask):
    """GSM8K. The run's seed does not change the splits."""

    def __init__(self, data: DataConfig, name: str, seed: int) -> None:
        super().__init__(name, data.prompt or "Question: {question}\nAnswer:", data.answer_marker)
        self._path = data.path

    def load(self, split: Split) -> Dataset:
        source = "train" if split == "train" else "test"
        rows = self._rows(source)
        indices = list(range(len(rows)))
        if source == "test":
            if len(rows) <= VALIDATION_SIZE:
                raise ConfigError(
                    f"the test file of gsm8k has {len(rows)} rows, which is too few: {VALIDATION_SIZE} of them are "
                    f"validation"
                )
            validation = set(random.Random(VALIDATION_SEED).sample(indices, VALIDATION_SIZE))
            indices = [index for index in indices if (index in validation) == (split == "validation")]
        return to_dataset([self._question(source, i, rows[i]) for i in indices], f"the {source} file of gsm8k")

    def _rows(self, source: str) -> list[Row]:
        if self._path is None:
            return read_hub("openai/gsm8k", source, config="main")
        return read_file(Path(self._path).expanduser() / f"{source}.jsonl")

    def _question(self, source: str, index: int, row: Row) -> Question:
        where = f"row {index + 1} of gsm8k's {source} split"
        text = column_text(row, "question", "gsm8k", where)
        reference = _CALCULATOR_ANNOTATION.sub("", column_text(row, "answer", "gsm8k", where)).strip()
        gold = extract_after_marker(reference, SOURCE_MARKER)
        if gold is None:
            raise ConfigError(f"{where} has no answer after {SOURCE_MARKER}")
        reasoning, _, answer = reference.rpartition(SOURCE_MARKER)
        return Question(f"{self.name}-{source}-{index:06d}", text, f"{reasoning}{self.marker}{answer}", gold, self.name)
