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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow.fs as pafs

from aft_ray.storage.lease import Hold, LeaseTaken, holder, lease

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
REPORT = "report.html"
LEDGER = "ledger"
EVALUATIONS = "evaluations"
LOGS = "logs"
TENSORBOARD = "tensorboard"
MANIFEST = "MANIFEST.json"

_CHUNK = 8 << 20
# Where files cannot grow, lines go to a new part when the last has so many bytes, since every line rewrites its part.
_PART = 64 << 10
# Stores whose directories are but parts of names: nothing needs to be made before a file is written.
_FLAT = {"s3", "gcs", "abfs"}
_TMP = ".tmp"
# What the operating system says when a file cannot grow: no space, quota used up, file size limit.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunDirError(RuntimeError):
    """A run directory that cannot be used. The message is one sentence for the user."""


class RunDir:
    """One run's directory: a local path, or a URI that pyarrow understands (s3://, gs://, hdfs://, file://).

    A URI may have options of pyarrow's, as in s3://bucket/run?region=eu-west-1&endpoint_override=host:9000&scheme=http.
    Credentials are never part of it: they come from the environment, on every node. `filesystem` is for stores that a
    URI cannot describe; `uri` is then the path on it. A RunDir can be pickled.
    """

    def __init__(self, uri: str | os.PathLike[str], filesystem: Any = None) -> None:
        self._uri, mark, query = os.fspath(uri).partition("?") if "://" in os.fspath(uri) else (os.fspath(uri), "", "")
        self._uri, self._query = self._uri.rstrip("/") or "/", mark + query
        self._given = filesystem
        self._parts: dict[str, tuple[int, bytes]] = {}  # of files of lines: number and contents of the last part
        if filesystem is not None:
            self._filesystem, self._root = filesystem, self._uri
        elif "://" not in self._uri:
            self._filesystem, self._root = pafs.LocalFileSystem(), str(Path(self._uri).expanduser().absolute())
            self._uri = self._root
        else:
            _refuse_credentials(self.uri())
            try:
                self._filesystem, self._root = pafs.FileSystem.from_uri(_in_one_request(self.uri()))
            except (ValueError, OSError) as error:
                raise RunDirError(f"cannot use the run directory {uri}: {_first_line(error)}") from error

    def __reduce__(self) -> tuple[type[RunDir], tuple[str, Any]]:
        return RunDir, (self.uri(), self._given)

    def __repr__(self) -> str:
        return f"RunDir({self.uri()!r})"

    # ── where things lie ─────────────────────────────────────────────────────────────────────────────────────────

    def round(self, number: int) -> str:
        return f"rounds/{number:04d}"

    def groups(self, round: int) -> str:
        return f"{self.round(round)}/groups"

    def checkpoint(self, round: int) -> str:
        return f"{self.round(round)}/checkpoint"

    def model(self, round: int) -> str:
        return f"{self.round(round)}/model"

    def adapter(self, round: int) -> str:
        return f"{self.round(round)}/adapter"

    def evaluation(self, name: str) -> str:
        return f"{EVALUATIONS}/{name}.json"

    @property
    def name(self) -> str:
        """The last part of its path, by which people call a run."""
        return self._root.rstrip("/").rpartition("/")[2] or self._root

    @property
    def is_local(self) -> bool:
        """Whether the files can be opened by path, on every machine that mounts the run directory."""
        return isinstance(self._filesystem, pafs.LocalFileSystem)

    def uri(self, path: str = "") -> str:
        """What a user, or a library with its own filesystem layer, can open."""
        return (f"{self._uri}/{path.lstrip('/')}" if path else self._uri) + self._query

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
        with _in_words(self.uri(path)):
            if self.is_local:
                write_atomically(self.local_path(path), data)
            else:
                self._make_parent(self._at(path))
                with self._filesystem.open_output_stream(self._at(path)) as stream:
                    stream.write(data)

    def _make_parent(self, full_path: str) -> None:
        if self._filesystem.type_name not in _FLAT:
            self._filesystem.create_dir(os.path.dirname(full_path), recursive=True)

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def append_line(self, path: str, line: str) -> None:
        """Appends a line, or several, to a text file with a single writer; `read_lines` reads it.

        Object stores cannot append: there the file is a directory of parts, of which the last is rewritten. Every
        process begins a part of its own, so that none reads what others wrote.
        """
        data = line.encode() + b"\n"
        if not self.is_local:
            number, before = self._parts.get(path) or (self._next_part(path), b"")
            self.write_bytes(f"{path}/{number:08d}", before + data)
            grown = len(before) + len(data)
            self._parts[path] = (number, before + data) if grown < _PART else (number + 1, b"")
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _in_words(self.uri(path)), open(target, "a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A writer killed in the middle of a line must not spoil the next one.
                data = data if file.read(1) == b"\n" else b"\n" + data
            file.write(data)

    def _next_part(self, path: str) -> int:
        return max((int(name) + 1 for name in self.listdir(path) if name.isdigit()), default=0)

    def read_lines(self, path: str) -> list[str]:
        """The lines of a file that `append_line` writes, oldest first; none when there is no file."""
        if not self.exists(path):
            return []
        names = [path] if self.is_local else [f"{path}/{name}" for name in self.listdir(path)]
        return [line for name in names for line in self.read_bytes(name).decode(errors="replace").splitlines()]

    def read_bytes(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with _in_words(self.uri(path)), self._filesystem.open_input_stream(self._at(path)) as stream:
            return bytes(stream.read())

    def read_json(self, path: str) -> Any:
        """Raises FileNotFoundError, and RunDirError when the file is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise RunDirError(f"{self.uri(path)} is corrupted: {error}") from error

    def exists(self, path: str = "") -> bool:
        with _in_words(self.uri(path)):
            return bool(self._filesystem.get_file_info(self._at(path)).type != pafs.FileType.NotFound)

    def listdir(self, path: str = "") -> list[str]:
        """Sorted names, without unfinished temporary files; empty when there is no such directory."""
        return [name for name in self._names(path) if not _is_temporary(name)]

    def _names(self, path: str) -> list[str]:
        selector = pafs.FileSelector(self._at(path), allow_not_found=True)
        with _in_words(self.uri(path)):
            return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    def rename(self, path: str, new: str) -> None:
        with _in_words(self.uri(path)):
            self._filesystem.move(self._at(path), self._at(new))

    def delete(self, path: str) -> None:
        """Deletes a file, or a directory with all below it, when there is one. A manifest goes first, so that a
        directory half deleted is not taken for a complete one."""
        with contextlib.suppress(FileNotFoundError), _in_words(self.uri(path)):
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
        with _in_words(self.uri(path)):
            source.write_manifest("")
            if not self.is_local:
                self.delete(path)
                for name in [*source._manifest(""), MANIFEST]:
                    target = self._at(f"{path}/{name}")
                    self._make_parent(target)
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

    def add_files(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Copies what is below a local directory into `path`, beside what other processes add; without a manifest."""
        with _in_words(self.uri(path)):
            self._filesystem.create_dir(self._at(path), recursive=True)
            pafs.copy_files(os.fspath(local_dir), self._at(path), pafs.LocalFileSystem(), self._filesystem)

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
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            with open(cached.with_name(f"{key}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one download a machine, whoever else waits for it
                if not cached.exists():
                    self._download(path, cached)
        return cached

    def _download(self, path: str, cached: Path) -> None:
        staged = RunDir(cached.with_name(f".{cached.name}.{uuid.uuid4().hex}{_TMP}"))
        with _in_words(f"{cached} for {self.uri(path)}"):
            for name in [*self._manifest(path), MANIFEST]:
                target = staged.local_path(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(self._at(f"{path}/{name}"), str(target), self._filesystem, staged._filesystem)
        if problems := staged.verify_manifest(""):
            shutil.rmtree(staged._root)
            raise RunDirError(f"the download of {self.uri(path)} is damaged: {problems[0]}")
        os.rename(staged._root, cached)

    # ── one driver at a time ─────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def lock(self, say: Callable[[str], None] | None = None) -> Iterator[Hold]:
        """Keeps other drivers out while it is held. Raises RunDirError naming the holder.

        say: is told what is waited for, if anything.

        The operating system releases it when the process dies. Object stores have no locks: there it is a lease, and
        one that a dead driver left is taken over after `lease.PATIENCE` beats.
        """
        if not self.is_local:
            try:
                with lease(self, say) as hold:
                    yield hold
            except LeaseTaken as taken:
                raise self._in_use(str(taken)) from None
            return
        target = self.local_path(".lock")
        with _in_words(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise self._in_use(file.read().strip() or "another process") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield Hold()

    def _in_use(self, by: str) -> RunDirError:
        return RunDirError(f"{self.uri()} is in use by {by}; wait until it ends, or stop it, or choose another run_dir")

    def in_use_by(self) -> str | None:
        """The driver that works on the run, if any, for a person to read."""
        if not self.is_local:
            return holder(self)
        try:
            with self.lock():
                return None
        except RunDirError as busy:
            return str(busy).partition(" is in use by ")[2].partition(";")[0]


def local_model(name: str) -> str:
    """The local directory of a model: of a run on an object store, a verified download; a path or hub name is itself.

    Raises RunDirError when the download does not succeed.
    """
    return str(RunDir(name).fetch_directory("")) if "://" in name else name


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


def _refuse_credentials(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.password is not None or {"access_key", "secret_key", "session_token"} & parse_qs(parts.query).keys():
        raise RunDirError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} came with credentials, which would be "
            "written into the run's files; set them in the environment of every node, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the nodes a role"
        )


def _in_one_request(uri: str) -> str:
    """pyarrow puts even a small file on S3 in three requests, unless it may wait with the first."""
    if not uri.startswith("s3:") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(_TMP)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _in_words(where: str) -> Iterator[None]:
    """A full disk and a store that does not answer, each as a sentence; other errors keep their own words."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise RunDirError(
                f"cannot write {where}: {os.strerror(error.errno)}; make room there and start again, "
                "nothing that was finished is lost"
            ) from error
        if error.errno is None:  # what pyarrow raises for a store's own refusals
            raise RunDirError(
                f"cannot use {where}: {_first_line(error)}; see to the name, the network and the credentials of this "
                "machine, and start again, nothing that was finished is lost"
            ) from error
        raise
