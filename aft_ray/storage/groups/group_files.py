"""Writes groups as Parquet files and reads them back, whole or in parts.

A file has a row group of Parquet for each `_ROW_GROUP_BYTES` of its groups, so that a reader that needs few of them
reads little more. The description of a file has the digest of every such part.

Invariants: the name of a group file follows from its round and its questions; a file counts as intact only when its
groups would be written as exactly these bytes; nothing that was recorded is used before it is compared with its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.storage.groups.outlines import GroupOutline, outline_of, outlines_from_json, outlines_to_json
from aft_ray.storage.records import Group, groups_to_table, table_to_groups
from aft_ray.storage.run_dir import RunDir, RunDirError

# Most bytes of the groups in one row group, before compression; a larger group has one of its own. The description of a
# row group in the footer has 1.5 kB, so smaller ones would make files of short responses much larger.
_ROW_GROUP_BYTES = 32 << 10
# Hexadecimal digits of the digest of a part.
_PART_DIGITS = 32


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of bytes of a group file, from the end of the part before. The last part is the footer.

    Attributes:
        groups: groups in the part; none in the footer.
        end: its end in the file, bytes.
        sha256: the first half of its digest.
    """

    groups: int
    end: int
    sha256: str


@dataclass(frozen=True)
class GroupFile:
    """A Parquet file of groups, in the order of their questions' ids. `path` is relative to the run directory.

    Attributes:
        outlines: the outlines of the groups.
        parts: what can be read of the file without the rest.

    Both are empty for a file that an earlier release recorded.
    """

    round: int
    path: str
    sha256: str
    question_ids: tuple[str, ...]
    outlines: tuple[GroupOutline, ...] = ()
    parts: tuple[FilePart, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The description as the ledger writes it."""
        body = {"round": self.round, "path": self.path, "sha256": self.sha256, "question_ids": list(self.question_ids)}
        if not self.parts:
            return body
        parts = [[part.groups, part.end, part.sha256] for part in self.parts]
        return {**body, "outlines": outlines_to_json(self.outlines), "parts": parts}


def group_file_from_json(body: dict[str, Any]) -> GroupFile:
    """The description that `GroupFile.to_json` wrote."""
    return GroupFile(
        body["round"],
        body["path"],
        body["sha256"],
        tuple(body["question_ids"]),
        outlines_from_json(body["outlines"]) if "outlines" in body else (),
        tuple(FilePart(*part) for part in body.get("parts", ())),
    )


def write_group_file(run_dir: RunDir, groups: Sequence[Group]) -> GroupFile:
    """Writes groups of one round as a durable Parquet file. The ledger does not know the file yet.

    If an intact file of that name exists, it is kept: a Ray task that is run again must not replace a file that may
    be committed already. Many processes may call this at the same time.

    Raises:
        ValueError: There are no groups, or they are of several rounds, or two are of the same question.
    """
    if not groups:
        raise ValueError("a group file needs at least one group")
    round, ids = groups[0].round, tuple(sorted(group.question.id for group in groups))
    if len(set(ids)) < len(ids) or any(group.round != round for group in groups):
        raise ValueError("the groups of a file must be of one round and of different questions")
    path = _group_path(run_dir, round, ids)
    if run_dir.exists(path):
        data = run_dir.read_bytes(path)
        existing = _decode_if_intact(data)
        same_versions = {group.policy_version for group in existing} == {group.policy_version for group in groups}
        if same_versions and _group_path(run_dir, round, [group.question.id for group in existing]) == path:
            return _describe(path, data, existing)
    ordered = sorted(groups, key=lambda group: group.question.id)
    data = _encode(ordered)
    run_dir.write_bytes(path, data)
    return _describe(path, data, ordered)


def read_group_file(run_dir: RunDir, file: GroupFile) -> list[Group]:
    """The groups of a committed file. Raises RunDirError, which names a missing or corrupted file."""
    try:
        return _decode(_committed_bytes(run_dir, file))
    except RunDirError as problem:
        raise _as_read(problem) from None


def read_parts(run_dir: RunDir, file: GroupFile, numbers: Sequence[int]) -> list[bytes]:
    """The bytes of some parts of a committed file that has parts.

    Raises:
        RunDirError: the file is missing, or one of these parts is corrupted; the message names the file.
    """
    bounds = list(pairwise([0, *(part.end for part in file.parts)]))
    try:
        found = run_dir.read_ranges(file.path, [bounds[number] for number in numbers])
    except FileNotFoundError:
        raise _as_read(RunDirError(f"{run_dir.uri(file.path)} is missing")) from None
    if any(_part_digest(data) != file.parts[number].sha256 for number, data in zip(numbers, found, strict=True)):
        raise _as_read(
            RunDirError(f"{run_dir.uri(file.path)} is corrupted: the sha256 of a part is not the recorded one")
        )
    return found


def decode_parts(file: GroupFile, parts: Mapping[int, bytes]) -> list[pa.Table]:
    """The groups of some parts, one table for each part but the footer, which must be among them.

    Args:
        parts: what `read_parts` returned, by number.
    """
    bounds = list(pairwise([0, *(part.end for part in file.parts)]))
    # The decoder sees a file of the whole size, of which only these parts were filled in; untouched pages cost nothing.
    whole = np.zeros(file.parts[-1].end, dtype=np.uint8)
    for number, data in parts.items():
        start, end = bounds[number]
        whole[start:end] = np.frombuffer(data, dtype=np.uint8)
    parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(whole)))
    return [parquet.read_row_group(number) for number in parts if number < len(file.parts) - 1]


def outlines_of_file(run_dir: RunDir, file: GroupFile) -> tuple[GroupOutline, ...]:
    """The outlines of the groups of a committed file. One that an earlier release recorded is read for them.

    Raises:
        RunDirError: such a file is missing or corrupted.
    """
    return file.outlines if file.parts else tuple(map(outline_of, read_group_file(run_dir, file)))


def verify_group_file(run_dir: RunDir, file: GroupFile) -> str | None:
    """The problem with a committed file in one sentence; None when its contents are as recorded."""
    try:
        _committed_bytes(run_dir, file)
    except RunDirError as problem:
        return str(problem)
    return None


def describe_uncommitted_file(run_dir: RunDir, path: str, round: int, policy_version: int | None) -> GroupFile | None:
    """The description of a file that was written but not committed.

    Args:
        policy_version: The version that the round is sampled with; None when it is not known.

    Returns:
        None unless the file is intact, has its right name, and has groups of this round and version alone.
    """
    data = run_dir.read_bytes(path)
    groups = _decode_if_intact(data)
    if not groups or _group_path(run_dir, round, [group.question.id for group in groups]) != path:
        return None
    if any(group.round != round or policy_version not in (None, group.policy_version) for group in groups):
        return None
    return _describe(path, data, groups)


def _describe(path: str, data: bytes, groups: Sequence[Group]) -> GroupFile:
    """The description of a file whose bytes are `data` and whose groups, in their order, are `groups`."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    parts: list[FilePart] = []
    for number in range(metadata.num_row_groups):
        row_group = metadata.row_group(number)
        columns = [row_group.column(column) for column in range(row_group.num_columns)]
        starts = [one.dictionary_page_offset or one.data_page_offset for one in columns]
        end = max(start + one.total_compressed_size for start, one in zip(starts, columns, strict=True))
        parts.append(FilePart(row_group.num_rows, end, _part_digest(data[parts[-1].end if parts else 0 : end])))
    parts.append(FilePart(0, len(data), _part_digest(data[parts[-1].end :])))
    return GroupFile(
        groups[0].round,
        path,
        hashlib.sha256(data).hexdigest(),
        tuple(group.question.id for group in groups),
        tuple(map(outline_of, groups)),
        tuple(parts),
    )


def _part_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_PART_DIGITS]


def _committed_bytes(run_dir: RunDir, file: GroupFile) -> bytes:
    try:
        data = run_dir.read_bytes(file.path)
    except FileNotFoundError:
        raise RunDirError(f"{run_dir.uri(file.path)} is missing") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise RunDirError(f"{run_dir.uri(file.path)} is corrupted: its sha256 is not the recorded one")
    return data


def _as_read(problem: RunDirError) -> RunDirError:
    return RunDirError(f"{problem}; start the run again to have its questions sampled again")


def _group_path(run_dir: RunDir, round: int, question_ids: Collection[str]) -> str:
    key = json.dumps([round, sorted(question_ids)], ensure_ascii=False).encode()
    return f"{run_dir.groups(round)}/{hashlib.sha256(key).hexdigest()[:24]}.parquet"


def _encode(groups: Sequence[Group]) -> bytes:
    """The bytes of a file with these groups. Equal groups give equal bytes."""
    table, sink = groups_to_table(groups), pa.BufferOutputStream()
    # Statistics of columns of texts and tokens serve nobody, and would be half of the footer.
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", write_page_checksum=True, write_statistics=False
    ) as writer:
        start = 0
        for rows in _row_groups(groups):
            writer.write_table(table.slice(start, rows))
            start += rows
    return bytes(sink.getvalue().to_pybytes())


def _encode_as_before(groups: Sequence[Group]) -> bytes:
    """The bytes that releases up to 0.2 wrote, of which a run that they began may have a file that is not recorded."""
    sink = pa.BufferOutputStream()
    pq.write_table(groups_to_table(groups), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _row_groups(groups: Sequence[Group]) -> list[int]:
    """How many groups each row group has."""
    counts = [0]
    size = 0
    for group in groups:
        more = _bytes_of(group)
        if counts[-1] and size + more > _ROW_GROUP_BYTES:
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += more
    return counts


def _bytes_of(group: Group) -> int:
    """About how many bytes a group has in memory: four for each token, and its texts."""
    tokens = len(group.prompt_token_ids) + len(group.reference_token_ids)
    tokens += sum(len(candidate.token_ids) for candidate in group.candidates)
    texts = len(group.question.text) + len(group.question.reference)
    return 4 * tokens + texts + sum(len(candidate.text) for candidate in group.candidates)


def _decode(data: bytes) -> list[Group]:
    return table_to_groups(pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read())


def _decode_if_intact(data: bytes) -> list[Group]:
    """The groups of a file for which no digest was recorded; empty when it is damaged.

    The checksums of Parquet do not cover the footer, so the groups are encoded again and compared byte by byte.
    """
    try:
        groups = _decode(data)
        return groups if data in (_encode(groups), _encode_as_before(groups)) else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
        return []
