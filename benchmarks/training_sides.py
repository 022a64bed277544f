"""The two steps that `training.py` compares, behind one interface: a task in, what one rank computed out.

Invariant: both sides begin with the same weights and are given the same groups, objective, budget and number of ranks.
A step is timed from its plan to the changed weights, on the rank that has the most to compute under that side's plan.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import padded_step
from training_data import PAD

from aft_ray.config.run import ModelConfig, TrainingConfig
from aft_ray.objectives import Objective
from aft_ray.storage.records import Group
from aft_ray.training import batching, deepspeed, step
from aft_ray.training.batch import make_batch

LEARNING_RATE = 1e-9  # every repetition has the same work, and the losses stay comparable


@dataclass(frozen=True)
class Task:
    """One optimiser step.

    Attributes:
        ranks: train workers among which the groups are divided; the benchmark computes the share of one of them.
        budget: training.tokens_per_microbatch, which counts padded tokens for one side and packed ones for the other.
    """

    groups: Sequence[Group]
    objective: Objective
    ranks: int = 1
    budget: int = 16384


@dataclass(frozen=True)
class Outcome:
    """What a step gave and took. The seconds are of this process."""

    loss: float
    grad_norm: float
    cpu_s: float
    wall_s: float


def prepare_process() -> None:
    """One thread, and the process group of one process that DeepSpeed needs."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Side(ABC):
    """A way to take optimiser steps, with an engine of its own."""

    @staticmethod
    @abstractmethod
    def tokens_of_ranks(task: Task) -> list[int]:
        """Tokens that each rank computes under this side's plan, padding included."""

    @abstractmethod
    def take(self, task: Task, rank: int) -> tuple[float, float]:
        """Plans the step, makes the batches of a rank, computes them and changes the weights: (loss, gradient norm)."""

    def step(self, task: Task) -> Outcome:
        """The step of the rank that has the most to compute."""
        tokens = self.tokens_of_ranks(task)
        rank = tokens.index(max(tokens))
        cpu, wall = time.process_time(), time.perf_counter()
        loss, grad_norm = self.take(task, rank)
        return Outcome(loss, grad_norm, time.process_time() - cpu, time.perf_counter() - wall)


class Padded(Side):
    """The step before packed rows."""

    def __init__(self, model: Path) -> None:
        self.engine = padded_step.build_padded_engine(model, TrainingConfig())

    @staticmethod
    def tokens_of_ranks(task: Task) -> list[int]:
        sizes = [padded_step.padded_size(group, task.objective) for group in task.groups]
        plan = padded_step.plan_padded_step(sizes, task.ranks, task.budget)
        return [sum(padded_step.computed_tokens(sizes, batch) for batch in share) for share in plan]

    def take(self, task: Task, rank: int) -> tuple[float, float]:
        sizes = [padded_step.padded_size(group, task.objective) for group in task.groups]
        share = padded_step.plan_padded_step(sizes, task.ranks, task.budget)[rank]
        batches = [padded_step.collate([task.groups[index] for index in batch], task.objective, PAD) for batch in share]
        stats = padded_step.padded_train_step(
            self.engine, batches, task.objective, 1.0, padded_step.totals(sizes), LEARNING_RATE
        )
        return stats.loss, stats.grad_norm


class Packed(Side):
    """The step of `aft_ray.training`."""

    def __init__(self, model: Path) -> None:
        self.engine: Any = deepspeed.build_engine(
            model, ModelConfig(name=str(model), dtype="float32"), TrainingConfig()
        )

    @staticmethod
    def tokens_of_ranks(task: Task) -> list[int]:
        sizes = [batching.group_size(group, task.objective) for group in task.groups]
        plan = batching.plan_step(sizes, ranks=task.ranks, budget=task.budget)
        return [sum(_columns(sizes, batch) for batch in share) for share in plan.shares]

    def take(self, task: Task, rank: int) -> tuple[float, float]:
        sizes = [batching.group_size(group, task.objective) for group in task.groups]
        plan = batching.plan_step(sizes, ranks=task.ranks, budget=task.budget)
        batches = [
            make_batch([task.groups[index] for index in batch.groups], batch, task.objective)
            for batch in plan.shares[rank]
        ]
        # This process is the only rank there is; the passes and what the losses are divided by are those of the plan.
        of_rank = replace(plan, shares=(plan.shares[rank],))
        stats = step.train_step(self.engine, batches, of_rank, task.objective, 1.0, LEARNING_RATE)
        return stats.loss, stats.grad_norm


def _columns(sizes: Sequence[batching.GroupSize], batch: batching.PlannedBatch) -> int:
    """Tokens of the packed row of a batch."""
    if batch.piece is not None:
        (index,) = batch.groups
        return sizes[index].prompt + sum(sizes[index].responses[one] - 1 for one in batch.piece.responses)
    return sum(sizes[index].prompt + sum(one - 1 for one in sizes[index].responses) for index in batch.groups)
