"""What every Ray Train worker does: it trains the rounds in order and publishes each one as a policy version.

This is the train workers' half of a round; the driver's half is `run/orchestrator.py`. In each round every worker

    1. waits until the coordinator says that all groups of the round are in the ledger
    2. takes the round's optimiser steps; each is planned from the sizes of its groups, the same plan on every rank
    3. publishes the new version: the weights get to the running engines, and this worker keeps its share in CPU memory
    4. begins to write its share of the version's model directory
    5. begins to save the training state; the ledger records the round as trained when both are durable
    6. with a broadcast, sends the weights only now if the engines were still sampling in step 3

Steps 4 and 5 end in the background while the next round trains. Within step 2 the training state is saved every
`training.checkpoint_every_s`, too. With `weights.transport: checkpoint` the engines read the directory, so that step 3
waits for step 4. With `sampling.colocate` a worker moves its states to CPU memory and releases its GPU before step 1,
and moves them back after it.

Invariants: a model directory that is complete is never written again; every rank takes the same steps; workers that
start again continue after the last step whose training state is intact, and take the steps that would have followed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.coordination.coordinator import PeerFailed, call
from aft_ray.observe.logs import redirect_output
from aft_ray.storage.ledger import CheckpointRecord, Ledger
from aft_ray.storage.run_dir import LOGS, RunDir, RunDirError
from aft_ray.tasks.dataset import load_tokenizer
from aft_ray.training import batching, deepspeed, step
from aft_ray.training.batch import make_batch
from aft_ray.training.forward.scoring import shares_prompts
from aft_ray.training.model.loading import LoadingError
from aft_ray.training.process_groups import DamagedState
from aft_ray.training.publication.model_writer import ModelWriteFailed, Writing
from aft_ray.training.publication.weight_publisher import WeightPublisher, build_transport
from aft_ray.training.round_groups import RoundGroups
from aft_ray.training.round_progress import RoundProgress
from aft_ray.training.schedule import RoundSchedule, round_schedule
from aft_ray.training.state.checkpoint import CheckpointFailed, CheckpointWriter, fetched_state
from aft_ray.training.state.lending import GpuLender
from aft_ray.training.state.retention import delete_obsolete_states
from aft_ray.training.state.scratch import check_scratch

# Errors that starting the workers again cannot repair. The message of each is one sentence for the user.
_NOT_RETRIED = (
    step.NonFiniteLoss,
    batching.BatchingError,
    RunDirError,
    ConfigError,
    LoadingError,
    ModelWriteFailed,
    CheckpointFailed,
)


def run_worker(config: RunConfig, run_dir: RunDir, coordinator: Any, questions: Mapping[str, int]) -> None:
    """Trains all remaining rounds on this worker. All workers of the run call it together.

    A failure that starting again cannot repair ends the run through the coordinator; any other is raised, and Ray Train
    starts the workers again.

    Args:
        coordinator: the handle of the coordinator actor.
        questions: for each task, the number of questions that the run trains on.
    """
    rank = ray.train.get_context().get_world_rank()
    if run_dir.is_local:
        redirect_output(str(run_dir.local_path(f"{LOGS}/trainer-{rank}.log")))
    try:
        TrainWorker(config, run_dir, coordinator, questions, rank).run()
    except PeerFailed:
        return  # the driver has failed and reports the reason itself
    except _NOT_RETRIED as error:
        call(coordinator.fail, str(error))


class TrainWorker:
    """One rank of the training of a run. All ranks call its methods together and in the same order."""

    def __init__(
        self, config: RunConfig, run_dir: RunDir, coordinator: Any, questions: Mapping[str, int], rank: int
    ) -> None:
        self.config, self.run_dir, self.coordinator = config, run_dir, coordinator
        self.questions = questions
        self.rank = rank
        self.world_size = ray.train.get_context().get_world_size()
        self.ledger = Ledger(run_dir)
        # A second ledger object for the thread that saves checkpoints, since one object is not for two threads.
        self.checkpoint_ledger = Ledger(run_dir, logs=("training",))
        tokenizer = load_tokenizer(config)
        if rank == 0:
            call(coordinator.begin_training)
        transport = build_transport(config, coordinator, rank)
        self.publisher = WeightPublisher(config, run_dir, tokenizer, rank, transport, coordinator)
        check_scratch(config, run_dir)
        self.lender = GpuLender(config, coordinator, rank, self.world_size)
        self.checkpoints = CheckpointWriter(run_dir, rank, config.training.timeout_s, coordinator)
        if config.training.gpus_per_worker == 0:
            torch.set_num_threads(max(1, int(config.training.cpus_per_worker)))

    def run(self) -> None:
        """Trains every round that the ledger does not record as trained, from the last intact training state on."""
        if self.rank == 0:
            delete_obsolete_states(self.checkpoint_ledger, self.config.training.keep_checkpoints)
        damaged: set[str] = set()
        while True:
            # Rank 0 decides, since a file system may show a deleted directory to other nodes for some seconds.
            last = [self.ledger.last_checkpoint(damaged)]
            dist.broadcast_object_list(last, src=0)
            try:
                return self._train_from(last[0])
            except DamagedState as error:
                assert last[0] is not None
                damaged.add(last[0].checkpoint)
                if self.rank == 0:
                    call(self.coordinator.post, {"event": "state_damaged", "reason": str(error)})

    def _train_from(self, state: CheckpointRecord | None) -> None:
        """Trains the rounds after a training state, or from the first round on.

        Raises:
            DamagedState: on every rank, before any step is taken: the state cannot be loaded.
        """
        if state and self.rank == 0 and (version := state.next_round - 1) in self.ledger.trained_rounds():
            # The driver may wait for this version, which workers that have ended offered from their memory.
            call(self.coordinator.publish, self.publisher.read(version))
        engine = None
        first_round = state.next_round if state else 0 if self.config.vft.epochs else 1
        last_round = self.config.rounds.count
        for round_number in range(first_round, last_round + 1):
            is_inside = state is not None and not state.complete and state.round == round_number
            # Round 1 starts like a run from a fine-tuned model: a new optimizer, and the weights of version 0.
            needs_engine = engine is None or round_number == 1
            if needs_engine:
                engine = None  # frees its memory
            waited_s = self.lender.lend(engine, round_number) if self.config.sampling.colocate else 0.0
            if needs_engine:
                engine = self._build_engine(round_number, state if is_inside or round_number > 1 else None)
            progress = RoundProgress.recorded(state.metrics) if state and is_inside else RoundProgress()
            self._train_round(engine, round_number, waited_s, progress)
        if self.config.sampling.colocate:
            self.lender.give_up(engine, last_round + 1)  # for the evaluation of the last version
        self.publisher.wait_durable()
        self.checkpoints.wait()

    def _train_round(self, engine: Any, round_number: int, waited_s: float, progress: RoundProgress) -> None:
        """The six steps of a round that the module's docstring lists.

        Args:
            waited_s: seconds that this worker has waited for the round already.
            progress: the steps of the round that were taken before `engine` was loaded.
        """
        waited_s += call(self.coordinator.wait_ready, round_number, self.config.rounds.timeout_s)
        self.ledger.refresh()
        schedule = round_schedule(self.config, self.questions, round_number)
        groups = RoundGroups(self.ledger, round_number, schedule.objective)
        metrics = self._take_steps(engine, round_number, groups, schedule, progress) | {"waited_s": waited_s}
        started = time.monotonic()
        published = self.publisher.publish(engine, round_number, groups.read_longest(self.config.weights.probes))
        metrics |= {"publish_s": time.monotonic() - started, "published_bytes": published.bytes}
        self._save_checkpoint(engine, round_number, published.writing, metrics)
        self.publisher.finish()

    def _take_steps(
        self, engine: Any, round_number: int, groups: RoundGroups, schedule: RoundSchedule, progress: RoundProgress
    ) -> dict[str, Any]:
        """Takes the remaining optimiser steps of a round; returns what the round's `trained` event says of all."""
        started = time.monotonic() - progress.seconds
        steps = batching.count_steps(len(groups), schedule.groups_per_step, schedule.epochs)
        if progress.steps and self.rank == 0:
            position = {"round": round_number, "step": progress.steps, "steps": steps}
            call(self.coordinator.post, {"event": "resumed", **position})
        self.checkpoints.begin_round()
        taken = 0
        for epoch in range(schedule.epochs):
            order = batching.training_order(groups.ids, self.config.seed, round_number, epoch)
            for first in range(0, len(order), schedule.groups_per_step):
                taken += 1
                if taken <= progress.steps:
                    continue  # before the training state that was loaded
                chosen = order[first : first + schedule.groups_per_step]
                stats = self._take_step(engine, groups, chosen, schedule, round_number, progress.steps)
                progress.add(stats)
                progress.seconds = time.monotonic() - started
                position = {"step": taken, "steps": steps, "global_step": schedule.first_step + taken - 1}
                if self.rank == 0:
                    measured = {key: _finite_or_none(value) for key, value in asdict(stats).items()}
                    del measured["checkpoint_due"]
                    self.coordinator.post.remote({"event": "step", "round": round_number, **position, **measured})
                if stats.checkpoint_due and taken < steps:
                    self._save_inside_round(engine, round_number, position, progress.record())
        return {"round": round_number, "groups": len(groups), **progress.summary()}

    def _take_step(
        self,
        engine: Any,
        groups: RoundGroups,
        chosen: np.ndarray,
        schedule: RoundSchedule,
        round_number: int,
        number: int,
    ) -> step.StepStats:
        """Takes one step of a round.

        Args:
            chosen: the groups of the step; this rank reads and computes its share of them.
            number: steps of the round that were taken before.
        """
        # Dropout draws from this seed: a step is the same whether or not this process took the steps before it.
        torch.manual_seed(_step_seed(self.config.seed, round_number, number, self.rank))
        together = self.config.training.sequence_parallel_size  # consecutive ranks that compute the same rows
        planned = batching.plan_step(
            groups.sizes(chosen),
            ranks=self.world_size // together,
            budget=self.config.training.tokens_per_microbatch * together,
            prompts_shared=shares_prompts(engine.module),
        )
        share = planned.shares[self.rank // together]
        own = sorted({index for batch in share for index in batch.groups})
        read = dict(zip(own, groups.read(chosen[own]), strict=True))
        return step.train_step(
            engine,
            [make_batch([read[index] for index in batch.groups], batch, schedule.objective) for batch in share],
            planned,
            schedule.objective,
            self.config.objective.weight,
            schedule.learning_rate(schedule.first_step + number),
            checkpoint_due=self.rank == 0 and self.checkpoints.is_due(self.config.training.checkpoint_every_s),
        )

    def _save_checkpoint(
        self, engine: Any, round_number: int, writing: Writing | None, metrics: dict[str, Any]
    ) -> None:
        """Begins to save the training state after a round.

        When it and the model directory are durable, rank 0 records the round in the ledger as trained.

        Args:
            writing: the model directory that is being written; None when it is complete already.
            metrics: what the `trained` event says of the round.
        """
        started = time.monotonic()

        def record_as_trained(size: int) -> None:
            measured = metrics | {"checkpoint_s": time.monotonic() - started}
            if writing is not None:
                measured["directory_s"] = writing.wait()
            path = self.run_dir.checkpoint(round_number)
            measured["checkpoint_bytes"] = size
            self._record(CheckpointRecord(round_number, metrics["steps"], path, True, measured), "trained", measured)

        self.checkpoints.start(engine, round_number, record_as_trained)

    def _save_inside_round(
        self, engine: Any, round_number: int, position: dict[str, int], progress: dict[str, Any]
    ) -> None:
        """Begins to save the training state inside a round. When it is durable, rank 0 records it in the ledger.

        Args:
            position: the last step that was taken, as its event has it.
            progress: the record of the steps that were taken.
        """
        started, number = time.monotonic(), position["step"]

        def record(size: int) -> None:
            path, seconds = self.run_dir.checkpoint(round_number, number), time.monotonic() - started
            state = CheckpointRecord(round_number, number, path, False, {"steps": position["steps"], **progress})
            event = {"round": round_number, **position, "seconds": seconds, "bytes": size}
            self._record(state, "checkpoint", event)

        self.checkpoints.start(engine, round_number, record, step=number)

    def _record(self, state: CheckpointRecord, event: str, fields: dict[str, Any]) -> None:
        """Records a durable training state, tells the driver, and deletes the states that are not kept any more."""
        self.checkpoint_ledger.record_checkpoint(state)
        call(self.coordinator.post, {"event": event, **fields})
        delete_obsolete_states(self.checkpoint_ledger, self.config.training.keep_checkpoints)

    def _build_engine(self, round_number: int, resumed: CheckpointRecord | None) -> Any:
        """The DeepSpeed engine that trains from a round on.

        Rounds after round 0 begin from version 0: its weights, or its adapters on the given model.

        Args:
            resumed: the training state that is loaded; None for a new optimizer.

        Raises:
            DamagedState: on every rank, if a file of the training state is missing or damaged.
        """
        config = self.config
        torch.manual_seed(config.seed)
        name, adapter = config.model.name, None
        if round_number > 0 and config.vft.epochs:
            if config.lora is not None:
                adapter = self.run_dir.fetch_directory(self.run_dir.adapter(0))
            else:
                self.publisher.wait_durable()
                name = str(self.run_dir.fetch_directory(self.run_dir.model(0)))
        build = partial(deepspeed.build_engine, name, config.model, config.training, lora=config.lora, adapter=adapter)
        if resumed is None:
            return build()
        with fetched_state(self.run_dir, resumed.checkpoint, config.training.timeout_s) as saved:
            engine = build(universal=saved.universal)
            deepspeed.load_checkpoint(engine, saved.directory)
        return engine


def _step_seed(seed: int, round_number: int, step_number: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/round {round_number}/step {step_number}/rank {rank}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _finite_or_none(value: float) -> float | None:
    """The value as JSON can hold it."""
    return value if math.isfinite(value) else None
