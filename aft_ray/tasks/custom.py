"""A task made from the user's own data.

The rows come from JSON-lines, TSV or Parquet files in the directory `data.path`, or from the hub's data set of that
name. The config says which columns hold what.

Invariant: a validation split that is drawn from train shares no row with it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, DataConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import MarkedTask, Split, to_dataset
from aft_ray.tasks.sources import Row, column_text, read_file, read_hub
from aft_ray.verify.answers.numbers import extract_after_marker

if TYPE_CHECKING:
    from datasets import Dataset

HOLDOUT_SHARE = 0.05


class CustomTask(MarkedTask):
    """The user's own data. `seed` determines the validation split when the data has none."""

    def __init__(self, data: DataConfig, name: str, seed: int) -> None:
        super().__init__(name, data.prompt or "Question: {question}\nAnswer:", data.answer_marker, data.custom.compare)
        self._columns = data.custom
        self._path = data.path or ""
        self._seed = seed

    def load(self, split: Split) -> Dataset:
        source: str | None = getattr(self._columns, split)
        if source is not None and (split != "train" or self._columns.validation is not None):
            return to_dataset(self._questions(split, source), f"data.custom.{split}={source}")
        if split == "test":
            raise ConfigError("the data has no test split; name it with data.custom.test")
        train = self._columns.train or ""
        rows = self._questions("train", train)
        held_out = self._held_out_indices(len(rows))
        chosen = [row for index, row in enumerate(rows) if (index in held_out) == (split == "validation")]
        return to_dataset(chosen, f"data.custom.train={train}")

    def _held_out_indices(self, rows: int) -> set[int]:
        """The indices of the training rows that become the validation split."""
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
        columns = self._columns
        reference = column_text(row, columns.reference, "data.custom.reference", where)
        if columns.gold is not None:
            gold: str | None = column_text(row, columns.gold, "data.custom.gold", where)
        else:
            gold = extract_after_marker(reference, self.marker)
        if not (gold and gold.strip()):
            raise ConfigError(
                f"{where} has no gold answer; name its column with data.custom.gold, or the marker before it in the "
                f"reference with data.answer_marker (now {self.marker!r})"
            )
        question_id = (
            column_text(row, columns.id, "data.custom.id", where) if columns.id else f"{self.name}-{split}-{index:06d}"
        )
        text = column_text(row, columns.question, "data.custom.question", where)
        return Question(question_id, text, reference, gold.strip(), self.name)
