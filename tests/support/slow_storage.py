"""Run directories whose storage is slow or full when checkpoints are copied to it."""

import time

from aft_ray.storage.run_dir import RunDir, RunDirError

SECONDS = 5.0


class SlowRunDir(RunDir):
    """Takes `SECONDS` for each copy, as remote storage may."""

    def add_files(self, local_dir, path):
        time.sleep(SECONDS)
        return super().add_files(local_dir, path)


class FullRunDir(RunDir):
    """Has no space for the checkpoint of round 1."""

    def add_files(self, local_dir, path):
        if "/0001/" in path:
            raise RunDirError(f"cannot write {self.uri(path)}: No space left on device; make room there")
        return super().add_files(local_dir, path)
