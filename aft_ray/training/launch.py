"""Starts the train workers of a run: one `TorchTrainer.fit()` that lasts from the first round to the last.

Invariant: this module imports neither torch nor DeepSpeed until workers start, so the driver can import it at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from aft_ray.config.run import RunConfig
from aft_ray.storage.run_dir import RunDir


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

    Ray Train starts the workers again after a failure, up to `training.max_failures` times; they continue after the
    last round that the ledger records as trained.
    """
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = worker.config.training
    gpu = training.gpus_per_worker > 0
    trainer = TorchTrainer(
        _train_function,
        train_loop_config={"worker": worker},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(training.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=TrainRunConfig(
            storage_path=os.fspath(worker.run_dir.full_path()),
            storage_filesystem=worker.run_dir.filesystem,
            name="rounds",
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=training.keep_checkpoints),
        ),
    )
    trainer.fit()


def _train_function(loop_config: dict[str, Any]) -> None:
    """What Ray Train calls in every worker process, where torch is imported."""
    from aft_ray.training.worker import run_worker

    worker: WorkerConfig = loop_config["worker"]
    run_worker(worker.config, worker.run_dir, worker.coordinator, worker.questions)
