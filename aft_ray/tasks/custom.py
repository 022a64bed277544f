"""A task from anybody's data: JSON-lines, TSV or Parquet files below data.path, or a hub data set, with columns named
in the config.

Invariant: validation is disjoint from train, also when it has to be drawn from it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask, Split, dataset
from aft_ray.tasks.sources import Row, column, read_file, read_hub
from aft_ray.verify.answers.numbers import extract_after_marker

if TYPE_CHECKING:
    from datasets import Dataset

HOLDOUT_SHARE = 0.05


class CustomTask(MarkedTask):
    """See the module. `seed` draws the validation split where the data has none."""

    def __init__(self, data: DataConfig, seed: int, name: str) -> None:
        super().__init__(name, data.prompt or "Question: {question}\nAnswer:", data.answer_marker, data.custom.compare)
        self._columns = data.custom
        self._path = data.path or ""
        self._seed = seed

    def load(self, split: Split) -> Dataset:
        source: str | None = getattr(self._columns, split)
        if source is not None and (split != "train" or self._columns.validation is not None):
            return dataset(self._questions(split, source), f"data.custom.{split}={source}")
        if split == "test":
            raise ConfigError("the data has no test split; name it with data.custom.test")
        train = self._columns.train or ""
        rows = self._questions("train", train)
        held_out = self._holdout(len(rows))
        kept = [row for index, row in enumerate(rows) if (index in held_out) == (split == "validation")]
        return dataset(kept, f"data.custom.train={train}")

    def _holdout(self, rows: int) -> set[int]:
        """Which training rows are the validation split."""
        if rows < 2:
            raise ConfigError(f"data.custom.train has {rows} rows, too few to draw a validation split from")
        size = max(1, round(rows * HOLDOUT_SHARE))
        return set(random.Random(f"{self._seed}/holdout").sample(range(rows), size))

    def _questions(self, split: Split, source: str) -> list[Question]:
        return [self._question(split, source, index, row) for index, row in enumerate(self._rows(source))]

    def _rows(self, source: str) -> list[Row]:
        root = Path(self._path).expanduser()
        if root.is_dir():
            return read_file(root / source)
        if root.is_absolute() or self._path.startswith((".", "~")):
            raise ConfigError(f"data.path={self._path} is not a directory")
        return read_hub(self._path, source)

    def _question(self, split: Split, source: str, index: int, row: Row) -> Question:
        where = f"row {index + 1} of {source}"
        names = self._columns
        reference = column(row, names.reference, "data.custom.reference", where)
        if names.gold is not None:
            gold: str | None = column(row, names.gold, "data.custom.gold", where)
        else:
            gold = extract_after_marker(reference, self.marker)
        if not (gold and gold.strip()):
            raise ConfigError(
                f"{where} has no gold answer; name its column with data.custom.gold, or what stands before it in the "
                f"reference with data.answer_marker (now {self.marker!r})"
            )
        identity = column(row, names.id, "data.custom.id", where) if names.id else f"{self.name}-{split}-{index:06d}"
        text = column(row, names.question, "data.custom.question", where)
        return Question(identity, text, reference, gold.strip(), self.name)
