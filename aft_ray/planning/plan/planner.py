"""A config on a cluster: what any split of its GPUs between engines and train workers needs, and how long it takes.

Invariant: the sampling side depends on the engines alone and the training side on the workers alone, so that a search
over splits can look at each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan import splits as placing
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.engine_memory import EngineMemory, engine_memory
from aft_ray.planning.plan.hardware import ClusterShape
from aft_ray.planning.plan.publish_time import PublishTime, publish_time
from aft_ray.planning.plan.quantities import counted
from aft_ray.planning.plan.splits import Split
from aft_ray.planning.plan.timing import Speeds
from aft_ray.planning.plan.training_memory import TrainingMemory, training_memory
from aft_ray.planning.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Seconds of a round in the steady state. sampling: all that engines do for it (the new version, evaluation,
    answers); training: all that workers do (steps, publication, checkpoint). round: what both together take."""

    sampling: float
    training: float
    round: float

    @property
    def bottleneck(self) -> str:
        return "sampling" if self.sampling > self.training else "training"


@dataclass(frozen=True)
class Planner:
    """A config on a cluster under some assumptions, and what follows from them for any split."""

    config: RunConfig
    cluster: ClusterShape
    assumed: PlanAssumptions
    model: Architecture
    work: Workload

    @cached_property
    def speeds(self) -> Speeds:
        return Speeds(self.config, self.model, self.work, self.assumed, self.cluster.node)

    def trainer_memory(self, workers: int) -> TrainingMemory:
        return training_memory(self.config, self.model, self.work, self.assumed, workers)

    def engine_memory(self, tensor_parallel: int) -> EngineMemory:
        return engine_memory(self.config, self.model, self.work, self.assumed, self.cluster.node, tensor_parallel)

    def manifest(self, split: Split, transport: str | None = None) -> PublishTime:
        return publish_time(
            self.config,
            self.model,
            self.assumed,
            self.cluster.node,
            transport or self.config.weights.transport,
            split.workers,
            placing.sampler_nodes(self.config, split, self.cluster.node),
            split.tensor_parallel * self.config.sampling.pipeline_parallel_size,
        )

    def round_time(self, split: Split) -> RoundTime:
        """Of a round after the first, by how far sampling may run ahead."""
        return self.meet(self.sampling_side(split), self.training_side(split))

    def sampling_side(self, split: Split) -> float:
        """Seconds of a round that its engines are busy."""
        return sum(self.sampling_parts(split).values())

    def sampling_parts(self, split: Split) -> dict[str, float]:
        """What the engines do in a round, seconds each."""
        if not split.samplers:
            return {}
        memory, size = self.engine_memory(split.tensor_parallel), split.tensor_parallel
        parts = {"new version": self.manifest(split).engines}
        if self.config.samples:
            parts["answers"] = self.speeds.sampling(split.samplers, memory, size).seconds
            parts["round_overhead_s"] = self.assumed.round_overhead_s
        if every := self.config.rounds.evaluate_every:
            parts["evaluation"] = self.speeds.evaluation(split.samplers, memory, size).seconds / every
        return parts

    def training_side(self, split: Split) -> float:
        """Seconds of a round that its train workers are busy."""
        seconds = self.speeds.training(split.workers).seconds + self.manifest(split).trainer
        return seconds + self.turns(split.workers)

    def turns(self, workers: int) -> float:
        """Seconds in which a colocated trainer's states leave its GPUs for host memory and come back."""
        if not self.config.sampling.colocate:
            return 0.0
        return 2 * self.trainer_memory(workers).states / (self.cluster.node.pcie * 1e9 * self.assumed.link_efficiency)

    def meet(self, sampling: float, training: float) -> RoundTime:
        """A round of two sides that take so many seconds."""
        overlapped = self.config.rounds.max_staleness > 0 and not self.config.sampling.colocate
        return RoundTime(sampling, training, max(sampling, training) if overlapped else sampling + training)


def describe(config: RunConfig, split: Split) -> str:
    """A split in words."""
    stages, each = config.sampling.pipeline_parallel_size, split.tensor_parallel
    engines = counted(split.samplers, "sampler")
    if config.sampling.gpus_per_sampler:
        engines += " x " + (f"{stages} x " if stages > 1 else "") + counted(each, "GPU")
    workers = counted(split.workers, "train worker") + (" on the same GPUs" if config.sampling.colocate else "")
    return f"{engines}, {workers}" if split.samplers else workers
