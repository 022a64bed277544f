"""Ids of questions as an Arrow array: about 20 bytes each, where a list of texts has 80."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import pyarrow as pa

# Ids that are texts at the same time while all are gone through.
_BLOCK = 4096


class IdColumn(Sequence[str]):
    """A sequence of ids. `array` is an Arrow array of texts."""

    def __init__(self, array: pa.StringArray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> IdColumn: ...

    def __getitem__(self, index: int | slice) -> str | IdColumn:
        return IdColumn(self.array[index]) if isinstance(index, slice) else self.array[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.array), _BLOCK):
            yield from self.array.slice(start, _BLOCK).to_pylist()


def id_column(ids: Sequence[str]) -> IdColumn:
    """The ids as a column; a column is returned as it is."""
    return ids if isinstance(ids, IdColumn) else IdColumn(pa.array(ids, pa.string()))
