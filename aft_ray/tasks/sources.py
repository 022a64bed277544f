"""Rows of local JSON-lines, TSV and Parquet files and of hub data sets, as plain dicts.

Invariant: whatever is wrong with a source is one ConfigError naming the file, and the line where there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aft_ray.config.run import ConfigError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".tsv", ".parquet")
# How a newline is written inside a field of a TSV file; some files escape the backslash once more.
_ESCAPED_NEWLINE = re.compile(r"\\+n")


def read_file(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a JSON-lines (`.jsonl` or `.json`), `.tsv` or `.parquet` file. Blank lines are skipped.

    columns: the names of a TSV file's columns; without them its first line has them. A `\\n` in a field is a newline.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)
        raise ConfigError(f"there is no file {path}; data files in {path.parent}: {', '.join(there) or 'none'}")
    if path.suffix in (".jsonl", ".json"):
        return [_read_json(line, f"{path}, line {number}") for number, line in _lines(path)]
    if path.suffix == ".tsv":
        return _read_tsv(path, columns)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows: list[Row] = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise ConfigError(f"{path} is not a readable Parquet file: {_one_line(error)}") from error
        return rows
    raise ConfigError(f"{path} is none of the files that can be read: {', '.join(SUFFIXES)}")


def read_first(root: str, names: Sequence[str], columns: Sequence[str] = ()) -> tuple[list[Row], str]:
    """The rows of the first of `names` that is a file in the directory `root`, and its path for messages."""
    directory = Path(root).expanduser()
    path = next((directory / name for name in names if (directory / name).is_file()), directory / names[0])
    return read_file(path, columns), str(path)


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


def texts(row: Row, name: str, where: str) -> list[str]:
    """The value of a column that is a list of texts."""
    values = row.get(name)
    if not isinstance(values, list):
        raise ConfigError(f"{where} has no list of texts in the column {name!r}; it has {', '.join(sorted(row))}")
    return [str(value) for value in values]


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        with path.open(encoding="utf-8") as lines:
            return [(number, line.rstrip("\n")) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_one_line(error)}") from error


def _read_tsv(path: Path, columns: Sequence[str]) -> list[Row]:
    lines = [(number, line.split("\t")) for number, line in _lines(path)]
    if not columns and lines:
        columns = lines.pop(0)[1]
    for number, fields in lines:
        if len(fields) != len(columns):
            raise ConfigError(
                f"{path}, line {number} has {len(fields)} columns, not the {len(columns)} of {', '.join(columns)}; "
                f"columns are separated by one tab each"
            )
    return [
        dict(zip(columns, (_ESCAPED_NEWLINE.sub("\n", field) for field in fields), strict=True)) for _, fields in lines
    ]


def _read_json(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is a JSON {type(row).__name__}, not an object with named columns")
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
