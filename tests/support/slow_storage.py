"""Run directories whose storage misbehaves when checkpoints are copied there."""

import time

from aft_ray.storage.run_dir import RunDir, RunDirError

SECONDS = 5.0


class SlowRunDir(RunDir):
    """Takes seconds for each, as remote storage does. Ray's workers get one too: it is pickled as what it is."""

    def __reduce__(self):
        return SlowRunDir, (self._uri, self._given)

    def add_files(self, local_dir, path) -> None:
        time.sleep(SECONDS)
        super().add_files(local_dir, path)


class FullRunDir(RunDir):
    """Has no room for the checkpoint of round 1."""

    def __reduce__(self):
        return FullRunDir, (self._uri, self._given)

    def add_files(self, local_dir, path) -> None:
        if "/0001/" in path:
            raise RunDirError(f"cannot write {self.uri(path)}: No space left on device; make room there")
        super().add_files(local_dir, path)
