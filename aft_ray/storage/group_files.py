"""Writes groups as Parquet files and reads them back.

Invariant: the name of a group file follows from its round and its questions, and a file counts as intact only when its
groups would be written as exactly these bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.storage.records import Group, groups_to_table, table_to_groups
from aft_ray.storage.run_dir import RunDir, RunDirError


@dataclass(frozen=True)
class GroupFile:
    """A Parquet file of groups. `path` is relative to the run directory."""

    round: int
    path: str
    sha256: str
    question_ids: tuple[str, ...]


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
            return GroupFile(round, path, hashlib.sha256(data).hexdigest(), ids)
    data = _encode(sorted(groups, key=lambda group: group.question.id))
    run_dir.write_bytes(path, data)
    return GroupFile(round, path, hashlib.sha256(data).hexdigest(), ids)


def read_group_file(run_dir: RunDir, file: GroupFile) -> list[Group]:
    """The groups of a committed file. Raises RunDirError, which names a missing or corrupted file."""
    try:
        return _decode(_committed_bytes(run_dir, file))
    except RunDirError as problem:
        raise RunDirError(f"{problem}; start the run again to have its questions sampled again") from None


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
    ids = tuple(group.question.id for group in groups)
    if not groups or _group_path(run_dir, round, ids) != path:
        return None
    if any(group.round != round or policy_version not in (None, group.policy_version) for group in groups):
        return None
    return GroupFile(round, path, hashlib.sha256(data).hexdigest(), ids)


def _committed_bytes(run_dir: RunDir, file: GroupFile) -> bytes:
    try:
        data = run_dir.read_bytes(file.path)
    except FileNotFoundError:
        raise RunDirError(f"{run_dir.uri(file.path)} is missing") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise RunDirError(f"{run_dir.uri(file.path)} is corrupted: its sha256 is not the recorded one")
    return data


def _group_path(run_dir: RunDir, round: int, question_ids: Collection[str]) -> str:
    key = json.dumps([round, sorted(question_ids)], ensure_ascii=False).encode()
    return f"{run_dir.groups(round)}/{hashlib.sha256(key).hexdigest()[:24]}.parquet"


def _encode(groups: Sequence[Group]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(groups_to_table(groups), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _decode(data: bytes) -> list[Group]:
    return table_to_groups(pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read())


def _decode_if_intact(data: bytes) -> list[Group]:
    """The groups of a file for which no digest was recorded; empty when it is damaged.

    The checksums of Parquet do not cover the footer, so the groups are encoded again and compared byte by byte.
    """
    try:
        groups = _decode(data)
        return groups if _encode(groups) == data else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
        return []
