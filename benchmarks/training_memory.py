"""Peak memory of one optimiser step in a process of its own. `training.py` starts it, once for each measurement.

    python benchmarks/training_memory.py SIDE MODEL TASK

It prints one line of JSON with bytes of resident memory above what the process has with all libraries loaded:

    at_rest     weights and the states of the optimizer, after a first step on one short group
    peak        the highest in the step that is measured; it has the gradients, activations and logits as well

The process asks the C library to give memory of more than a mebibyte back at once, so that what is resident is what
is in use, on both sides alike.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_LARGE = 1 << 20


@dataclass(frozen=True)
class MemoryTask:
    """The step whose memory is measured: groups of one size under `aft_boundary`."""

    groups: int
    k: int
    vocabulary: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    budget: int


@dataclass(frozen=True)
class Memory:
    """Bytes; see above."""

    at_rest: int
    peak: int

    @property
    def step(self) -> int:
        """What the step needs beside weights and states."""
        return self.peak - self.at_rest


def measure(side: str, model: Path, task: MemoryTask) -> Memory:
    """Measures in a new process. `side` is "padded" or "packed"."""
    command = [sys.executable, str(Path(__file__)), side, str(model), json.dumps(asdict(task))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(_LARGE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of memory ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _main(side: str, model: str, task_json: str) -> None:
    from training_data import uniform_groups
    from training_sides import Packed, Padded, Task, prepare_process

    from aft_ray.objectives import build_objective

    prepare_process()
    task = MemoryTask(**json.loads(task_json))
    objective = build_objective("aft_boundary", beta=0.15)
    groups = uniform_groups(
        task.groups, task.k, task.vocabulary, 0, prompt=tuple(task.prompt), response=tuple(task.response)
    )
    short = uniform_groups(1, 2, task.vocabulary, 0, prompt=(4, 4), response=(4, 4))
    libraries = _resident("VmRSS")
    steps = {"padded": Padded, "packed": Packed}[side](Path(model))
    steps.step(Task(short, objective, budget=task.budget))
    at_rest, before = _resident("VmRSS"), _resident("VmHWM")
    steps.step(Task(groups, objective, budget=task.budget))
    peak = _resident("VmHWM")
    if peak == before:
        raise RuntimeError("the step needed less memory than loading the model, so it cannot be measured")
    print(json.dumps(asdict(Memory(at_rest - libraries, peak - libraries))))


def _resident(key: str) -> int:
    """Bytes of resident memory of this process, now (VmRSS) or at most since its program began (VmHWM)."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
