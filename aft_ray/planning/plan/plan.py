"""The plan of a run on a cluster: whether it fits, how long a round takes, what limits it, and which split is fastest.

Invariant: a plan without problems fits by the arithmetic that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.cluster import uniform_nodes
from aft_ray.cluster.reservations import Split, split_of
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.planning.plan.architecture import architecture_of
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.engine_memory import EngineMemory
from aft_ray.planning.plan.hardware import ClusterShape, NodeType
from aft_ray.planning.plan.planner import Planner, RoundTime
from aft_ray.planning.plan.problems import engine_fits, problems, trainer_fits, trainer_problem
from aft_ray.planning.plan.publish_time import TRANSPORTS, PublishTime
from aft_ray.planning.plan.search import best_split
from aft_ray.planning.plan.timing import SamplingTime, TrainingTime
from aft_ray.planning.plan.training_memory import TrainingMemory
from aft_ray.planning.plan.workload import workload


@dataclass(frozen=True)
class RunPlan:
    """What a run needs on a cluster, with the split that its config asks for.

    Attributes:
        planner: The config, the cluster and the assumptions, for questions about other splits.
        split: The split of the config.
        problems: Why the run cannot run there, one sentence each; empty when it can.
        engine: Memory of a sampler's engine; None when nothing is sampled or evaluated.
        trainer: Memory of a train worker.
        sampling: Time of sampling a round; None when the objective needs no candidates.
        evaluation: Time of evaluating a version; None when no version is evaluated.
        training: Time of training on a round.
        vft: Time of round 0, the supervised fine-tuning.
        publish_times: Transport -> time of publishing a version by it.
        time: Time of a whole round.
        best: The fastest split of the cluster and its time; None when no split fits.
        price_per_gpu_hour: In any currency; None when it was not given.
    """

    planner: Planner
    split: Split
    problems: tuple[str, ...]
    engine: EngineMemory | None
    trainer: TrainingMemory
    sampling: SamplingTime | None
    evaluation: SamplingTime | None
    training: TrainingTime
    vft: TrainingTime
    publish_times: dict[str, PublishTime]
    time: RoundTime
    best: tuple[Split, RoundTime] | None
    price_per_gpu_hour: float | None = None

    @property
    def fits_memory(self) -> bool:
        """Whether the config's engines and train workers fit the memory of their GPUs, wherever they are placed."""
        engines = not self.split.samplers or engine_fits(self.planner, self.split.tensor_parallel)
        return engines and trainer_fits(self.planner, self.split.workers)

    @property
    def why_no_split_fits(self) -> str:
        """What is wrong with the config's own split or, when that is only too large, with the most workers that fit."""
        planner, split = self.planner, self.split
        if not planner.fits(split):
            room = planner.cluster.gpus if planner.config.training.gpus_per_worker else planner.cluster.cpus
            most = max(1, min(room - (1 if split.samplers else 0), planner.config.training.groups_per_step))
            return trainer_problem(planner, most) or self.problems[0]
        return self.problems[0]

    @property
    def gpus(self) -> float:
        """The GPUs that the config's split reserves."""
        return self.planner.reservations(self.split).gpus

    @property
    def seconds(self) -> float:
        """The time of the whole run: round 0 and all rounds after it.

        When rounds overlap, the first one starts without training beside it and the last one ends without sampling
        beside it.
        """
        config, time = self.planner.config, self.time
        rounds = config.rounds.count
        fine_tuning = (
            self.vft.seconds + self.publish_times[config.weights.transport].trainer if config.vft.epochs else 0
        )
        if not rounds:
            return fine_tuning
        return fine_tuning + rounds * time.round + (time.sampling + time.training - time.round)

    def gpu_hours(self, seconds: float) -> float:
        """The GPU-hours of all nodes, whose GPUs are held whether they are used or not."""
        return self.planner.cluster.gpus * seconds / 3600


def plan(
    config: RunConfig,
    cluster: ClusterShape,
    assumptions: PlanAssumptions | None = None,
    price_per_gpu_hour: float | None = None,
) -> RunPlan:
    """Plans a run. What does not fit is told in `RunPlan.problems`.

    Raises:
        ConfigError: The model or the number of questions is not known, the model's context is too short, or the config
            reserves GPUs that the nodes do not have.
    """
    assumptions = assumptions or PlanAssumptions()
    if (config.training.gpus_per_worker or config.sampling.gpus_per_sampler) and not cluster.node.gpus:
        raise ConfigError(f"the config reserves GPUs and {cluster.node.name} has none; use another --node")
    model = architecture_of(config)
    if config.model.max_length > model.context:
        raise ConfigError(
            f"model.max_length ({config.model.max_length}) is longer than the context of {model.name} "
            f"({model.context:,} tokens)"
        )
    planner = Planner(config, cluster, assumptions, model, workload(config, assumptions))
    split = split_of(config)
    sampling, evaluation, engine = None, None, None
    if split.samplers:
        engine = planner.engine_memory(split.tensor_parallel)
        if config.samples:
            sampling = planner.times.sampling(split.samplers, engine, split.tensor_parallel)
        if config.rounds.evaluate_every > 0:
            evaluation = planner.times.evaluation(split.samplers, engine, split.tensor_parallel)
    return RunPlan(
        planner=planner,
        split=split,
        problems=tuple(problems(planner, split)),
        engine=engine,
        trainer=planner.trainer_memory(split.workers),
        sampling=sampling,
        evaluation=evaluation,
        training=planner.times.training(split.workers),
        vft=planner.times.vft(split.workers),
        publish_times={
            transport: planner.publish_time(split, transport)
            for transport in TRANSPORTS
            if transport != "lora" or config.lora is not None
        },
        time=planner.round_time(split),
        best=best_split(planner),
        price_per_gpu_hour=price_per_gpu_hour,
    )


def fewest_nodes(config: RunConfig, node: NodeType) -> ClusterShape:
    """The smallest cluster of nodes of this kind that holds the config's split; one node when no number is enough."""
    needed = uniform_nodes.nodes_needed(config, split_of(config), node.resources)
    return ClusterShape(node, needed or 1)
