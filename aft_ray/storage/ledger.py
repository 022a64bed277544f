"""Records which groups exist and which rounds were trained, exactly once.

The ledger is two append-only logs of small immutable JSON entries. Each log has one writer: the orchestrator writes
`sampling-*`, training rank 0 writes `training-*`. The state is what a replay of the logs gives. Every entry contains a
checksum of itself; an entry with a wrong checksum is renamed to `*.corrupt` and counts as never written.

Invariants: a (round, question) is in at most one committed group file; a file is committed only after it is durable;
the number of an entry is never used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from aft_ray.storage.groups.committed_files import CommittedFiles
from aft_ray.storage.groups.group_files import (
    GroupFile,
    describe_uncommitted_file,
    group_file_from_json,
    outlines_of_file,
    read_group_file,
    verify_group_file,
)
from aft_ray.storage.groups.id_column import id_column
from aft_ray.storage.groups.outlines import GroupOutline
from aft_ray.storage.records import Group
from aft_ray.storage.run_dir import LEDGER, RunDir, RunDirError

# Entries that are in memory at once while the logs are read.
_ENTRIES = 64


@dataclass(frozen=True)
class FailedQuestion:
    """A question that could not be sampled in a round after `attempts` attempts."""

    round: int
    question_id: str
    reason: str
    attempts: int


@dataclass(frozen=True)
class SampledRound:
    """A round of which every question has a group or has failed. `groups` and `failed` are counts."""

    round: int
    policy_version: int
    groups: int
    failed: int
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointRecord:
    """A durable training state, after `step` optimiser steps of `round`.

    Attributes:
        checkpoint: its directory, relative to the run directory.
        complete: whether these are all steps of the round, and the version that it publishes is durable.
        metrics: what was measured in these steps.
    """

    round: int
    step: int
    checkpoint: str
    complete: bool
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def next_round(self) -> int:
        """The round that training continues with from this state."""
        return self.round + 1 if self.complete else self.round


@dataclass(frozen=True)
class RoundAudit:
    """What `Ledger.open_round` found: the number of groups, and one sentence for each file that was not in order."""

    round: int
    groups: int
    voided: tuple[str, ...] = ()
    adopted: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


class Ledger:
    """The state of the ledger as of the last `refresh`, plus the entries that this process has appended since.

    Args:
        logs: those that are read; one that only training writes is small.
    """

    def __init__(self, run_dir: RunDir, logs: Collection[str] = ("sampling", "training")) -> None:
        self.run_dir = run_dir
        self._logs = frozenset(logs)
        self._seen: set[str] = set()
        self._next = {"sampling": 0, "training": 0}
        self._files: dict[int, CommittedFiles] = {}
        self._failed: dict[int, dict[str, FailedQuestion]] = {}
        self._sampled: dict[int, SampledRound] = {}
        self._skipped: dict[int, frozenset[str]] = {}
        self._versions: dict[int, int] = {}
        self._checkpoints: list[CheckpointRecord] = []
        self.corrupt_entries: list[str] = []  # URIs of the entries that were set aside
        self.refresh()

    # ── sampling: written by the orchestrator ────────────────────────────────────────────────────────────────────

    def open_round(self, round: int) -> RoundAudit:
        """Makes the group files and the ledger agree before a round is sampled.

        Only the orchestrator calls this, while no sampling task runs. A committed file that is missing or damaged is
        voided, and its questions are pending again. A file that was written but not committed, because the driver
        died in between, is committed if it is intact and all its questions are pending; otherwise it is deleted.
        Temporary files of killed writers are deleted.
        """
        self.refresh()
        voided, adopted, deleted = [], [], []
        for path in self._committed(round).paths():
            file = self._committed(round).get(path)
            if problem := verify_group_file(self.run_dir, file):
                self._append("sampling", "void", {"round": round, "path": file.path})
                self.run_dir.delete(file.path)
                voided.append(f"{problem}; its {len(file.question_ids)} questions are sampled again")
        folder = self.run_dir.groups(round)
        for name in self.run_dir.listdir(folder):
            path = f"{folder}/{name}"
            if path in self._committed(round) or not name.endswith(".parquet"):
                continue
            uncommitted = describe_uncommitted_file(self.run_dir, path, round, self.policy_version(round))
            if uncommitted and self.commit(uncommitted):
                adopted.append(f"{self.run_dir.uri(path)} was written but not recorded: recorded now")
            else:
                self.run_dir.delete(path)
                deleted.append(f"{self.run_dir.uri(path)} was not recorded and is of no use: deleted")
        self.run_dir.delete_leftovers(folder)
        self.run_dir.delete_leftovers(LEDGER, prefix="sampling-")
        return RoundAudit(round, self._committed(round).groups, tuple(voided), tuple(adopted), tuple(deleted))

    def commit(self, file: GroupFile) -> bool:
        """Records a written group file.

        Returns:
            False when one of its questions is in a committed file already. The file is deleted then, unless it is
            that committed file itself.
        """
        if self._committed(file.round).has_any(file.question_ids):
            if file.path not in self._committed(file.round):
                self.run_dir.delete(file.path)
            return False
        self._append("sampling", "group", file.to_json())
        return True

    def record_failed(self, failed: FailedQuestion) -> None:
        """Records that a question could not be sampled in its round; `retry_failed` makes it pending again."""
        self._append("sampling", "park", asdict(failed))

    def retry_failed(self, round: int) -> None:
        """Makes the failed questions of a round pending again, which a resumed run does."""
        if self._failed.get(round):
            self._append("sampling", "unpark", {"round": round})

    def record_skipped(self, round: int, question_ids: Collection[str]) -> None:
        """Records which questions a round leaves out, before it asks the first one. They are not pending then.

        Raises:
            ValueError: It is recorded already.
        """
        if round in self._skipped:
            raise ValueError(f"which questions round {round} leaves out is recorded already")
        self._append("sampling", "skipped", {"round": round, "question_ids": sorted(question_ids)})

    def record_policy_version(self, round: int, version: int) -> None:
        """Records the policy version that samples a round, so that a resumed round uses the same weights.

        Raises:
            ValueError: Another version is recorded for the round.
        """
        known = self.policy_version(round)
        if known is not None and known != version:
            raise ValueError(f"round {round} is being sampled with policy version {known}, not {version}")
        if known is None:
            self._append("sampling", "policy_version", {"round": round, "version": version})

    def complete_sampling(self, round: int, policy_version: int, stats: dict[str, Any]) -> SampledRound:
        """Records that a round is sampled. The caller has checked with `pending` that no question is left."""
        groups, failed = self._counts(round)
        self._append(
            "sampling",
            "sampled",
            {"round": round, "policy_version": policy_version, "groups": groups, "parked": failed, "stats": stats},
        )
        return SampledRound(round, policy_version, groups, failed, stats)

    def pending(self, round: int, question_ids: Sequence[str]) -> list[str]:
        """The questions that neither have a group nor have failed nor are left out, in the given order."""
        return [question_ids[index] for index in self.pending_indexes(round, question_ids)]

    def pending_indexes(self, round: int, question_ids: Sequence[str]) -> np.ndarray:
        """Where the pending questions stand among the given ones, in ascending order, int64."""
        ids = id_column(question_ids)
        done = self._committed(round).mask(ids)
        for others in (self._failed.get(round), self._skipped.get(round)):
            if others:
                done |= np.fromiter((id in others for id in ids), dtype=bool, count=len(ids))
        return np.flatnonzero(~done)

    def group_files(self, round: int) -> Iterator[GroupFile]:
        """The committed group files of a round, sorted by path."""
        return iter(self._committed(round))

    def group_file(self, round: int, path: str) -> GroupFile:
        """A committed group file of a round. Raises KeyError."""
        return self._committed(round).get(path)

    def count_groups(self, round: int) -> int:
        """The number of groups in the committed files of a round."""
        return self._committed(round).groups

    def outlines(self, round: int) -> Iterator[tuple[str, GroupOutline]]:
        """Each question of a round that has a group, and the outline of the group, file by file.

        A file that an earlier release recorded is read for it.

        Raises:
            RunDirError: Such a file is missing or corrupted.
        """
        for file in self._committed(round):
            yield from zip(file.question_ids, outlines_of_file(self.run_dir, file), strict=True)

    def failed_questions(self, round: int) -> list[FailedQuestion]:
        """The failed questions of a round, sorted by question id."""
        return sorted(self._failed.get(round, {}).values(), key=lambda failed: failed.question_id)

    def skipped(self, round: int) -> frozenset[str] | None:
        """The questions that a round leaves out; None when that is not recorded."""
        return self._skipped.get(round)

    def policy_version(self, round: int) -> int | None:
        """The policy version that samples a round; None when none is recorded."""
        return self._versions.get(round)

    def sampled(self, round: int) -> SampledRound | None:
        """The record of a sampled round; None when it is not sampled, or its questions have changed since."""
        sampled = self._sampled.get(round)
        return sampled if sampled and (sampled.groups, sampled.failed) == self._counts(round) else None

    def _counts(self, round: int) -> tuple[int, int]:
        return self._committed(round).groups, len(self._failed.get(round, {}))

    def _committed(self, round: int) -> CommittedFiles:
        return self._files.setdefault(round, CommittedFiles())

    def read_groups(self, round: int, question_ids: Collection[str] | None = None) -> list[Group]:
        """The groups of a round, or those of some questions, sorted by question id.

        Raises:
            RunDirError: A file is missing or corrupted.
            KeyError: A question has no group.
        """
        wanted = None if question_ids is None else set(question_ids)
        groups: list[Group] = []
        for file in self._committed(round):
            if wanted is None or not wanted.isdisjoint(file.question_ids):
                read = read_group_file(self.run_dir, file)
                groups += [group for group in read if wanted is None or group.question.id in wanted]
        if wanted is not None and (missing := sorted(wanted - {group.question.id for group in groups})):
            raise KeyError(f"round {round} has no group of {len(missing)} questions, among them {missing[0]!r}")
        return sorted(groups, key=lambda group: group.question.id)

    def iter_groups(self, round: int) -> Iterator[list[Group]]:
        """The groups of a round, one file after the other, so that not all are in memory.

        Raises:
            RunDirError: A file is missing or corrupted.
        """
        for file in self._committed(round):
            yield read_group_file(self.run_dir, file)

    # ── training: written by rank 0 ──────────────────────────────────────────────────────────────────────────────

    def record_checkpoint(self, record: CheckpointRecord) -> None:
        """Records a training state. Raises RunDirError unless its directory is complete."""
        if not self.run_dir.is_complete(record.checkpoint):
            raise RunDirError(f"{self.run_dir.uri(record.checkpoint)} has no manifest, so it is no checkpoint yet")
        self._append("training", "trained", asdict(record))

    def last_checkpoint(self, damaged: Collection[str] = ()) -> CheckpointRecord | None:
        """The latest training state whose directory still exists: after a round, or inside one.

        Args:
            damaged: directories that are left out.
        """
        newest_first = (record for record in reversed(self._checkpoints) if record.checkpoint not in damaged)
        return next((record for record in newest_first if self.run_dir.is_complete(record.checkpoint)), None)

    def checkpoints(self) -> list[CheckpointRecord]:
        """All recorded training states, oldest first, including those whose directories were deleted."""
        return list(self._checkpoints)

    def trained_rounds(self) -> list[int]:
        """The rounds whose training is recorded as done."""
        return sorted({record.round for record in self._checkpoints if record.complete})

    def first_untrained_round(self, has_vft: bool) -> int:
        """The round that training starts or resumes with; one more than the last round when all are trained.

        A round that has a training state in it, and none after it, is resumed after the steps of that state.

        Args:
            has_vft: Whether the run has a round 0, the supervised fine-tuning.
        """
        last = self.last_checkpoint()
        return last.next_round if last else (0 if has_vft else 1)

    # ── entries ──────────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self) -> None:
        """Reads the entries that other processes have written since the last call."""
        new = []
        for name in self.run_dir.listdir(LEDGER):
            log, _, rest = name.partition("-")
            number = rest.partition("-")[0]
            if log in self._next and number.isdigit():
                self._next[log] = max(self._next[log], int(number) + 1)
                if log in self._logs and name.endswith(".json") and name not in self._seen:
                    new.append(name)
        with ThreadPoolExecutor(16) as pool:  # an object store takes tens of milliseconds for each entry
            for start in range(0, len(new), _ENTRIES):  # all entries at once would be a million questions as objects
                names = new[start : start + _ENTRIES]
                for name, entry in zip(names, pool.map(self._read_entry, names), strict=True):
                    self._seen.add(name)
                    if entry is not None:
                        self._replay(entry["kind"], entry["body"])

    def _append(self, log: str, kind: str, body: dict[str, Any]) -> None:
        body = json.loads(json.dumps(body))  # the form in which it will be read: keys are strings, sequences are lists
        data = _encode_entry(kind, body)
        # The name contains a checksum, so that a second writer, should there ever be one, overwrites no entry.
        name = f"{log}-{self._next[log]:08d}-{hashlib.sha256(data).hexdigest()[:8]}.json"
        self.run_dir.write_bytes(f"{LEDGER}/{name}", data)
        self._seen.add(name)
        self._next[log] += 1
        self._replay(kind, body)

    def _read_entry(self, name: str) -> dict[str, Any] | None:
        """An entry; None when it is damaged, in which case its file is renamed to `*.corrupt`."""
        path = f"{LEDGER}/{name}"
        try:
            data = self.run_dir.read_bytes(path)
            entry: dict[str, Any] = json.loads(data)
            if _encode_entry(entry["kind"], entry["body"]) == data:
                return entry
        except FileNotFoundError:  # another process has renamed it
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        try:
            self.run_dir.rename(path, f"{path}.corrupt")
        except FileNotFoundError:
            return None
        self.corrupt_entries.append(self.run_dir.uri(f"{path}.corrupt"))
        return None

    def _replay(self, kind: str, body: dict[str, Any]) -> None:
        """Applies an entry to the state. Files keep the names of the first release: `park`, `unpark`, `parked`."""
        round = body["round"]
        if kind == "group":
            file = group_file_from_json(body)
            if self._committed(round).add(file):  # the first commit of a question counts
                for id in file.question_ids:
                    self._failed.get(round, {}).pop(id, None)
        elif kind == "void":
            self._committed(round).remove(body["path"])
        elif kind == "park":
            if not self._committed(round).has_any([body["question_id"]]):
                self._failed.setdefault(round, {})[body["question_id"]] = FailedQuestion(**body)
        elif kind == "unpark":
            self._failed.pop(round, None)
        elif kind == "skipped":
            self._skipped.setdefault(round, frozenset(body["question_ids"]))
        elif kind == "policy_version":
            self._versions[round] = body["version"]
        elif kind == "sampled":
            self._sampled[round] = SampledRound(
                round, body["policy_version"], body["groups"], body["parked"], body.get("stats", {})
            )
        elif kind == "trained":
            self._checkpoints.append(CheckpointRecord(**body))
        else:
            raise RunDirError(f"{self.run_dir.uri(LEDGER)} has an entry of the kind {kind!r}: a newer aft_ray wrote it")


def _encode_entry(kind: str, body: dict[str, Any]) -> bytes:
    """The only bytes that an entry of this kind and body may consist of, including its checksum."""
    payload = json.dumps({"kind": kind, "body": body}, sort_keys=True, ensure_ascii=False)
    checksum = hashlib.sha256(payload.encode()).hexdigest()
    return (json.dumps({"body": body, "kind": kind, "sha256": checksum}, sort_keys=True, ensure_ascii=False)).encode()
