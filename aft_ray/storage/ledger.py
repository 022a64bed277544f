"""Which groups exist and which rounds were trained: exactly once.

The ledger is two append-only logs of small immutable JSON entries, each with one writer: the conductor writes
`sampling-*`, training rank 0 writes `training-*`. The state is what a replay of the logs gives. Every entry carries a
checksum of itself; one that fails it is set aside as `*.corrupt` and counts as never written.

Invariants: a (round, question) is in at most one committed group file; a file is committed only after it is durable;
an entry's number is never used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.storage.records import Group, groups_to_table, table_to_groups
from aft_ray.storage.run_dir import LEDGER, RunDir, RunDirError


@dataclass(frozen=True)
class GroupFile:
    """A Parquet file of groups. `path` is relative to the run directory."""

    round: int
    path: str
    sha256: str
    question_ids: tuple[str, ...]


@dataclass(frozen=True)
class FailedQuestion:
    """A question given up in a round after `attempts` tries."""

    round: int
    question_id: str
    reason: str
    attempts: int


@dataclass(frozen=True)
class Sampled:
    """A closed round: every question was grouped or parked."""

    round: int
    policy_version: int
    groups: int
    parked: int
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A durable training state: `step` optimiser steps into `round`; `complete` when the round's training is done."""

    round: int
    step: int
    checkpoint: str
    complete: bool
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundAudit:
    """What opening a round found: groups on disk, and one sentence for each thing that was not in order."""

    round: int
    groups: int
    voided: tuple[str, ...] = ()
    adopted: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


def write_group_file(run_dir: RunDir, groups: Sequence[Group]) -> GroupFile:
    """Writes groups of one round as a Parquet file, durably, and describes it; the ledger does not know it yet.

    The name follows from the round and the questions. When a file of that name reads well, it is kept: a task that
    is run again must not replace a file that may be committed already. Safe to call in many processes.
    """
    if not groups:
        raise ValueError("a group file needs at least one group")
    round, ids = groups[0].round, tuple(sorted(group.question.id for group in groups))
    if len(set(ids)) < len(ids) or any(group.round != round for group in groups):
        raise ValueError("the groups of a file must be of one round and of different questions")
    path = _group_path(run_dir, round, ids)
    if run_dir.exists(path):
        data = run_dir.read_bytes(path)
        existing = _intact(data)
        same = {group.policy_version for group in existing} == {group.policy_version for group in groups}
        if same and _group_path(run_dir, round, [group.question.id for group in existing]) == path:
            return GroupFile(round, path, hashlib.sha256(data).hexdigest(), ids)
    data = _parquet(sorted(groups, key=lambda group: group.question.id))
    run_dir.write_bytes(path, data)
    return GroupFile(round, path, hashlib.sha256(data).hexdigest(), ids)


class Ledger:
    """A view of the ledger's entries as of the last `refresh`, plus this process's own; methods that record, append."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self._seen: set[str] = set()
        self._next = {"sampling": 0, "training": 0}
        self._files: dict[int, dict[str, GroupFile]] = {}
        self._grouped: dict[int, dict[str, str]] = {}  # round → question id → path
        self._parked: dict[int, dict[str, FailedQuestion]] = {}
        self._sampled: dict[int, Sampled] = {}
        self._versions: dict[int, int] = {}
        self._trained: list[Trained] = []
        self.corrupt_entries: list[str] = []  # uris of the entries that were set aside
        self.refresh()

    # ── sampling: written by the conductor ───────────────────────────────────────────────────────────────────────

    def open_round(self, round: int) -> RoundAudit:
        """Makes disk and ledger agree on a round before it is sampled. Only for the conductor, with no task running.

        A committed file that is missing or damaged is voided, and its questions are pending again. A file written
        but not committed (the driver died in between) is committed when it reads well and all its questions are
        still pending, else deleted. Leftovers of killed writers go.
        """
        self.refresh()
        voided, adopted, deleted = [], [], []
        for file in self.group_files(round):
            try:
                self._recorded_bytes(file)
            except RunDirError as problem:
                self._append("sampling", "void", {"round": round, "path": file.path})
                self.run_dir.delete(file.path)
                voided.append(f"{problem}; its {len(file.question_ids)} questions are sampled again")
        folder = self.run_dir.groups(round)
        for name in self.run_dir.listdir(folder):
            path = f"{folder}/{name}"
            if path in self._files.get(round, {}) or not name.endswith(".parquet"):
                continue
            orphan = self._orphan(round, path)
            if orphan and self.commit(orphan):
                adopted.append(f"{self.run_dir.uri(path)} was written but not recorded: recorded now")
            else:
                self.run_dir.delete(path)
                deleted.append(f"{self.run_dir.uri(path)} was not recorded and is of no use: deleted")
        self.run_dir.delete_leftovers(folder)
        self.run_dir.delete_leftovers(LEDGER, prefix="sampling-")
        return RoundAudit(round, len(self._grouped.get(round, {})), tuple(voided), tuple(adopted), tuple(deleted))

    def commit(self, file: GroupFile) -> bool:
        """Records a written group file. False when a question of it is committed already: then it is deleted."""
        if not set(file.question_ids).isdisjoint(self._grouped.get(file.round, {})):
            if file.path not in self._files[file.round]:
                self.run_dir.delete(file.path)
            return False
        self._append("sampling", "group", asdict(file))
        return True

    def park(self, parked: FailedQuestion) -> None:
        """Gives a question up for this round; `unpark` takes it back."""
        self._append("sampling", "park", asdict(parked))

    def unpark(self, round: int) -> None:
        """Makes the parked questions of a round pending again, as a resumed run wants it."""
        if self._parked.get(round):
            self._append("sampling", "unpark", {"round": round})

    def record_policy_version(self, round: int, version: int) -> None:
        """Fixes with which weights a round is sampled, so that a resumed round uses the same. Written once."""
        known = self.policy_version(round)
        if known is not None and known != version:
            raise ValueError(f"round {round} is being sampled with policy version {known}, not {version}")
        if known is None:
            self._append("sampling", "policy_version", {"round": round, "version": version})

    def complete_sampling(self, round: int, policy_version: int, stats: dict[str, Any]) -> Sampled:
        """Closes a round whose questions are all grouped or parked, which the caller has checked with `pending`."""
        counts = len(self._grouped.get(round, {})), len(self._parked.get(round, {}))
        sampled = Sampled(round, policy_version, *counts, stats)
        self._append("sampling", "sampled", asdict(sampled))
        return sampled

    def pending(self, round: int, question_ids: Sequence[str]) -> list[str]:
        """The questions neither grouped nor parked, in the order given."""
        done = self._grouped.get(round, {}).keys() | self._parked.get(round, {}).keys()
        return [id for id in question_ids if id not in done]

    def group_files(self, round: int) -> list[GroupFile]:
        return sorted(self._files.get(round, {}).values(), key=lambda file: file.path)

    def parked(self, round: int) -> list[FailedQuestion]:
        return sorted(self._parked.get(round, {}).values(), key=lambda parked: parked.question_id)

    def policy_version(self, round: int) -> int | None:
        return self._versions.get(round)

    def sampled(self, round: int) -> Sampled | None:
        """The entry that closed a round; None when it is open, or has lost or regained questions since."""
        sampled = self._sampled.get(round)
        counts = len(self._grouped.get(round, {})), len(self._parked.get(round, {}))
        return sampled if sampled and (sampled.groups, sampled.parked) == counts else None

    def read_groups(self, round: int, question_ids: Collection[str] | None = None) -> list[Group]:
        """The round's groups, or those of some questions, sorted by question id.

        Raises RunDirError naming a missing or corrupted file, KeyError naming a question without a group.
        """
        grouped = self._grouped.get(round, {})
        wanted = grouped.keys() if question_ids is None else set(question_ids)
        if missing := sorted(wanted - grouped.keys()):
            raise KeyError(f"round {round} has no group of {len(missing)} questions, among them {missing[0]!r}")
        groups: list[Group] = []
        for path in sorted({grouped[id] for id in wanted}):
            groups += [group for group in self._read(self._files[round][path]) if group.question.id in wanted]
        return sorted(groups, key=lambda group: group.question.id)

    # ── training: written by rank 0 ──────────────────────────────────────────────────────────────────────────────

    def record_checkpoint(self, trained: Trained) -> None:
        """Records a training state. Raises RunDirError unless its directory has a manifest, which makes it durable."""
        if not self.run_dir.is_complete(trained.checkpoint):
            raise RunDirError(f"{self.run_dir.uri(trained.checkpoint)} has no manifest, so it is no checkpoint yet")
        self._append("training", "trained", asdict(trained))

    def last_checkpoint(self) -> Trained | None:
        """The latest training state whose directory is still there."""
        states = reversed(self._trained)
        return next((trained for trained in states if self.run_dir.is_complete(trained.checkpoint)), None)

    def trained(self) -> list[Trained]:
        """All recorded training states, oldest first, whether or not their directories were kept."""
        return list(self._trained)

    def trained_rounds(self) -> list[int]:
        """The rounds whose training was recorded as done."""
        return sorted({trained.round for trained in self._trained if trained.complete})

    # ── entries ──────────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self) -> None:
        """Takes in what other processes have written since. Only new entries are read."""
        new = []
        for name in self.run_dir.listdir(LEDGER):
            log, _, rest = name.partition("-")
            number = rest.partition("-")[0]
            if log in self._next and number.isdigit():
                self._next[log] = max(self._next[log], int(number) + 1)
                if name.endswith(".json") and name not in self._seen:
                    new.append(name)
        with ThreadPoolExecutor(16) as pool:  # an object store takes tens of milliseconds for each
            entries = list(pool.map(self._read_entry, new))
        for name, entry in zip(new, entries, strict=True):
            self._seen.add(name)
            if entry is not None:
                self._replay(entry["kind"], entry["body"])

    def _append(self, log: str, kind: str, body: dict[str, Any]) -> None:
        body = json.loads(json.dumps(body))  # as it will be read back: text keys, lists
        data = _encode(kind, body)
        # The checksum in the name keeps a second writer, should there ever be one, from overwriting an entry.
        name = f"{log}-{self._next[log]:08d}-{hashlib.sha256(data).hexdigest()[:8]}.json"
        self.run_dir.write_bytes(f"{LEDGER}/{name}", data)
        self._seen.add(name)
        self._next[log] += 1
        self._replay(kind, body)

    def _read_entry(self, name: str) -> dict[str, Any] | None:
        """An entry, or None when it was damaged and has been set aside."""
        path = f"{LEDGER}/{name}"
        try:
            data = self.run_dir.read_bytes(path)
            entry: dict[str, Any] = json.loads(data)
            if _encode(entry["kind"], entry["body"]) == data:
                return entry
        except FileNotFoundError:  # another process has set it aside
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
        round = body["round"]
        grouped, files = self._grouped.setdefault(round, {}), self._files.setdefault(round, {})
        if kind == "group":
            file = GroupFile(round, body["path"], body["sha256"], tuple(body["question_ids"]))
            if set(file.question_ids).isdisjoint(grouped):  # the first commit counts
                files[file.path] = file
                grouped.update(dict.fromkeys(file.question_ids, file.path))
                for id in file.question_ids:
                    self._parked.get(round, {}).pop(id, None)
        elif kind == "void":
            for id in files.pop(body["path"]).question_ids if body["path"] in files else ():
                del grouped[id]
        elif kind == "park":
            if body["question_id"] not in grouped:
                self._parked.setdefault(round, {})[body["question_id"]] = FailedQuestion(**body)
        elif kind == "unpark":
            self._parked.pop(round, None)
        elif kind == "policy_version":
            self._versions[round] = body["version"]
        elif kind == "sampled":
            self._sampled[round] = Sampled(**body)
        elif kind == "trained":
            self._trained.append(Trained(**body))
        else:
            raise RunDirError(f"{self.run_dir.uri(LEDGER)} has an entry of the kind {kind!r}: a newer aft_ray wrote it")

    # ── group files ──────────────────────────────────────────────────────────────────────────────────────────────

    def _recorded_bytes(self, file: GroupFile) -> bytes:
        """A committed file's contents. Raises RunDirError naming it when they are not what was recorded."""
        try:
            data = self.run_dir.read_bytes(file.path)
        except FileNotFoundError:
            raise RunDirError(f"{self.run_dir.uri(file.path)} is missing") from None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise RunDirError(f"{self.run_dir.uri(file.path)} is corrupted: its sha256 is not the recorded one")
        return data

    def _read(self, file: GroupFile) -> list[Group]:
        try:
            return _groups(self._recorded_bytes(file))
        except RunDirError as problem:
            raise RunDirError(f"{problem}; start the run again to have its questions sampled again") from None

    def _orphan(self, round: int, path: str) -> GroupFile | None:
        """The description of an uncommitted file that is whole and of this round's weights."""
        data = self.run_dir.read_bytes(path)
        groups = _intact(data)
        ids = tuple(group.question.id for group in groups)
        version = self.policy_version(round)
        if not groups or _group_path(self.run_dir, round, ids) != path:
            return None
        if any(group.round != round or version not in (None, group.policy_version) for group in groups):
            return None
        return GroupFile(round, path, hashlib.sha256(data).hexdigest(), ids)


def _encode(kind: str, body: dict[str, Any]) -> bytes:
    """The one byte string that an entry may consist of, its checksum included."""
    payload = json.dumps({"kind": kind, "body": body}, sort_keys=True, ensure_ascii=False)
    checksum = hashlib.sha256(payload.encode()).hexdigest()
    return (json.dumps({"body": body, "kind": kind, "sha256": checksum}, sort_keys=True, ensure_ascii=False)).encode()


def _group_path(run_dir: RunDir, round: int, question_ids: Collection[str]) -> str:
    key = json.dumps([round, sorted(question_ids)], ensure_ascii=False).encode()
    return f"{run_dir.groups(round)}/{hashlib.sha256(key).hexdigest()[:24]}.parquet"


def _parquet(groups: Sequence[Group]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(groups_to_table(groups), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _groups(data: bytes) -> list[Group]:
    return table_to_groups(pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read())


def _intact(data: bytes) -> list[Group]:
    """The groups of a file that no checksum was recorded for; empty unless they are just what was written.

    Parquet's checksums leave out the footer, so the proof is that the groups are written as these very bytes.
    """
    try:
        groups = _groups(data)
        return groups if _parquet(groups) == data else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
        return []
