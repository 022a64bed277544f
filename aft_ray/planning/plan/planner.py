"""What any split of a cluster between samplers and train workers needs, and how long a round takes with it.

Invariant: the seconds of sampling depend on the samplers alone and the seconds of training on the train workers alone,
so that a search over splits can compute each of them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from aft_ray.cluster import uniform_nodes
from aft_ray.cluster.placement import Reservations
from aft_ray.cluster.reservations import Split, training_reservations
from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.engine_memory import EngineMemory, engine_memory
from aft_ray.planning.plan.hardware import ClusterShape
from aft_ray.planning.plan.publish_time import PublishTime, publish_time
from aft_ray.planning.plan.quantities import counted
from aft_ray.planning.plan.timing import TimeModel
from aft_ray.planning.plan.training_memory import TrainingMemory, training_memory
from aft_ray.planning.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Seconds of a round after the first ones, when the pipeline is full.

    Attributes:
        sampling: All that samplers do for the round: load the new version, sample, evaluate.
        training: All that train workers do for it: optimiser steps and their part of the publication.
        round: What both take together.
    """

    sampling: float
    training: float
    round: float

    @property
    def bottleneck(self) -> str:
        return "sampling" if self.sampling > self.training else "training"


@dataclass(frozen=True)
class Planner:
    """Computes memory, placement and time of a config on a cluster, under given assumptions, for any split."""

    config: RunConfig
    cluster: ClusterShape
    assumptions: PlanAssumptions
    model: Architecture
    work: Workload

    @cached_property
    def times(self) -> TimeModel:
        return TimeModel(self.config, self.model, self.work, self.assumptions, self.cluster.node)

    def reservations(self, split: Split) -> Reservations:
        """What the run would reserve with a split."""
        return training_reservations(self.config, split)

    def fits(self, split: Split) -> bool:
        """Whether the cluster's nodes have the CPUs and GPUs that a split reserves."""
        return uniform_nodes.fits(self.config, split, self.cluster.node.resources, self.cluster.nodes)

    def nodes_needed(self, split: Split) -> int | None:
        """The fewest nodes of the cluster's kind that hold a split; None when no number of them does."""
        return uniform_nodes.nodes_needed(self.config, split, self.cluster.node.resources)

    def trainer_memory(self, workers: int) -> TrainingMemory:
        return training_memory(self.config, self.model, self.work, self.assumptions, workers)

    def engine_memory(self, tensor_parallel: int) -> EngineMemory:
        return engine_memory(self.config, self.model, self.work, self.assumptions, self.cluster.node, tensor_parallel)

    def publish_time(self, split: Split, transport: str | None = None) -> PublishTime:
        """How long a new version takes to the samplers; by the config's transport if none is given."""
        return publish_time(
            self.config,
            self.model,
            self.assumptions,
            self.cluster.node,
            transport or self.config.weights.transport,
            split.workers,
            uniform_nodes.sampler_nodes(self.config, split, self.cluster.node.resources),
            split.tensor_parallel * self.config.sampling.pipeline_parallel_size,
        )

    def round_time(self, split: Split) -> RoundTime:
        """The time of a round after the first ones."""
        return self.combine(self.sampling_seconds(split), self.training_seconds(split))

    def sampling_seconds(self, split: Split) -> float:
        """Seconds that the samplers are busy in a round."""
        return sum(self.sampling_parts(split).values())

    def sampling_parts(self, split: Split) -> dict[str, float]:
        """What the samplers do in a round: name of the part -> seconds."""
        if not split.samplers:
            return {}
        memory, size = self.engine_memory(split.tensor_parallel), split.tensor_parallel
        parts = {"new version": self.publish_time(split).engines}
        if self.config.samples:
            parts["answers"] = self.times.sampling(split.samplers, memory, size).seconds
            parts["round_overhead_s"] = self.assumptions.round_overhead_s
        if every := self.config.rounds.evaluate_every:
            parts["evaluation"] = self.times.evaluation(split.samplers, memory, size).seconds / every
        return parts

    def training_seconds(self, split: Split) -> float:
        """Seconds that the train workers are busy in a round."""
        seconds = self.times.training(split.workers).seconds + self.publish_time(split).trainer
        return seconds + self.offload_seconds(split.workers)

    def offload_seconds(self, workers: int) -> float:
        """Seconds in which a colocated worker moves its states to host memory and back; 0 without colocation."""
        if not self.config.sampling.colocate:
            return 0.0
        bandwidth = self.cluster.node.pcie * 1e9 * self.assumptions.link_efficiency
        return 2 * self.trainer_memory(workers).states / bandwidth

    def combine(self, sampling: float, training: float) -> RoundTime:
        """The time of a round from the seconds of its two sides, which overlap if the config lets them."""
        overlapped = self.config.rounds.max_staleness > 0 and not self.config.sampling.colocate
        return RoundTime(sampling, training, max(sampling, training) if overlapped else sampling + training)


def describe(config: RunConfig, split: Split) -> str:
    """A split in words: `2 samplers x 4 GPUs, 24 train workers`."""
    stages, processes = config.sampling.pipeline_parallel_size, split.tensor_parallel
    samplers = counted(split.samplers, "sampler")
    if config.sampling.gpus_per_sampler:
        samplers += " x " + (f"{stages} x " if stages > 1 else "") + counted(processes, "GPU")
    workers = counted(split.workers, "train worker") + (" on the same GPUs" if config.sampling.colocate else "")
    return f"{samplers}, {workers}" if split.samplers else workers
