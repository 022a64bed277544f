"""Stores whole directories, such as models and checkpoints, together with a manifest of their files.

Invariant: a directory is complete exactly when its `MANIFEST.json`, which is written last, is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from aft_ray.storage.files import (
    MANIFEST,
    FileStore,
    RunDirError,
    explain_errors,
    fsync,
    is_temporary,
    temporary_sibling,
)

_READ_BYTES = 8 << 20


class DirectoryStore(FileStore):
    """A file store that also keeps complete directories. A manifest holds the size and the SHA-256 of every file."""

    def write_manifest(self, path: str) -> None:
        """Declares a directory complete: makes every file below it durable, then writes the manifest."""
        self.delete(f"{path}/{MANIFEST}")
        selector = pafs.FileSelector(self.full_path(path), recursive=True)
        files = {}
        for info in sorted(self._filesystem.get_file_info(selector), key=lambda info: info.path):
            if info.type == pafs.FileType.File and not is_temporary(info.base_name):
                if self.is_local:
                    fsync(info.path)
                name = info.path[len(self.full_path(path)) :].lstrip("/")
                files[name] = {"size": info.size, "sha256": self._sha256(info.path)}
        self.write_json(f"{path}/{MANIFEST}", {"files": files})

    def is_complete(self, path: str) -> bool:
        """Whether the directory has a manifest. This is cheap; `verify_manifest` reads the contents."""
        return self.exists(f"{path}/{MANIFEST}")

    def verify_manifest(self, path: str) -> list[str]:
        """Compares every file with the manifest.

        Returns:
            One sentence for each problem, which names the file; empty when there is none.
        """
        if not self.is_complete(path):
            return [f"{self.uri(path)} has no {MANIFEST}: it was never completed"]
        try:
            files = {str(name): (entry["size"], entry["sha256"]) for name, entry in self._manifest(path).items()}
        except (RunDirError, KeyError, TypeError, AttributeError):
            return [f"{self.uri(path)}/{MANIFEST} is corrupted"]
        problems = []
        for name, (size, sha256) in files.items():
            info = self._filesystem.get_file_info(self.full_path(f"{path}/{name}"))
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
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def store_directory(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Moves a finished local directory to `path` with a manifest, and replaces what is there.

        On a mounted filesystem `path` appears by a rename. On an object store the files are uploaded and the manifest
        is uploaded last.
        """
        source = DirectoryStore(local_dir)
        with explain_errors(self.uri(path)):
            source.write_manifest("")
            if not self.is_local:
                self.delete(path)
                for name in [*source._manifest(""), MANIFEST]:
                    target = self.full_path(f"{path}/{name}")
                    self._create_parent(target)
                    pafs.copy_files(source.full_path(name), target, source._filesystem, self._filesystem)
                shutil.rmtree(source._root)
                return
            target_dir = self.local_path(path)
            target_dir.parent.mkdir(parents=True, exist_ok=True)
            # A rename does not work across devices: shutil.move then copies, so it gets a temporary name as its target.
            temporary = temporary_sibling(target_dir)
            shutil.move(source._root, temporary)
            self.delete(path)
            os.rename(temporary, target_dir)
            fsync(target_dir.parent)

    def add_files(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Copies the files below a local directory into `path`, to which other processes may add files as well.

        It writes no manifest: one process calls `write_manifest` when all have added their files.
        """
        with explain_errors(self.uri(path)):
            self._filesystem.create_dir(self.full_path(path), recursive=True)
            pafs.copy_files(os.fspath(local_dir), self.full_path(path), pafs.LocalFileSystem(), self._filesystem)

    def fetch_directory(self, path: str) -> Path:
        """A local directory with the contents of a complete one: the directory itself if mounted, else a download.

        A download is compared with the manifest and cached in the temporary directory of the machine, by manifest.

        Raises:
            RunDirError: The directory is not complete, or the download is damaged.
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
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the machine downloads, the others wait for it
                if not cached.exists():
                    self._download(path, cached)
        return cached

    def _download(self, path: str, cached: Path) -> None:
        download = DirectoryStore(temporary_sibling(cached))
        with explain_errors(f"{cached} for {self.uri(path)}"):
            for name in [*self._manifest(path), MANIFEST]:
                target = download.local_path(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(self.full_path(f"{path}/{name}"), str(target), self._filesystem, download._filesystem)
        if problems := download.verify_manifest(""):
            shutil.rmtree(download._root)
            raise RunDirError(f"the download of {self.uri(path)} is damaged: {problems[0]}")
        os.rename(download._root, cached)
