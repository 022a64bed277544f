"""TRL as a peer of `training.py`: its environment, and a process in it that takes a step when it is asked to.

TRL is no dependency of the project. On its first use it is installed, with the versions of torch and transformers that
run here, into an environment of its own in the user's cache; later uses find it there.

Invariant: an environment is used only if its installation ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TRL = "1.16.0"


# What this process tells DeepSpeed of its process group, which the peer would try to join.
_PROCESS_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TrlPeer:
    """A process that holds a trainer of TRL with one batch. Close it at the end."""

    def __init__(
        self, trainer: str, activations: str, model: Path, rows: Sequence[dict[str, Any]], learning_rate: float
    ) -> None:
        """Starts it and waits until it is ready.

        Args:
            trainer: "sft" or "dpo".
            activations: "recomputed" in the backward pass, which is TRL's default, or "kept".
            rows: of the batch, as `trl_steps.py` describes them.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-")
        scratch = Path(self._scratch.name)
        (scratch / "batch.json").write_text(json.dumps(rows))
        self._log = scratch / "log"
        program = Path(__file__).with_name("trl_steps.py")
        command = [
            str(environment() / "bin/python"), str(program),
            trainer, activations, str(model), str(scratch / "batch.json"), str(learning_rate), str(scratch / "output"),
        ]  # fmt: skip
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "datasets")}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**_without_process_group(os.environ), **settings},
            )
        self._read()

    def step(self) -> dict[str, float]:
        """One optimiser step: "loss", "cpu_s" and "wall_s"."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._scratch.cleanup()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TRL's process has ended:\n{self._log.read_text()[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer


def environment() -> Path:
    """The directory of the virtual environment with TRL. It is made on the first use, which needs a network."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    torch = version("torch").partition("+")[0]
    directory = cache / "aft-ray" / f"trl-{TRL}-torch-{torch}-transformers-{version('transformers')}"
    finished = directory / "installed"
    if finished.exists():
        return directory
    print(f"installing TRL {TRL} into {directory}: once, some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    pip = [str(directory / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    # As in tools/install.sh: where PyPI has only builds for GPUs, TORCH_INDEX names an index with CPU builds.
    index = os.environ.get("TORCH_INDEX")
    subprocess.run([*pip, f"torch=={torch}", *(["--index-url", index] if index else [])], check=True)
    subprocess.run([*pip, f"trl=={TRL}", f"transformers=={version('transformers')}"], check=True)
    finished.touch()
    return directory


def _without_process_group(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in _PROCESS_GROUP}
