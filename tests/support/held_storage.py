"""Run directories whose storage writes a model late, or not at all."""

import contextlib
import json
import time

from aft_ray.storage.run_dir import METRICS, RunDir, RunDirError


class HeldModelRunDir(RunDir):
    """Writes the model of round 1 only after the first groups of round 2 have been recorded."""

    @contextlib.contextmanager
    def create_file(self, path, name):
        if path.endswith("/0001/model"):
            wait_until(self.may_write)
        with super().create_file(path, name) as file:
            yield file

    def may_write(self) -> bool:
        return bool(self.listdir(self.groups(2)))


class SlowModelRunDir(HeldModelRunDir):
    """Writes the model of round 1 only after the first step of round 2 has been taken."""

    def may_write(self) -> bool:
        steps = [line for line in self.read_lines(METRICS) if '"step"' in line]
        return any(json.loads(line)["round"] == 2 for line in steps)


class FullModelRunDir(HeldModelRunDir):
    """Has no space for the model of round 1, which shows after the first groups of round 2 have been recorded."""

    def may_write(self) -> bool:
        if super().may_write():
            raise RunDirError(f"cannot write {self.uri(self.model(1))}: No space left on device; make room there")
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise RunDirError("what the storage waits for has not happened in 300 s")
        time.sleep(0.05)
    time.sleep(1.0)
