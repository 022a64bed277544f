"""Where each file of a run lies, on any pyarrow filesystem, and how it gets there whole.

Invariant: a reader sees a file complete or not at all, and a directory is complete exactly when its `MANIFEST.json`,
written last, is there. Paths are relative to the run directory, with forward slashes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
REPORT = "report.html"
LEDGER = "ledger"
EVALUATIONS = "evaluations"
LOGS = "logs"
TENSORBOARD = "tensorboard"
MANIFEST = "MANIFEST.json"

_CHUNK = 8 << 20
_TMP = ".tmp"
# What the operating system says when a file cannot grow: no space, quota used up, file size limit.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunDirError(RuntimeError):
    """A run directory that cannot be used. The message is one sentence for the user."""


class RunDir:
    """One run's directory: a local path, or a URI that pyarrow understands (s3://, gs://, hdfs://, file://).

    `filesystem` is for stores that a URI cannot describe; `uri` is then the path on it. A RunDir can be pickled.
    """

    def __init__(self, uri: str | os.PathLike[str], filesystem: Any = None) -> None:
        self._uri = os.fspath(uri).rstrip("/") or "/"
        self._given = filesystem
        if filesystem is not None:
            self._filesystem, self._root = filesystem, self._uri
        elif "://" not in self._uri:
            self._filesystem, self._root = pafs.LocalFileSystem(), str(Path(self._uri).expanduser().absolute())
            self._uri = self._root
        else:
            try:
                self._filesystem, self._root = pafs.FileSystem.from_uri(self._uri)
            except (ValueError, OSError) as error:
                raise RunDirError(f"cannot use the run directory {uri}: {_first_line(error)}") from error

    def __reduce__(self) -> tuple[type[RunDir], tuple[str, Any]]:
        return RunDir, (self._uri, self._given)

    def __repr__(self) -> str:
        return f"RunDir({self._uri!r})"

    # ── where things lie ─────────────────────────────────────────────────────────────────────────────────────────

    def round(self, number: int) -> str:
        return f"rounds/{number:04d}"

    def groups(self, round: int) -> str:
        return f"{self.round(round)}/groups"

    def checkpoint(self, round: int) -> str:
        return f"{self.round(round)}/checkpoint"

    def model(self, round: int) -> str:
        return f"{self.round(round)}/model"

    def evaluation(self, name: str) -> str:
        return f"{EVALUATIONS}/{name}.json"

    @property
    def is_local(self) -> bool:
        """Whether the files can be opened by path, on every machine that mounts the run directory."""
        return isinstance(self._filesystem, pafs.LocalFileSystem)

    def uri(self, path: str = "") -> str:
        """What a user, or a library with its own filesystem layer, can open."""
        return f"{self._uri}/{path.lstrip('/')}" if path else self._uri

    def local_path(self, path: str = "") -> Path:
        """Raises RunDirError when the run directory is not on a mounted filesystem."""
        if not self.is_local:
            raise RunDirError(f"{self.uri(path)} is not on a mounted filesystem, so it has no local path")
        return Path(self._at(path))

    def staging(self) -> str | None:
        """Where directories are made before they move in: on the run's own disk where it is mounted, else anywhere."""
        if not self.is_local:
            return None
        staging = self.local_path("tmp")
        staging.mkdir(parents=True, exist_ok=True)
        return str(staging)

    @property
    def filesystem(self) -> Any:
        """The pyarrow filesystem; `full_path` gives paths on it."""
        return self._filesystem

    def full_path(self, path: str = "") -> str:
        return self._at(path)

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path.lstrip('/')}" if path else self._root

    # ── single files ─────────────────────────────────────────────────────────────────────────────────────────────

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes a file whole, replacing an older one. It is durable when this returns.

        Mounted filesystems: a temporary file beside it, fsync, rename. Object stores: one put, which is atomic there.
        Raises RunDirError when the disk is full.
        """
        with _full_disk_in_words(self.uri(path)):
            if self.is_local:
                write_atomically(self.local_path(path), data)
            else:
                self._filesystem.create_dir(os.path.dirname(self._at(path)), recursive=True)
                with self._filesystem.open_output_stream(self._at(path)) as stream:
                    stream.write(data)

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def append_line(self, path: str, line: str) -> None:
        """Appends a line to a text file with a single writer. Object stores cannot append: there it is rewritten."""
        data = line.encode() + b"\n"
        if not self.is_local:
            before = self.read_bytes(path) if self.exists(path) else b""
            self.write_bytes(path, before + data)
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _full_disk_in_words(self.uri(path)), open(target, "a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A writer killed in the middle of a line must not spoil the next one.
                data = data if file.read(1) == b"\n" else b"\n" + data
            file.write(data)

    def read_bytes(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._filesystem.open_input_stream(self._at(path)) as stream:
            return bytes(stream.read())

    def read_json(self, path: str) -> Any:
        """Raises FileNotFoundError, and RunDirError when the file is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise RunDirError(f"{self.uri(path)} is corrupted: {error}") from error

    def exists(self, path: str = "") -> bool:
        return bool(self._filesystem.get_file_info(self._at(path)).type != pafs.FileType.NotFound)

    def listdir(self, path: str = "") -> list[str]:
        """Sorted names, without unfinished temporary files; empty when there is no such directory."""
        return [name for name in self._names(path) if not _is_temporary(name)]

    def _names(self, path: str) -> list[str]:
        selector = pafs.FileSelector(self._at(path), allow_not_found=True)
        return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    def rename(self, path: str, new: str) -> None:
        self._filesystem.move(self._at(path), self._at(new))

    def delete(self, path: str) -> None:
        """Deletes a file, or a directory with all below it, when there is one. A manifest goes first, so that a
        directory half deleted is not taken for a complete one."""
        with contextlib.suppress(FileNotFoundError):
            kind = self._filesystem.get_file_info(self._at(path)).type
            if kind == pafs.FileType.Directory:
                self.delete(f"{path}/{MANIFEST}")
                self._filesystem.delete_dir(self._at(path))
            elif kind == pafs.FileType.File:
                self._filesystem.delete_file(self._at(path))

    def delete_leftovers(self, path: str, prefix: str = "") -> list[str]:
        """Deletes what killed writers left unfinished of files whose name starts with `prefix`; returns the names."""
        names = [name for name in self._names(path) if _is_temporary(name) and name.startswith(f".{prefix}")]
        for name in names:
            self.delete(f"{path}/{name}")
        return names

    # ── directories with a manifest ──────────────────────────────────────────────────────────────────────────────

    def write_manifest(self, path: str) -> None:
        """Declares the directory complete: name, size and sha256 of every file below it, made durable before."""
        self.delete(f"{path}/{MANIFEST}")
        selector = pafs.FileSelector(self._at(path), recursive=True)
        files = {}
        for info in sorted(self._filesystem.get_file_info(selector), key=lambda info: info.path):
            if info.type == pafs.FileType.File and not _is_temporary(info.base_name):
                if self.is_local:
                    _fsync(info.path)
                name = info.path[len(self._at(path)) :].lstrip("/")
                files[name] = {"size": info.size, "sha256": self._sha256(info.path)}
        self.write_json(f"{path}/{MANIFEST}", {"files": files})

    def is_complete(self, path: str) -> bool:
        """Whether the directory has a manifest. Cheap; `verify_manifest` looks at the contents."""
        return self.exists(f"{path}/{MANIFEST}")

    def verify_manifest(self, path: str) -> list[str]:
        """Reads every file of the manifest. One sentence per problem, naming the file; empty when all is well."""
        if not self.is_complete(path):
            return [f"{self.uri(path)} has no {MANIFEST}: it was never completed"]
        try:
            files = {str(name): (entry["size"], entry["sha256"]) for name, entry in self._manifest(path).items()}
        except (RunDirError, KeyError, TypeError, AttributeError):
            return [f"{self.uri(path)}/{MANIFEST} is corrupted"]
        problems = []
        for name, (size, sha256) in files.items():
            info = self._filesystem.get_file_info(self._at(f"{path}/{name}"))
            if info.type != pafs.FileType.File:
                problems.append(f"{self.uri(path)}/{name} is missing")
            elif info.size != size:
                problems.append(f"{self.uri(path)}/{name} has {info.size} bytes instead of {size}")
            elif self._sha256(info.path) != sha256:
                problems.append(f"{self.uri(path)}/{name} is corrupted: its sha256 is not that of the manifest")
        return problems

    def _manifest(self, path: str) -> dict[str, Any]:
        files: dict[str, Any] = self.read_json(f"{path}/{MANIFEST}")["files"]
        return files

    def _sha256(self, full_path: str) -> str:
        digest = hashlib.sha256()
        with self._filesystem.open_input_stream(full_path) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def store_directory(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Moves a finished local directory to `path`, replacing what is there, with a manifest.

        On a mounted filesystem `path` appears by a rename; elsewhere the files are uploaded, the manifest last.
        """
        source = RunDir(local_dir)
        with _full_disk_in_words(self.uri(path)):
            source.write_manifest("")
            if not self.is_local:
                self.delete(path)
                for name in [*source._manifest(""), MANIFEST]:
                    target = self._at(f"{path}/{name}")
                    self._filesystem.create_dir(os.path.dirname(target), recursive=True)
                    pafs.copy_files(source._at(name), target, source._filesystem, self._filesystem)
                shutil.rmtree(source._root)
                return
            target_dir = self.local_path(path)
            target_dir.parent.mkdir(parents=True, exist_ok=True)
            # Another device cannot be renamed from: shutil.move copies to a temporary name first.
            staged = target_dir.with_name(f".{target_dir.name}.{uuid.uuid4().hex}{_TMP}")
            shutil.move(source._root, staged)
            self.delete(path)
            os.rename(staged, target_dir)
            _fsync(target_dir.parent)

    def fetch_directory(self, path: str) -> Path:
        """A local directory with the contents of a complete one: itself where it is mounted, else a download.

        Downloads are verified against the manifest and kept in the machine's temporary directory, one per manifest.
        Raises RunDirError when the directory is not complete or arrives damaged.
        """
        if not self.is_complete(path):
            raise RunDirError(f"{self.uri(path)} has no {MANIFEST}: it does not exist or was never completed")
        if self.is_local:
            return self.local_path(path)
        key = hashlib.sha256(self.uri(path).encode() + self.read_bytes(f"{path}/{MANIFEST}")).hexdigest()[:24]
        cached = Path(tempfile.gettempdir(), f"aft_ray-{os.getuid()}", key)
        if cached.exists():
            return cached
        staged = RunDir(cached.with_name(f".{key}.{uuid.uuid4().hex}{_TMP}"))
        with _full_disk_in_words(str(cached)):
            for name in [*self._manifest(path), MANIFEST]:
                target = staged.local_path(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(self._at(f"{path}/{name}"), str(target), self._filesystem, staged._filesystem)
        if problems := staged.verify_manifest(""):
            shutil.rmtree(staged._root)
            raise RunDirError(f"the download of {self.uri(path)} is damaged: {problems[0]}")
        try:
            os.rename(staged._root, cached)
        except OSError:  # another process was faster; its copy is as good
            shutil.rmtree(staged._root)
        return cached

    # ── one driver at a time ─────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other drivers out while it is held. Raises RunDirError naming the holder.

        The operating system releases it when the process dies. Object stores have no locks: there nothing is held,
        and two drivers are the user's to avoid (the ledger still labels each question once).
        """
        if not self.is_local:
            yield
            return
        target = self.local_path(".lock")
        with _full_disk_in_words(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunDirError(
                    f"{self._uri} is in use by {holder}; wait until it ends, or stop it, or choose another run_dir"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield


def write_atomically(target: Path, data: bytes) -> None:
    """Writes a local file whole: a temporary file beside it, fsync, rename. It is durable when this returns."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_TMP}")
    try:
        with open(staged, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    _fsync(target.parent)


def _fsync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(_TMP)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _full_disk_in_words(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise RunDirError(
                f"cannot write {where}: {os.strerror(error.errno)}; make room there and start again, "
                "nothing that was finished is lost"
            ) from error
        raise
