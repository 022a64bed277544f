"""Run directories whose storage is slow or full when checkpoints are copied to it, and one that counts bytes."""

import threading
import time

import pyarrow as pa
import pyarrow.fs as pafs

from aft_ray.storage.run_dir import RunDir, RunDirError

SECONDS = 5.0


class SlowRunDir(RunDir):
    """Takes `SECONDS` for each copy of a checkpoint, as remote storage may."""

    def add_files(self, local_dir, path):
        if path.endswith("/checkpoint"):
            time.sleep(SECONDS)
        return super().add_files(local_dir, path)


class FullRunDir(RunDir):
    """Has no space for the checkpoint of round 1."""

    def add_files(self, local_dir, path):
        if path.endswith("/0001/checkpoint"):
            raise RunDirError(f"cannot write {self.uri(path)}: No space left on device; make room there")
        return super().add_files(local_dir, path)


class CountedStorage(pafs.FileSystemHandler):
    """An object store in a directory, as one rank sees it: it counts the rank's bytes and takes time for each of them.

    A fake: a real object store would be slow by itself, but would not say which rank read and wrote what.

    Attributes:
        read, written: bytes so far.
    """

    def __init__(self, root, seconds_per_byte=0.0):
        self.inner = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.read = self.written = 0
        self._seconds, self._lock = seconds_per_byte, threading.Lock()

    def _count(self, read=0, written=0):
        with self._lock:  # a rank copies several files at once
            self.read, self.written = self.read + read, self.written + written
        time.sleep(self._seconds * (read + written))

    def open_input_stream(self, path):
        return pa.PythonFile(_CountedFile(self.inner.open_input_stream(path), lambda size: self._count(read=size)), "r")

    def open_input_file(self, path):
        return self.open_input_stream(path)

    def open_output_stream(self, path, metadata):
        del metadata
        self.inner.create_dir(path.rpartition("/")[0])
        stream = self.inner.open_output_stream(path)
        return pa.PythonFile(_CountedFile(stream, lambda size: self._count(written=size)), "w")

    def open_append_stream(self, path, metadata):
        raise NotImplementedError

    def get_file_info(self, paths):
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.inner.get_file_info(selector)

    def get_type_name(self):
        return "counted"

    def normalize_path(self, path):
        return path

    def create_dir(self, path, recursive):
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.inner.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self):
        raise NotImplementedError

    def delete_file(self, path):
        self.inner.delete_file(path)

    def move(self, source, target):
        self.inner.move(source, target)

    def copy_file(self, source, target):
        self.inner.copy_file(source, target)


class _CountedFile:
    """A stream that reports the size of what is read or written."""

    def __init__(self, stream, count):
        self._stream, self._count = stream, count

    def read(self, size=-1):
        data = self._stream.read(size if size >= 0 else None)
        self._count(len(data))
        return data

    def write(self, data):
        self._stream.write(data)
        self._count(len(data))
        return len(data)

    def tell(self):
        return self._stream.tell()

    def flush(self):
        self._stream.flush()

    def close(self):
        self._stream.close()

    @property
    def closed(self):
        return self._stream.closed
