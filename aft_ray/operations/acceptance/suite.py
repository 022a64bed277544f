"""The list of acceptance checks, and how they are run: each in a process of its own, with a deadline.

Invariant: every check that was asked for has an outcome, also when its process hangs, dies, or lacks a package. A check
that cannot run here says why. Importing this module imports neither Ray nor vLLM, and no check of the part "training"
does.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from aft_ray.operations.acceptance import engines, runs, speed, training
from aft_ray.operations.acceptance.machine import gpu_count
from aft_ray.operations.acceptance.outcome import Figure, NotAccepted, Outcome, Skipped, from_json, judge
from aft_ray.operations.acceptance.process import run_to_end


@dataclass(frozen=True, slots=True)
class Setting:
    """How the checks are run.

    Attributes:
        small: with tiny models; on a machine without a GPU, on its CPU.
        storage: a directory that all nodes share, for the run on two nodes.
    """

    small: bool = False
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the suite.

    Attributes:
        part: "training" needs no Ray and no vLLM; "engine" is one engine; "run" is a whole run.
        measure: the check itself. It raises Skipped or NotAccepted, or returns what it has measured.
        packages: the modules that it needs beside torch and transformers.
        gpus: the GPUs that it needs on this machine.
        timeout_s: its deadline, seconds.
    """

    name: str
    part: str
    measure: Callable[[Setting], list[Figure]]
    packages: tuple[str, ...] = ()
    gpus: int = 1
    timeout_s: float = 900.0


def _small(measure: Callable[..., list[Figure]], **keys: object) -> Callable[[Setting], list[Figure]]:
    return lambda setting: measure(setting.small, **keys)


def _always(measure: Callable[[], list[Figure]]) -> Callable[[Setting], list[Figure]]:
    return lambda setting: measure()


_DEEPSPEED, _LORA = ("deepspeed",), ("deepspeed", "peft")
_RUN = ("ray", "vllm", "deepspeed")
CHECKS = (
    Check("step", "training", _small(training.plain_step)),
    *(
        Check(f"step-zero-{stage}", "training", _small(training.zero_step, zero_stage=stage), _DEEPSPEED)
        for stage in range(4)
    ),
    Check(
        "step-offload", "training", _small(training.zero_step, zero_stage=2, offload_optimizer=True), _DEEPSPEED
    ),
    Check(
        "step-offload-all",
        "training",
        _small(training.zero_step, zero_stage=3, offload_optimizer=True, offload_parameters=True),
        _DEEPSPEED,
    ),
    Check("step-lora", "training", _small(training.lora_step, zero_stage=3), _LORA),
    Check("train-1b", "training", _small(speed.train_1b), _DEEPSPEED),
    Check("train-7b", "training", _small(speed.train_7b), _LORA, timeout_s=1800),
    Check("engine-scores", "engine", _always(engines.engine_scores), ("vllm",)),
    Check("engine-sleep", "engine", _always(engines.engine_sleep), ("vllm",)),
    *(
        Check(f"run-{name}", "run", _always(partial(runs.run_on_one_gpu, transport)), (*_RUN, *more), timeout_s=1600)
        for name, transport, more in (
            ("checkpoint", "checkpoint", ()),
            ("object-store", "object_store", ()),
            ("lora", "lora", ("peft",)),
        )
    ),
    Check("run-nccl", "run", _always(runs.run_broadcast), _RUN, gpus=2, timeout_s=1600),
    Check("run-tensor-parallel", "run", _always(runs.run_tensor_parallel), _RUN, gpus=2, timeout_s=1600),
    # Its GPUs are those of the cluster: the head, where it may be started, often has none.
    Check(
        "run-two-nodes",
        "run",
        lambda setting: runs.run_two_nodes(setting.small, setting.storage),
        _RUN,
        gpus=0,
        timeout_s=1600,
    ),
)  # fmt: skip
PARTS = tuple(dict.fromkeys(check.part for check in CHECKS))


def chosen(names: Sequence[str]) -> list[Check]:
    """The checks of these names and parts, in the order of the suite; all without any.

    Raises:
        ValueError: a name is neither a check nor a part.
    """
    known = {check.name for check in CHECKS} | set(PARTS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{unknown[0]} is no acceptance check; there are {', '.join(PARTS)}, "
            f"and {', '.join(check.name for check in CHECKS)}"
        )
    return [check for check in CHECKS if not names or check.name in names or check.part in names]


def run_checks(checks: Sequence[Check], setting: Setting) -> Iterator[Outcome]:
    """Runs the checks one after the other, each in a child process, and yields their outcomes."""
    for check in checks:
        yield _run_in_child(check, setting)


def run_here(check: Check, setting: Setting) -> Outcome:
    """Runs a check in this process. Every exception of it becomes a failed outcome."""
    if reason := _why_not(check, setting):
        return Outcome(check.name, "skipped", reason=reason)
    started = time.monotonic()
    try:
        figures = check.measure(setting)
    except Skipped as error:
        return Outcome(check.name, "skipped", reason=str(error))
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        reason = first if isinstance(error, NotAccepted) else f"{type(error).__name__}: {first}"
        return Outcome(check.name, "failed", reason=reason, seconds=time.monotonic() - started)
    return judge(check.name, figures, time.monotonic() - started)


def _why_not(check: Check, setting: Setting) -> str | None:
    """Why a check cannot run on this machine; None when it can. In the small form a CPU stands in for all GPUs."""
    missing = [name for name in ("torch", "transformers", *check.packages) if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}, which this machine does not have"
    have = gpu_count()
    if have >= check.gpus or (setting.small and not have):
        return None
    needed = f"needs {check.gpus} GPU{'s' if check.gpus > 1 else ''}, this machine has {have}"
    return needed if have else f"{needed}; --small runs it on the CPU"


def _run_in_child(check: Check, setting: Setting) -> Outcome:
    command = [sys.executable, "-m", "aft_ray.operations.acceptance", check.name, "--here"]
    command += ["--small"] if setting.small else []
    command += ["--storage", setting.storage] if setting.storage else []
    started = time.monotonic()
    try:
        done = run_to_end(command, check.timeout_s)
    except subprocess.TimeoutExpired:
        reason = f"it did not end within {check.timeout_s:.0f} s"
        return Outcome(check.name, "failed", reason=reason, seconds=time.monotonic() - started)
    try:
        return from_json(done.stdout.splitlines()[-1])
    except (IndexError, ValueError, TypeError, KeyError):
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        reason = f"its process ended with status {done.returncode} and said: {said}"
        return Outcome(check.name, "failed", reason=reason, seconds=time.monotonic() - started)
