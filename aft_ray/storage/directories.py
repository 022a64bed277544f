"""Stores whole directories, such as models and checkpoints, together with a manifest of their files.

Several processes may write one directory: each writes its own files with `create_file` or `add_files`, which hash while
they write, and one process gathers what these return and calls `write_manifest`. Invariants: a directory is complete
exactly when its `MANIFEST.json`, which is written last, is there; every process reads and writes only its own bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs

from aft_ray.storage.files import (
    MANIFEST,
    DamagedFile,
    FileStore,
    RunDirError,
    explain_errors,
    fsync,
    is_temporary,
    new_local_file,
    temporary_sibling,
)
from aft_ray.storage.stored_files import HashedFile, StoredFile

_READ_BYTES = 8 << 20
# Files of one directory that a process copies at once. A stream of an object store is slower than the network.
_COPIES = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class DirectoryStore(FileStore):
    """A file store that also keeps complete directories. A manifest holds the size and the SHA-256 of every file."""

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def create_file(self, path: str, name: str) -> Iterator[HashedFile]:
        """Opens a new file of the directory `path`; after the context it is durable, and its `entry` is final.

        On a mounted filesystem it appears by a rename, and not at all when the context is left by an exception. On an
        object store a cut file may then remain, which no manifest names.

        Args:
            name: the path of the file below the directory.
        """
        where = f"{path}/{name}"
        with explain_errors(self.uri(where)):
            if not self.is_local:
                self._create_parent(self.full_path(where))
                with self._filesystem.open_output_stream(self.full_path(where)) as stream:
                    yield HashedFile(name, stream)
                return
            with new_local_file(self.local_path(where)) as file:
                yield HashedFile(name, file)

    def add_files(self, local_dir: str | os.PathLike[str], path: str) -> list[StoredFile]:
        """Copies the files below a local directory into `path`, to which other processes may add files as well.

        Returns:
            The entries of the copied files, which are durable. One process passes those of all to `write_manifest`.
        """
        root = Path(local_dir)
        names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())

        def copy(name: str) -> StoredFile:
            with open(root / name, "rb", buffering=0) as source, self.create_file(path, name) as target:
                while chunk := source.read(_READ_BYTES):
                    target.write(chunk)
            return target.entry

        return _for_each(copy, names)

    def write_manifest(self, path: str, files: Sequence[StoredFile]) -> None:
        """Declares a directory complete: it consists of `files`, which their writers made durable.

        Raises:
            RunDirError: a file is not there in its whole size, as on a path that not every node mounts.
        """
        found = self._sizes(path)
        for file in files:
            if found.get(file.name) != file.size:
                seen = f"has {found[file.name]} bytes instead of {file.size}" if file.name in found else "is missing"
                raise RunDirError(
                    f"{self.uri(path)}/{file.name} {seen} although its writer finished it; the run directory must be "
                    "on storage that every node of the run sees"
                )
        entries = {file.name: {"size": file.size, "sha256": file.sha256} for file in sorted(files)}
        self.write_json(f"{path}/{MANIFEST}", {"files": entries})

    def _sizes(self, path: str) -> dict[str, int]:
        """The size of every file below a directory, by name; one request lists them all."""
        root = self.full_path(path)
        selector = pafs.FileSelector(root, allow_not_found=True, recursive=True)
        with explain_errors(self.uri(path)):
            infos = self._filesystem.get_file_info(selector)
        return {info.path[len(root) :].lstrip("/"): info.size for info in infos if info.type == pafs.FileType.File}

    def store_directory(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Moves a finished local directory to `path` with a manifest, and replaces what is there.

        On a mounted filesystem `path` appears by a rename. On an object store the files are uploaded and the manifest
        is uploaded last.
        """
        source = DirectoryStore(local_dir)
        with explain_errors(self.uri(path)):
            if not self.is_local:
                self.delete(path)
                self.write_manifest(path, self.add_files(local_dir, path))
                shutil.rmtree(local_dir)
                return
            source.write_manifest("", source.hash_files(""))
            target_dir = self.local_path(path)
            target_dir.parent.mkdir(parents=True, exist_ok=True)
            # A rename does not work across devices: shutil.move then copies, so it gets a temporary name as its target.
            temporary = temporary_sibling(target_dir)
            shutil.move(source._root, temporary)
            self.delete(path)
            os.rename(temporary, target_dir)
            fsync(target_dir.parent)

    def hash_files(self, path: str) -> list[StoredFile]:
        """The entries of the files that are below a directory already, which this reads and makes durable."""
        sizes = self._sizes(path)
        names = [name for name in sorted(sizes) if name != MANIFEST and not is_temporary(os.path.basename(name))]

        def entry(name: str) -> StoredFile:
            where = self.full_path(f"{path}/{name}")
            if self.is_local:
                fsync(where)
            return StoredFile(name, sizes[name], self._sha256(where))

        return _for_each(entry, names)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def is_complete(self, path: str) -> bool:
        """Whether the directory has a manifest. This is cheap; `verify_manifest` reads the contents."""
        return self.exists(f"{path}/{MANIFEST}")

    def read_manifest(self, path: str) -> list[StoredFile]:
        """The files of a complete directory.

        Raises:
            RunDirError: the directory was never completed.
            DamagedFile: its manifest is corrupted.
        """
        if not self.is_complete(path):
            raise RunDirError(f"{self.uri(path)} has no {MANIFEST}: it does not exist or was never completed")
        try:
            files = self.read_json(f"{path}/{MANIFEST}")["files"]
            return [StoredFile(str(name), entry["size"], entry["sha256"]) for name, entry in files.items()]
        except (DamagedFile, KeyError, TypeError, AttributeError):
            raise DamagedFile(f"{self.uri(path)}/{MANIFEST} is corrupted") from None

    def verify_manifest(self, path: str) -> list[str]:
        """Compares every file with the manifest.

        Returns:
            One sentence for each problem, which names the file; empty when there is none.
        """
        try:
            files = self.read_manifest(path)
        except RunDirError as error:
            return [str(error)]
        return [problem for problem in _for_each(lambda file: self._problem(path, file), files) if problem]

    def _problem(self, path: str, file: StoredFile) -> str | None:
        """Why a file is not the one of the manifest, in one sentence; None when it is."""
        info = self._filesystem.get_file_info(self.full_path(f"{path}/{file.name}"))
        if info.type != pafs.FileType.File:
            return f"{self.uri(path)}/{file.name} is missing"
        if info.size != file.size:
            return f"{self.uri(path)}/{file.name} has {info.size} bytes instead of {file.size}"
        if self._sha256(info.path) != file.sha256:
            return f"{self.uri(path)}/{file.name} is corrupted: its sha256 is not that of the manifest"
        return None

    def _sha256(self, full_path: str) -> str:
        digest = hashlib.sha256()
        with self._filesystem.open_input_stream(full_path) as stream:
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def fetch_files(self, path: str, files: Sequence[StoredFile], target: Path) -> None:
        """Makes some files of a complete directory readable below a local one, after comparing their digests.

        On a mounted filesystem they are read once and `target` gets links to them; else they are downloaded.

        Raises:
            DamagedFile: a file is missing or damaged.
        """

        def fetch(file: StoredFile) -> None:
            local = target / file.name
            local.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                problem = self._problem(path, file)
                if problem is None:
                    local.symlink_to(self.local_path(f"{path}/{file.name}"))
            else:
                problem = self._download(path, file, local)
            if problem is not None:
                raise DamagedFile(problem)

        _for_each(fetch, files)

    def _download(self, path: str, file: StoredFile, local: Path) -> str | None:
        """Downloads a file. Returns why it is not the one of the manifest, in one sentence; None when it is."""
        where, problem = f"{self.uri(path)}/{file.name}", None
        store = DirectoryStore(local.parent)
        try:
            with explain_errors(where):
                stream = self._filesystem.open_input_stream(self.full_path(f"{path}/{file.name}"))
        except FileNotFoundError:
            return f"{where} is missing"
        with stream, store.create_file("", local.name) as copy:
            while chunk := stream.read(_READ_BYTES):
                copy.write(chunk)
        if copy.entry.size != file.size:
            problem = f"has {copy.entry.size} bytes instead of {file.size}"
        elif copy.entry.sha256 != file.sha256:
            problem = "is corrupted: its sha256 is not that of the manifest"
        if problem is None:
            return None
        local.unlink()
        return f"the download of {where} {problem}"

    def fetch_directory(self, path: str) -> Path:
        """A local directory with the contents of a complete one: the directory itself if mounted, else a download.

        A download is compared with the manifest and cached in the temporary directory of the machine, by manifest.

        Raises:
            RunDirError: The directory is not complete, or the download is damaged.
        """
        files = self.read_manifest(path)
        if self.is_local:
            return self.local_path(path)
        manifest = self.read_bytes(f"{path}/{MANIFEST}")
        key = hashlib.sha256(self.uri(path).encode() + manifest).hexdigest()[:24]
        cached = Path(tempfile.gettempdir(), f"aft_ray-{os.getuid()}", key)
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            with open(cached.with_name(f"{key}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine downloads, the others wait for it
                if not cached.exists():
                    download = temporary_sibling(cached)
                    try:
                        self.fetch_files(path, files, download)
                        DirectoryStore(download).write_bytes(MANIFEST, manifest)
                    except BaseException:
                        shutil.rmtree(download, ignore_errors=True)
                        raise
                    os.rename(download, cached)
        return cached


def _for_each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of `work`, a few at once; raises what the first that failed raised."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_COPIES, len(items))) as pool:
        return list(pool.map(work, items))
