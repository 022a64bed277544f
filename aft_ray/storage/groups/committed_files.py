"""The committed group files of one round, in little memory: a round may have a million questions.

Invariant: a question is in at most one file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aft_ray.storage.groups.group_files import GroupFile, group_file_from_json
from aft_ray.storage.groups.id_column import IdColumn, id_column

# Questions that are looked up in a dictionary before they are merged into the sorted arrays.
_RECENT = 1 << 14


class CommittedFiles:
    """Descriptions of files by path, each packed, and an index of their questions.

    The index has 12 bytes a question: a 64-bit hash of its id, and the number of its file. What it finds is compared
    with the ids themselves.
    """

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}
        self._clear_index()

    def __len__(self) -> int:
        """The number of files."""
        return len(self._packed)

    def __contains__(self, path: str) -> bool:
        return path in self._packed

    def __iter__(self) -> Iterator[GroupFile]:
        """The descriptions, sorted by path."""
        return map(self.get, self.paths())

    @property
    def groups(self) -> int:
        """The number of groups in all files."""
        return sum(self._counts.values())

    def paths(self) -> list[str]:
        """The paths of the files, sorted."""
        return sorted(self._packed)

    def get(self, path: str) -> GroupFile:
        """The description of a file. Raises KeyError."""
        return group_file_from_json(json.loads(zlib.decompress(self._packed[path])))

    def add(self, file: GroupFile) -> bool:
        """Adds a file. Returns False, and leaves it out, when one of its questions is in another file."""
        if self.has_any(file.question_ids):
            return False
        # Compressed, lengths and ids take about 25 bytes a group with 8 candidates.
        self._packed[file.path] = zlib.compress(json.dumps(file.to_json()).encode(), 1)
        self._counts[file.path] = len(file.question_ids)
        self._index(file.path, file.question_ids)
        return True

    def remove(self, path: str) -> None:
        """Leaves a file out, if it is there. The index is made anew when it is needed next."""
        if self._packed.pop(path, None) is not None:
            del self._counts[path]
            self._is_indexed = False

    def has_any(self, question_ids: Collection[str]) -> bool:
        """Whether one of the questions is in a file."""
        if not self._is_indexed:
            self._clear_index()
            for file in self:
                self._index(file.path, file.question_ids)
        hashes = _hashes(question_ids)
        numbers = {self._recent[one] for one in hashes.tolist() if one in self._recent}
        numbers.update(self._numbers[self._places(hashes)].tolist())
        found = any(not set(self.get(self._paths[number]).question_ids).isdisjoint(question_ids) for number in numbers)
        return found or not self._same_hash.isdisjoint(question_ids)

    def mask(self, question_ids: Sequence[str]) -> np.ndarray:
        """For each question whether it is in a file, bool."""
        if not self._packed:
            return np.zeros(len(question_ids), dtype=bool)
        return np.asarray(pc.is_in(id_column(question_ids).array, value_set=self.question_ids().array))

    def question_ids(self) -> IdColumn:
        """The ids of all questions, file by file in the order of `paths`."""
        arrays = [pa.array(file.question_ids, pa.string()) for file in self]
        return IdColumn(pa.concat_arrays(arrays) if arrays else pa.array([], pa.string()))

    # ── the index ────────────────────────────────────────────────────────────────────────────────────────────────

    def _clear_index(self) -> None:
        self._paths: list[str] = []
        self._recent: dict[int, int] = {}  # hash → number of the file
        self._hashes = np.empty(0, dtype=np.int64)  # sorted
        self._numbers = np.empty(0, dtype=np.int32)
        self._same_hash: set[str] = set()  # ids whose hash another id had before; hardly ever any
        self._is_indexed = True

    def _index(self, path: str, question_ids: Sequence[str]) -> None:
        hashes, number = _hashes(question_ids), len(self._paths)
        self._paths.append(path)
        known = set(self._hashes[self._places(hashes)].tolist())
        for id, one in zip(question_ids, hashes.tolist(), strict=True):
            if one in known or one in self._recent:
                self._same_hash.add(id)
            else:
                self._recent[one] = number
        if len(self._recent) > _RECENT:
            self._merge()

    def _merge(self) -> None:
        hashes = np.fromiter(self._recent, np.int64, len(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int32, len(self._recent))
        order = np.argsort(hashes)
        places = np.searchsorted(self._hashes, hashes[order])
        self._hashes = np.insert(self._hashes, places, hashes[order])
        self._numbers = np.insert(self._numbers, places, numbers[order])
        self._recent = {}

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        """Where those of the hashes stand that are in the sorted arrays."""
        places = np.searchsorted(self._hashes, hashes)
        inside = places < len(self._hashes)
        found: np.ndarray = places[inside][self._hashes[places[inside]] == hashes[inside]]
        return found


def _hashes(question_ids: Collection[str]) -> np.ndarray:
    """A 64-bit hash of each id, which is another one in every process."""
    return np.fromiter(map(hash, question_ids), dtype=np.int64, count=len(question_ids))
