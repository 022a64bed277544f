"""Rows of local JSONL and Parquet files and of hub data sets, as plain dicts.

Invariant: whatever is wrong with a source is one ConfigError naming the file, and the line where there is one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aft_ray.config import ConfigError

Row = dict[str, Any]


def read_file(path: Path) -> list[Row]:
    """The rows of a `.jsonl` or `.parquet` file. Blank lines are skipped."""
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".jsonl", ".parquet"))
        raise ConfigError(f"there is no file {path}; data files in {path.parent}: {', '.join(there) or 'none'}")
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows: list[Row] = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise ConfigError(f"{path} is not a readable Parquet file: {_one_line(error)}") from error
        return rows
    raise ConfigError(f"{path} is neither a .jsonl nor a .parquet file")


def read_hub(name: str, split: str, config: str | None = None) -> list[Row]:
    """The rows of a split of a Hugging Face data set, from the hub or its local cache."""
    import datasets

    try:
        rows: list[Row] = datasets.load_dataset(name, config, split=split).to_list()
    except Exception as error:  # the hub client has no common base class for what can go wrong
        raise ConfigError(
            f"cannot load the split {split!r} of the data set {name} from the Hugging Face hub "
            f"({type(error).__name__}: {_one_line(error)}); set data.path to a directory with local files"
        ) from error
    return rows


def column(row: Row, name: str, key: str, where: str) -> str:
    """The value of a column as text. `key` is the config key that names it, `where` the row's place."""
    if name not in row:
        raise ConfigError(f"{where} has no column {name!r}, which {key} names; it has {', '.join(sorted(row))}")
    if row[name] is None:
        raise ConfigError(f"{where} has an empty column {name!r}, which {key} names")
    return str(row[name])


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_read_line(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_one_line(error)}") from error
    return rows


def _read_line(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is a JSON {type(row).__name__}, not an object with named columns")
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
