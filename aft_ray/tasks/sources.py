"""Reads rows of local JSON-lines, TSV and Parquet files and of data sets on the Hugging Face hub.

Invariant: a problem with a source raises one ConfigError that names the file and, where there is one, the line.
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
# How a TSV file writes a newline inside a field. Some files escape the backslash a second time.
_ESCAPED_NEWLINE = re.compile(r"\\+n")


def read_file(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a JSON-lines (`.jsonl` or `.json`), `.tsv` or `.parquet` file. Blank lines are skipped.

    Args:
        columns: The column names of a TSV file; by default its first line has them. `\\n` in a field of a TSV file
            becomes a newline.
    """
    if not path.is_file():
        files = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)
        raise ConfigError(f"there is no file {path}; data files in {path.parent}: {', '.join(files) or 'none'}")
    if path.suffix in (".jsonl", ".json"):
        return [_read_json(line, f"{path}, line {number}") for number, line in _read_lines(path)]
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


def read_first(directory: str, names: Sequence[str], columns: Sequence[str] = ()) -> tuple[list[Row], str]:
    """The rows of the first of `names` that exists in the directory, and the path of that file for messages."""
    root = Path(directory).expanduser()
    path = next((root / name for name in names if (root / name).is_file()), root / names[0])
    return read_file(path, columns), str(path)


def read_hub(name: str, split: str, config: str | None = None) -> list[Row]:
    """The rows of a split of a Hugging Face data set, from the hub or from its local cache."""
    import datasets

    try:
        rows: list[Row] = datasets.load_dataset(name, config, split=split).to_list()
    except Exception as error:  # The errors of the hub's client have no common base class.
        raise ConfigError(
            f"cannot load the split {split!r} of the data set {name} from the Hugging Face hub "
            f"({type(error).__name__}: {_one_line(error)}); set data.path to a directory with local files"
        ) from error
    return rows


def column_text(row: Row, name: str, key: str, where: str) -> str:
    """The value of a column as text.

    Args:
        key: The config key, or the task, that names the column; for messages.
        where: The file and line of the row; for messages.
    """
    if name not in row:
        raise ConfigError(f"{where} has no column {name!r}, which {key} names; it has {', '.join(sorted(row))}")
    if row[name] is None:
        raise ConfigError(f"{where} has an empty column {name!r}, which {key} names")
    return str(row[name])


def column_texts(row: Row, name: str, where: str) -> list[str]:
    """The value of a column that holds a list of texts."""
    values = row.get(name)
    if not isinstance(values, list):
        raise ConfigError(f"{where} has no list of texts in the column {name!r}; it has {', '.join(sorted(row))}")
    return [str(value) for value in values]


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """The numbers and texts of the lines that are not blank."""
    try:
        with path.open(encoding="utf-8") as lines:
            return [(number, line.rstrip("\n")) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_one_line(error)}") from error


def _read_tsv(path: Path, columns: Sequence[str]) -> list[Row]:
    lines = [(number, line.split("\t")) for number, line in _read_lines(path)]
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
