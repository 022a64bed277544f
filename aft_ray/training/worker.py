"""What every Ray Train worker runs: all rounds in order, each a pass of optimiser steps and a publication.

Invariants: a version is published once its model directory is durable, and that directory is never made again; the
ledger calls a round trained once its checkpoint is durable too, which may be while the next round trains; every rank
takes the same steps; a worker that starts again continues after the last round that the ledger calls trained.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray.train
import torch

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.coordination.coordinator import PeerFailed, call
from aft_ray.objectives import Objective, build_objective
from aft_ray.observe.logs import redirect_output
from aft_ray.storage.ledger import CheckpointRecord, Ledger
from aft_ray.storage.records import Group
from aft_ray.storage.run_dir import LOGS, RunDir, RunDirError
from aft_ray.tasks.dataset import load_tokenizer, round_size
from aft_ray.training import batching, checkpoint, deepspeed, step
from aft_ray.training import offload as turns
from aft_ray.training.checkpoint import CheckpointFailed, Saver
from aft_ray.training.collate import collate
from aft_ray.training.loading import LoadingError
from aft_ray.training.weight_publisher import WeightPublisher, build_transport

# Failures that starting again cannot mend; each is one sentence.
_FINAL = (step.NonFiniteLoss, batching.BatchingError, RunDirError, ConfigError, LoadingError, CheckpointFailed)


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is given. questions: of each task, how many the run trains on; the step counts follow from them."""

    config: RunConfig
    run_dir: RunDir
    coordinator: Any
    questions: dict[str, int]


def worker_main(given: dict[str, Any]) -> None:
    """The training function of `TorchTrainer`. A failure that a restart cannot mend ends the run through the board."""
    worker: WorkerConfig = given["worker"]
    rank = ray.train.get_context().get_world_rank()
    if worker.run_dir.is_local:
        redirect_output(str(worker.run_dir.local_path(f"{LOGS}/trainer-{rank}.log")))
    try:
        _Trainer(worker, rank).run()
    except PeerFailed:
        return  # the other side failed and says why
    except _FINAL as error:
        call(worker.coordinator.fail, str(error))


class _Trainer:
    def __init__(self, worker: WorkerConfig, rank: int) -> None:
        self.config, self.run_dir, self.coordinator = worker.config, worker.run_dir, worker.coordinator
        self.questions = worker.questions
        self.rank = rank
        self.world = ray.train.get_context().get_world_size()
        self.ledger = Ledger(worker.run_dir)
        self.tokenizer = load_tokenizer(self.config)
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        transport = build_transport(self.config, self.coordinator, self.rank)
        self.publisher = WeightPublisher(self.config, self.run_dir, self.tokenizer, self.rank, transport)
        # Written to by the thread that ends a save, which must not meet the main thread in one ledger.
        self.records = Ledger(worker.run_dir)
        self.saver = Saver(self.run_dir, self.rank, self.config.training.timeout_s, self.coordinator)
        if self.config.training.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(self.config.training.cpus_per_worker)))

    def run(self) -> None:
        last = self.ledger.last_checkpoint()
        if last and self.rank == 0:
            # A worker that died between the ledger and the board has left its version unpublished.
            call(self.coordinator.publish, self.publisher.read(last.round))
        engine = None
        last_round = self.config.rounds.count
        for round_number in range(self.ledger.first_untrained_round(bool(self.config.vft.epochs)), last_round + 1):
            anew = engine is None or round_number == 1
            if anew:
                # Round 1 starts like a run from a fine-tuned model: fresh optimizer, weights of version 0.
                engine = None
            waited = self._let_samplers_work(engine, round_number) if self.config.sampling.colocate else 0.0
            if anew:
                engine = self._engine(round_number, last if last and round_number > 1 else None)
            self._round(engine, round_number, waited)
        if self.config.sampling.colocate:
            self._give_way(engine, last_round + 1)
        self.saver.wait()

    def _let_samplers_work(self, engine: Any, round_number: int) -> float:
        """Leaves the GPUs to the samplers until they have sampled a round; the seconds that took."""
        self._give_way(engine, round_number)
        waited = float(call(self.coordinator.wait_ready, round_number, self.config.rounds.timeout_s))
        if engine is not None:
            turns.reload(engine)
        return waited

    def _give_way(self, engine: Any, round_number: int) -> None:
        if engine is not None:
            turns.leave(engine)
        call(self.coordinator.release_gpus, round_number, turns.seat(self.rank, self.world))

    def _engine(self, round_number: int, resumed: CheckpointRecord | None) -> Any:
        config = self.config
        torch.manual_seed(config.seed)
        name, adapter = config.model.name, None
        if round_number > 0 and config.vft.epochs:
            if config.lora is not None:
                adapter = self.run_dir.fetch_directory(self.run_dir.adapter(0))
            else:
                name = str(self.run_dir.fetch_directory(self.run_dir.model(0)))
        build = partial(deepspeed.build_engine, name, config.model, config.training, lora=config.lora, adapter=adapter)
        if resumed is None:
            return build()
        state = self.run_dir.fetch_directory(resumed.checkpoint)
        if deepspeed.saved_by(state) in (None, self.world):
            engine = build()
            deepspeed.load(engine, state)
            return engine
        with checkpoint.for_any_number(state, self.run_dir, config.training.timeout_s) as converted:
            engine = build(universal=True)
            deepspeed.load(engine, converted)
        return engine

    def _round(self, engine: Any, round_number: int, waited: float) -> None:
        waited += call(self.coordinator.wait_ready, round_number, self.config.rounds.timeout_s)
        self.ledger.refresh()
        groups = self.ledger.read_groups(round_number)
        # Dropout draws from it: a round is the same whether or not the rounds before it ran in this process.
        torch.manual_seed(_round_seed(self.config.seed, round_number, self.rank))
        metrics = self._train(engine, round_number, groups) | {"waited_s": waited}
        stored = self.publisher.is_stored(round_number)
        self._finish(engine, round_number, groups, metrics, stored)
        if not stored:
            self.publisher.deliver(engine, round_number)

    def _finish(
        self, engine: Any, round_number: int, groups: list[Group], metrics: dict[str, Any], stored: bool
    ) -> None:
        """Makes the round durable: model directory, then board, then checkpoint and ledger while training goes on.

        stored: the model directory is there already, and is kept.
        """
        started = time.monotonic()
        if stored:
            manifest = self.publisher.read(round_number) if self.rank == 0 else None
        else:
            manifest = self.publisher.write(engine, round_number, groups)
        if manifest is not None:
            metrics |= {"publish_s": time.monotonic() - started, "published_bytes": manifest.bytes}
            call(self.coordinator.publish, manifest)
        saving = time.monotonic()

        def durable() -> None:
            measured = metrics | {"checkpoint_s": time.monotonic() - saving}
            path = self.run_dir.checkpoint(round_number)
            self.records.record_checkpoint(CheckpointRecord(round_number, metrics["steps"], path, True, measured))
            call(self.coordinator.post, {"event": "trained", **measured})

        self.saver.begin(engine, round_number, durable)

    def _train(self, engine: Any, round_number: int, groups: list[Group]) -> dict[str, Any]:
        """The optimiser steps of a round, and what they amounted to."""
        started = time.monotonic()
        schedule = _schedule(self.config, self.questions, round_number)
        objective = schedule.objective
        plan = batching.plan_pass(
            [batching.group_size(group, objective) for group in groups],
            ranks=self.world,
            groups_per_step=schedule.groups_per_step,
            tokens_per_microbatch=self.config.training.tokens_per_microbatch,
            epochs=schedule.epochs,
            seed=self.config.seed,
            round=round_number,
        )
        steps = [planned for epoch in plan for planned in epoch]
        history: list[step.StepStats] = []
        for number, planned in enumerate(steps):
            at = schedule.first_step + number
            stats = step.train_step(
                engine,
                [
                    collate([groups[index] for index in micro], objective, self.pad_token_id)
                    for micro in planned.shares[self.rank]
                ],
                objective,
                self.config.objective.weight,
                planned.totals,
                step.learning_rate(at, schedule.total_steps, schedule.peak, self.config.training.warmup),
            )
            history.append(stats)
            if self.rank == 0:
                measured = {key: _finite(value) for key, value in asdict(stats).items()}
                position = {"round": round_number, "step": number + 1, "steps": len(steps), "global_step": at}
                self.coordinator.post.remote({"event": "step", **position, **measured})
        seconds = time.monotonic() - started
        tokens = sum(stats.tokens for stats in history)
        return {
            "round": round_number,
            "groups": len(groups),
            "steps": len(steps),
            "train_s": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            **{
                name: _finite(_mean([getattr(stats, name) for stats in history]))
                for name in ("loss", "vft_loss", "alignment_loss", "grad_norm", "right_score", "wrong_score")
            },
        }


@dataclass(frozen=True)
class _Schedule:
    """How a round is trained, and where its steps lie in its phase: round 0, or all rounds after it."""

    objective: Objective
    epochs: int
    groups_per_step: int
    peak: float
    first_step: int
    total_steps: int


def _schedule(config: RunConfig, questions: Mapping[str, int], round_number: int) -> _Schedule:
    if round_number == 0:
        vft = config.vft
        total = batching.steps_of(round_size(config, questions, 0), vft.questions_per_step, vft.epochs)
        return _Schedule(build_objective("vft"), vft.epochs, vft.questions_per_step, vft.learning_rate, 0, total)
    training = config.training
    steps = batching.steps_of(round_size(config, questions, round_number), training.groups_per_step, training.epochs)
    return _Schedule(
        build_objective(config.objective.name, **config.objective.options),
        training.epochs,
        training.groups_per_step,
        training.learning_rate,
        (round_number - 1) * steps,
        config.rounds.count * steps,
    )


def _round_seed(seed: int, round_number: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/round {round_number}/rank {rank}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _mean(values: list[float]) -> float:
    """Mean of the values that exist: a step without a wrong candidate has no mean score of them."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def fit(worker: WorkerConfig) -> None:
    """Runs the workers to the end of the last round. Raises what Ray Train raises when they fail for good."""
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = worker.config.training
    gpu = training.gpus_per_worker > 0
    trainer = TorchTrainer(
        worker_main,
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
