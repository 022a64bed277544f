"""Starts the train workers of a run: one `TorchTrainer.fit()` that lasts from the first round to the last.

Invariant: this module imports neither torch nor DeepSpeed until workers start, so the driver can import it at once.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from aft_ray.cluster.compat import reported_checkpoints_file
from aft_ray.config.run import RunConfig, TrainingConfig
from aft_ray.storage.run_dir import ROUNDS, RunDir

# The variables that torch reads the settings of its allocator from: today's name, and the older one.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class WorkerConfig:
    """What every train worker is given.

    Attributes:
        coordinator: the handle of the `coordination.coordinator.Coordinator` actor.
        questions: for each task, the number of questions that the run trains on. The numbers of steps follow from it.
    """

    config: RunConfig
    run_dir: RunDir
    coordinator: Any
    questions: dict[str, int]


def fit(worker: WorkerConfig) -> None:
    """Runs the train workers to the end of the last round. Raises what Ray Train raises when they fail for good.

    Ray Train starts the workers again after a failure, up to `training.max_failures` times; they continue from the last
    training state that the ledger records. Ray Train's own list of states begins anew, because it refuses to start when
    one that it lists was deleted; `state/retention.py` deletes them.
    """
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = worker.config.training
    worker.run_dir.delete(f"{ROUNDS}/{reported_checkpoints_file()}")
    gpu = training.gpus_per_worker > 0
    trainer = TorchTrainer(
        _train_function,
        train_loop_config={"worker": worker},
        # Ray Train takes whole seconds; no process group has less than the run's.
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=math.ceil(training.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=TrainRunConfig(
            storage_path=os.fspath(worker.run_dir.full_path()),
            storage_filesystem=worker.run_dir.filesystem,
            name=ROUNDS,
            failure_config=FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": worker_environment(training)},
        ),
    )
    trainer.fit()


def worker_environment(training: TrainingConfig) -> dict[str, str]:
    """The environment variables that the processes of the train workers have beside those of their nodes.

    On GPUs torch's allocator gets segments that can grow, since micro-batches of many sizes leave gaps between fixed
    ones. Engines must not have them: the memory that sleep mode releases is not part of such segments. A setting of
    the user is kept.
    """
    given = any(name in os.environ for name in _ALLOCATOR_SETTINGS)
    if training.gpus_per_worker == 0 or given:
        return {}
    return {_ALLOCATOR_SETTINGS[0]: "expandable_segments:True"}


def _train_function(loop_config: dict[str, Any]) -> None:
    """What Ray Train calls in every worker process, where torch is imported."""
    from aft_ray.training.process_groups import set_default_timeout
    from aft_ray.training.worker import run_worker

    worker: WorkerConfig = loop_config["worker"]
    set_default_timeout(worker.config.training.timeout_s)
    run_worker(worker.config, worker.run_dir, worker.coordinator, worker.questions)
