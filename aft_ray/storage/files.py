"""Reads and writes single files below one directory of any pyarrow filesystem.

Invariant: a reader sees a file complete or not at all. Paths are relative to the directory and use forward slashes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow.fs as pafs

from aft_ray.config.messages import first_line

# The manifest of a complete directory; `aft_ray.storage.directories` defines what it contains.
MANIFEST = "MANIFEST.json"
TEMPORARY_SUFFIX = ".tmp"

# On an object store, `append_line` starts a new part when the current one reaches this many bytes, because every
# append rewrites the whole part.
_PART_BYTES = 64 << 10
# Stores without directories: a file can be written without creating its parent first.
_STORES_WITHOUT_DIRECTORIES = {"s3", "gcs", "abfs"}
# Error numbers of a file that cannot grow: no space left, quota used up, file size limit reached.
_NO_SPACE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunDirError(RuntimeError):
    """A run directory that cannot be used. The message is one sentence for the user."""


class DamagedFile(RunDirError):
    """A file is not the one that was written, or a file of a complete directory is missing. The message names it."""


class FileStore:
    """A directory on a local disk or on an object store, and the files below it. It can be pickled.

    Args:
        uri: A local path, or a URI that pyarrow understands (s3://, gs://, hdfs://, file://). A URI may contain
            options of pyarrow, as in s3://bucket/run?region=eu-west-1&endpoint_override=host:9000&scheme=http.
            Credentials are refused in it: they come from the environment of every node.
        filesystem: A pyarrow filesystem that a URI cannot describe; `uri` is then a path on it.

    Raises:
        RunDirError: pyarrow cannot use the URI, or it contains credentials.
    """

    def __init__(self, uri: str | os.PathLike[str], filesystem: Any = None) -> None:
        self._uri, mark, query = os.fspath(uri).partition("?") if "://" in os.fspath(uri) else (os.fspath(uri), "", "")
        self._uri, self._query = self._uri.rstrip("/") or "/", mark + query
        self._given_filesystem = filesystem
        # For each file that `append_line` writes to an object store: the number and the contents of its last part.
        self._parts: dict[str, tuple[int, bytes]] = {}
        if filesystem is not None:
            self._filesystem, self._root = filesystem, self._uri
        elif "://" not in self._uri:
            self._filesystem, self._root = pafs.LocalFileSystem(), str(Path(self._uri).expanduser().absolute())
            self._uri = self._root
        else:
            _refuse_credentials(self.uri())
            try:
                self._filesystem, self._root = pafs.FileSystem.from_uri(_with_delayed_open(self.uri()))
            except (ValueError, OSError) as error:
                raise RunDirError(f"cannot use the run directory {uri}: {first_line(error)}") from error

    def __reduce__(self) -> tuple[type[FileStore], tuple[str, Any]]:
        return type(self), (self.uri(), self._given_filesystem)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri()!r})"

    # ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        """The last part of the path; people call a run by it."""
        return self._root.rstrip("/").rpartition("/")[2] or self._root

    @property
    def is_local(self) -> bool:
        """Whether the files can be opened by path, on every machine that mounts the directory."""
        return isinstance(self._filesystem, pafs.LocalFileSystem)

    def uri(self, path: str = "") -> str:
        """The address that a user, or a library with its own filesystem layer, can open."""
        return (f"{self._uri}/{path.lstrip('/')}" if path else self._uri) + self._query

    def local_path(self, path: str = "") -> Path:
        """The path on this machine. Raises RunDirError when the directory is not on a mounted filesystem."""
        if not self.is_local:
            raise RunDirError(f"{self.uri(path)} is not on a mounted filesystem, so it has no local path")
        return Path(self.full_path(path))

    @property
    def filesystem(self) -> Any:
        """The pyarrow filesystem; `full_path` gives paths on it."""
        return self._filesystem

    def full_path(self, path: str = "") -> str:
        """The path on `filesystem`."""
        return f"{self._root.rstrip('/')}/{path.lstrip('/')}" if path else self._root

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read_bytes(self, path: str) -> bytes:
        """The contents of a file. Raises FileNotFoundError."""
        with explain_errors(self.uri(path)), self._filesystem.open_input_stream(self.full_path(path)) as stream:
            return bytes(stream.read())

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of a file from each start up to its end; fewer where the file ends. Raises FileNotFoundError."""
        with explain_errors(self.uri(path)), self._filesystem.open_input_file(self.full_path(path)) as file:
            return [file.read_at(end - start, start) for start, end in ranges]

    def read_json(self, path: str) -> Any:
        """The value in a JSON file. Raises FileNotFoundError, and DamagedFile when the file is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DamagedFile(f"{self.uri(path)} is corrupted: {error}") from error

    def read_lines(self, path: str) -> list[str]:
        """The lines of a file that `append_line` writes, oldest first; empty when there is no file."""
        if not self.exists(path):
            return []
        names = [path] if self.is_local else [f"{path}/{name}" for name in self.listdir(path)]
        return [line for name in names for line in self.read_bytes(name).decode(errors="replace").splitlines()]

    def exists(self, path: str = "") -> bool:
        """Whether there is a file or a directory at this path."""
        with explain_errors(self.uri(path)):
            return bool(self._filesystem.get_file_info(self.full_path(path)).type != pafs.FileType.NotFound)

    def listdir(self, path: str = "") -> list[str]:
        """The sorted names in a directory, without temporary files; empty when there is no such directory."""
        return [name for name in self._all_names(path) if not is_temporary(name)]

    def _all_names(self, path: str) -> list[str]:
        selector = pafs.FileSelector(self.full_path(path), allow_not_found=True)
        with explain_errors(self.uri(path)):
            return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes a whole file and replaces an older one. The file is durable when this returns.

        On a mounted filesystem the data goes to a temporary file, which is synchronised and renamed. On an object
        store it is one put request, which is atomic there. Raises RunDirError when the disk is full.
        """
        with explain_errors(self.uri(path)):
            if self.is_local:
                write_atomically(self.local_path(path), data)
            else:
                self._create_parent(self.full_path(path))
                with self._filesystem.open_output_stream(self.full_path(path)) as stream:
                    stream.write(data)

    def write_json(self, path: str, value: Any) -> None:
        """Writes a value as a JSON file, as `write_bytes` does."""
        self.write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def append_line(self, path: str, line: str) -> None:
        """Appends one or more lines to a text file that has a single writer; `read_lines` reads it.

        Object stores cannot append. There the file is a directory of numbered parts, and the last part is rewritten
        with each line. Every process starts a part of its own, so that no process has to read what others wrote.
        """
        data = line.encode() + b"\n"
        if not self.is_local:
            number, before = self._parts.get(path) or (self._next_part(path), b"")
            self.write_bytes(f"{path}/{number:08d}", before + data)
            part_is_full = len(before) + len(data) >= _PART_BYTES
            self._parts[path] = (number + 1, b"") if part_is_full else (number, before + data)
            return
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with explain_errors(self.uri(path)), open(target, "a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A writer that was killed in the middle of a line must not spoil the next line.
                data = data if file.read(1) == b"\n" else b"\n" + data
            file.write(data)

    def _next_part(self, path: str) -> int:
        return max((int(name) + 1 for name in self.listdir(path) if name.isdigit()), default=0)

    def _create_parent(self, full_path: str) -> None:
        if self._filesystem.type_name not in _STORES_WITHOUT_DIRECTORIES:
            self._filesystem.create_dir(os.path.dirname(full_path), recursive=True)

    def rename(self, path: str, new_path: str) -> None:
        """Renames a file. Raises FileNotFoundError."""
        with explain_errors(self.uri(path)):
            self._filesystem.move(self.full_path(path), self.full_path(new_path))

    def delete(self, path: str) -> None:
        """Deletes a file, or a directory with everything below it; does nothing when there is none.

        The manifest of a directory is deleted first, so that a half-deleted directory never looks complete.
        """
        with contextlib.suppress(FileNotFoundError), explain_errors(self.uri(path)):
            kind = self._filesystem.get_file_info(self.full_path(path)).type
            if kind == pafs.FileType.Directory:
                self.delete(f"{path}/{MANIFEST}")
                self._filesystem.delete_dir(self.full_path(path))
            elif kind == pafs.FileType.File:
                self._filesystem.delete_file(self.full_path(path))

    def delete_leftovers(self, path: str, prefix: str = "") -> None:
        """Deletes the temporary files that killed writers left of files whose names start with `prefix`."""
        for name in self._all_names(path):
            if is_temporary(name) and name.startswith(f".{prefix}"):
                self.delete(f"{path}/{name}")


@contextlib.contextmanager
def new_local_file(target: Path) -> Iterator[Any]:
    """Opens a temporary file beside `target`, which takes its name and is durable after the context.

    Nothing is left when the context ends with an exception.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(target)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(target.parent)


def write_atomically(target: Path, data: bytes) -> None:
    """Writes a whole local file through a temporary file beside it. It is durable when this returns."""
    with new_local_file(target) as file:
        file.write(data)


def temporary_sibling(target: Path) -> Path:
    """A unique temporary path in the same directory as `target`."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary_sibling`."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def fsync(path: str | os.PathLike[str]) -> None:
    """Makes a local file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_errors(where: str) -> Iterator[None]:
    """Turns a full disk and a refusal of an object store into a RunDirError of one sentence; passes other errors on."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE_ERRORS:
            raise RunDirError(
                f"cannot write {where}: {os.strerror(error.errno)}; make room there and start again, "
                "nothing that was finished is lost"
            ) from error
        if error.errno is None:  # pyarrow raises these for the errors of an object store
            raise RunDirError(
                f"cannot use {where}: {first_line(error)}; check the name, the network and the credentials of this "
                "machine, and start again, nothing that was finished is lost"
            ) from error
        raise


def _refuse_credentials(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.password is not None or {"access_key", "secret_key", "session_token"} & parse_qs(parts.query).keys():
        raise RunDirError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path} came with credentials, which would be "
            "written into the run's files; set them in the environment of every node, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the nodes a role"
        )


def _with_delayed_open(uri: str) -> str:
    """The URI with the option that lets pyarrow write a small file to S3 in one request instead of three."""
    if not uri.startswith("s3:") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"
