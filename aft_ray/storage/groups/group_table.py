"""The questions of a run, as groups without candidates, outside of Python's memory.

A training split may have a million questions. As Python objects their tokens would take ten kilobytes each; here they
lie as Arrow in a temporary file that is mapped into memory, and become objects when they are asked for.

Invariant: a table does not change; `select` and `of_round` give views of the same rows.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aft_ray.config.messages import first_line
from aft_ray.storage.groups.id_column import IdColumn
from aft_ray.storage.records import GROUP_SCHEMA, Group, groups_to_table, table_to_groups
from aft_ray.storage.run_dir import RunDirError

# Rows of a record batch in the file; all have as many but the last.
_BATCH = 1024
# Groups that are objects at the same time while all are gone through.
_BLOCK = 256


class GroupTable(Sequence[Group]):
    """A sequence of groups that are made when they are asked for. `GroupTable.of` makes one."""

    def __init__(self, batches: Sequence[pa.RecordBatch], rows: np.ndarray, numbers: dict[str, int]) -> None:
        self._batches = batches
        self._rows = rows  # which rows of the batches the table has, in its order
        self._numbers = numbers  # round and policy version, where they are other ones than in the batches

    @classmethod
    def of(cls, groups: Iterable[Group]) -> GroupTable:
        """The groups as a table; a table is returned as it is. Raises RunDirError when the disk is full."""
        if isinstance(groups, GroupTable):
            return groups
        rest = iter(groups)
        # The file has no name after this, and its space is free when no table uses it any more.
        with tempfile.NamedTemporaryFile(prefix="aft-ray-questions-") as file:
            with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_file(sink, GROUP_SCHEMA) as writer:
                while block := list(itertools.islice(rest, _BATCH)):
                    _write(writer, block)
            reader = pa.ipc.open_file(pa.memory_map(file.name))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return cls(batches, np.arange(sum(batch.num_rows for batch in batches)), {})

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────────────

    def select(self, positions: np.ndarray) -> GroupTable:
        """The groups at some positions, in the order of these."""
        return GroupTable(self._batches, self._rows[positions], self._numbers)

    def of_round(self, round: int, policy_version: int | None = None) -> GroupTable:
        """The same questions in a round, and sampled by a version, if one is given."""
        numbers = {"round": round} | ({} if policy_version is None else {"policy_version": policy_version})
        return GroupTable(self._batches, self._rows, self._numbers | numbers)

    def sorted_by_id(self) -> GroupTable:
        """The groups in the order of their questions' ids."""
        return self.select(np.asarray(pc.sort_indices(self.ids.array)))

    # ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def ids(self) -> IdColumn:
        """The ids of the questions."""
        return IdColumn(self._question_column("id"))

    @property
    def tasks(self) -> pa.StringArray:
        """The name of each question's task."""
        return self._question_column("task")

    def _question_column(self, name: str) -> pa.StringArray:
        if not len(self):
            return pa.array([], pa.string())
        columns = [batch.column("question").field(name) for batch in self._batches]
        return pa.concat_arrays(columns).take(pa.array(self._rows))

    def block(self, start: int, size: int) -> pa.Table:
        """At most `size` groups from a position on, as an Arrow table of `GROUP_SCHEMA`."""
        rows = self._rows[start : start + size].tolist()
        slices = [self._batches[row // _BATCH].slice(row % _BATCH, 1) for row in rows]
        table = pa.Table.from_batches(slices, GROUP_SCHEMA).combine_chunks()
        for name, number in self._numbers.items():
            column = GROUP_SCHEMA.get_field_index(name)
            table = table.set_column(column, GROUP_SCHEMA.field(name), pa.array([number] * len(rows), pa.int32()))
        return table

    # ── the groups themselves ────────────────────────────────────────────────────────────────────────────────────

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Group: ...

    @overload
    def __getitem__(self, index: slice) -> GroupTable: ...

    def __getitem__(self, index: int | slice) -> Group | GroupTable:
        if isinstance(index, slice):
            return GroupTable(self._batches, self._rows[index], self._numbers)
        position = range(len(self))[index]
        return table_to_groups(self.block(position, 1))[0]

    def __iter__(self) -> Iterator[Group]:
        for start in range(0, len(self), _BLOCK):
            yield from table_to_groups(self.block(start, _BLOCK))

    def __eq__(self, other: Any) -> bool:
        """Whether the groups are equal, one by one."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GroupTable of {len(self)} groups"


def _write(writer: pa.RecordBatchWriter, groups: Sequence[Group]) -> None:
    try:
        writer.write_batch(groups_to_table(groups).combine_chunks().to_batches()[0])
    except OSError as error:
        raise RunDirError(
            f"cannot write the questions to {tempfile.gettempdir()}: {first_line(error)}; set TMPDIR to a directory "
            f"with room for them"
        ) from error
