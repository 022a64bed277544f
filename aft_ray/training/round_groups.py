"""The groups of one round as a train worker sees them: the sizes of all, and the contents of those that it asks for.

Ids and sizes come from the ledger. Groups are read when they are trained on, a few row groups of Parquet at a time.

Invariants: every rank numbers the groups in the same way; what is read was compared with the digests in the ledger;
beside ids and sizes, memory does not grow with the round.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from aft_ray.storage.groups.group_files import GroupFile, decode_parts, outlines_of_file, read_group_file, read_parts
from aft_ray.storage.groups.id_column import IdColumn
from aft_ray.storage.groups.outlines import GroupOutline
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Group, groups_to_table, table_to_groups
from aft_ray.training.batching import BatchingError, GroupSize

if TYPE_CHECKING:  # the objectives import torch, and this module is used without it
    from aft_ray.objectives import Objective

# What is kept of row groups that were read, since groups of one row group may be in several steps.
_CACHE_BYTES = 64 << 20


class RoundGroups:
    """The groups of a round, numbered from 0.

    Args:
        ledger: one that has read all entries of the round.
        objective: decides which responses are trained on.
        say: takes a sentence about files that an earlier release recorded.

    Raises:
        BatchingError: a group has an empty prompt or an empty reference response.
        RunDirError: a file had to be read for its sizes, and is missing or corrupted.
    """

    def __init__(self, ledger: Ledger, round: int, objective: Objective, say: Callable[[str], None] = print) -> None:
        self._ledger, self._round = ledger, round
        self._paths: list[str] = []
        self._first: list[int] = []  # of each file, the number of its first group
        ids: list[pa.Array] = []
        prompts, lengths, counts = array("i"), array("i"), array("i")
        without_sizes = count = 0
        for file in ledger.group_files(round):
            self._paths.append(file.path)
            self._first.append(count)
            ids.append(pa.array(file.question_ids, pa.string()))
            without_sizes += not file.parts
            for id, outline in zip(file.question_ids, outlines_of_file(ledger.run_dir, file), strict=True):
                _check_trainable(id, outline)
                responses = trained_lengths(outline, objective)
                prompts.append(outline.prompt)
                lengths.extend(responses)
                counts.append(len(responses))
            count += len(file.question_ids)
        if without_sizes:
            say(
                f"round {round}: {without_sizes} files of an earlier release have no sizes in the ledger, "
                f"so all of them were read"
            )
        self.ids = IdColumn(pa.concat_arrays(ids) if ids else pa.array([], pa.string()))
        self._prompts, self._lengths = np.array(prompts, dtype=np.int32), np.array(lengths, dtype=np.int32)
        self._starts = np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))])
        # (file, part) → a table of its groups, or the bytes of a footer
        self._cache: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._cached_bytes = 0
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self.ids)

    def sizes(self, indexes: Iterable[int]) -> list[GroupSize]:
        """The sizes of some groups."""
        return [
            GroupSize(
                self.ids[index],
                int(self._prompts[index]),
                tuple(self._lengths[self._starts[index] : self._starts[index + 1]].tolist()),
            )
            for index in indexes
        ]

    def read_longest(self, count: int) -> list[Group]:
        """The groups with the longest trained responses, the longest first; of equal ones, by question id."""
        return self.read(self._longest(count))

    def _longest(self, count: int) -> list[int]:
        if not len(self):
            return []
        longest = np.maximum.reduceat(self._lengths, self._starts[:-1])
        least = np.sort(longest)[-min(count, len(longest))] if count else longest.max() + 1
        chosen = np.flatnonzero(longest >= least).tolist()
        return sorted(chosen, key=lambda index: (-int(longest[index]), self.ids[index]))[:count]

    def read(self, indexes: Iterable[int]) -> list[Group]:
        """Some groups, in the given order.

        Raises:
            RunDirError: a file is missing or corrupted; the message names it.
        """
        ordered = [int(index) for index in indexes]
        by_file: dict[int, list[int]] = defaultdict(list)
        for index in sorted(set(ordered)):
            by_file[bisect_right(self._first, index) - 1].append(index)
        groups: dict[int, Group] = {}
        for number, of_file in by_file.items():
            groups.update(zip(of_file, self._read_file(number, of_file), strict=True))
        return [groups[index] for index in ordered]

    def _read_file(self, number: int, indexes: Sequence[int]) -> list[Group]:
        """Groups of one file, in ascending order."""
        file = self._ledger.group_file(self._round, self._paths[number])
        starts = list(accumulate((part.groups for part in file.parts[:-1]), initial=0))[:-1] or [0]
        rows: dict[int, list[int]] = defaultdict(list)  # part → rows in it
        for row in (index - self._first[number] for index in indexes):
            part = bisect_right(starts, row) - 1
            rows[part].append(row - starts[part])
        tables = self._tables(number, file, list(rows))
        return [group for part in rows for group in table_to_groups(tables[part].take(rows[part]))]

    def _tables(self, number: int, file: GroupFile, parts: Sequence[int]) -> dict[int, pa.Table]:
        """The groups of some parts of a file, from the cache or from storage."""
        found = {part: self._cache[number, part] for part in parts if (number, part) in self._cache}
        missing = [part for part in parts if part not in found]
        if missing and not file.parts:
            found[0] = groups_to_table(read_group_file(self._ledger.run_dir, file))
        elif missing:
            footer = len(file.parts) - 1
            read = [*missing, footer] if (number, footer) not in self._cache else missing
            data = dict(zip(read, read_parts(self._ledger.run_dir, file, read), strict=True))
            self.bytes_read += sum(map(len, data.values()))
            data.setdefault(footer, self._cache.get((number, footer), b""))
            self._keep((number, footer), data[footer])
            found.update(zip(missing, decode_parts(file, data), strict=True))
        for part, table in found.items():
            self._keep((number, part), table)
        return found

    def _keep(self, key: tuple[int, int], value: Any) -> None:
        """Puts a part into the cache as the one that was used last, and drops those that were not used for longest."""
        if self._cache.pop(key, None) is None:
            self._cached_bytes += _size(value)
        self._cache[key] = value
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])


def _size(value: pa.Table | bytes) -> int:
    return len(value) if isinstance(value, bytes) else value.nbytes


def trained_lengths(outline: GroupOutline, objective: Objective) -> tuple[int, ...]:
    """The lengths of the distinct responses of a group that an objective trains on, the reference response first.

    They are the lengths of what `batching.trained_responses` gives for the group itself.
    """
    kept = [*range(len(outline.tokens))] if objective.uses_candidates else []
    if objective.right_candidates_only:
        kept = [index for index in kept if outline.kinds[index] == "r"]
    if objective.ranks_candidates and len({outline.rewards[index] for index in kept}) < 2:
        kept = []
    return (outline.reference, *(outline.tokens[index] for index in kept if outline.kinds[index].islower()))


def _check_trainable(question_id: str, outline: GroupOutline) -> None:
    if not outline.prompt or not outline.reference:
        part = "reference response" if outline.prompt else "prompt"
        raise BatchingError(f"question {question_id!r} has an empty {part}, so it cannot be trained on")
