"""The plan of a run on a cluster: does it fit, how long does a round take, who waits for whom, what would be best.

Invariant: a plan without problems fits, by the arithmetic that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.planning.plan import splits as placing
from aft_ray.planning.plan.architecture import architecture_of
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.engine_memory import EngineMemory
from aft_ray.planning.plan.hardware import ClusterShape
from aft_ray.planning.plan.planner import Planner, RoundTime
from aft_ray.planning.plan.problems import engine_fits, problems, trainer_fits, trainer_problem
from aft_ray.planning.plan.publish_time import TRANSPORTS, PublishTime
from aft_ray.planning.plan.search import best_split
from aft_ray.planning.plan.splits import Split
from aft_ray.planning.plan.timing import SamplingTime, TrainingTime
from aft_ray.planning.plan.training_memory import TrainingMemory
from aft_ray.planning.plan.workload import workload


@dataclass(frozen=True)
class RunPlan:
    """A run on a cluster. samples, trains, times, evaluates, vft: of the config's split. publications: by transport.
    problems: why it cannot run there, none when it can. best: the fastest split there, if one fits."""

    planner: Planner
    split: Split
    problems: tuple[str, ...]
    engine: EngineMemory | None
    trainer: TrainingMemory
    sampling: SamplingTime | None
    evaluation: SamplingTime | None
    training: TrainingTime
    vft: TrainingTime
    manifests: dict[str, PublishTime]
    time: RoundTime
    best: tuple[Split, RoundTime] | None
    price_per_gpu_hour: float | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the config's engines and workers fit their devices, wherever they are placed."""
        engines = not self.split.samplers or engine_fits(self.planner, self.split.tensor_parallel)
        return engines and trainer_fits(self.planner, self.split.workers)

    @property
    def why_none(self) -> str:
        """Why no split fits: what is wrong with the config's own, or with as many workers as there is room for."""
        planner, split = self.planner, self.split
        if not placing.fits(planner.config, split, planner.cluster):
            room = planner.cluster.gpus if planner.config.training.gpus_per_worker else planner.cluster.cpus
            most = max(1, min(room - (1 if split.samplers else 0), planner.config.training.groups_per_step))
            return trainer_problem(planner, most) or self.problems[0]
        return self.problems[0]

    @property
    def gpus(self) -> float:
        """That the config's split takes."""
        return placing.gpus(self.planner.config, self.split)

    @property
    def seconds(self) -> float:
        """Of the whole run: round 0 and all rounds after it; overlapped rounds fill and drain the pipeline once."""
        config, time = self.planner.config, self.time
        rounds = config.rounds.count
        fine_tuning = self.vft.seconds + self.manifests[config.weights.transport].trainer if config.vft.epochs else 0
        if not rounds:
            return fine_tuning
        return fine_tuning + rounds * time.round + (time.sampling + time.training - time.round)

    def gpu_hours(self, seconds: float) -> float:
        """Of all GPUs of the nodes, which are held whether they are used or not."""
        return self.planner.cluster.gpus * seconds / 3600


def plan(
    config: RunConfig,
    cluster: ClusterShape,
    assumed: PlanAssumptions | None = None,
    price_per_gpu_hour: float | None = None,
) -> RunPlan:
    """Plans a run. Raises ConfigError when the model or the number of questions is not known; what does not fit is in
    `problems`."""
    assumed = assumed or PlanAssumptions()
    if (config.training.gpus_per_worker or config.sampling.gpus_per_sampler) and not cluster.node.gpus:
        raise ConfigError(f"the config reserves GPUs and {cluster.node.name} has none; use another --node")
    model = architecture_of(config)
    if config.model.max_length > model.context:
        raise ConfigError(
            f"model.max_length ({config.model.max_length}) is longer than the context of {model.name} "
            f"({model.context:,} tokens)"
        )
    planner = Planner(config, cluster, assumed, model, workload(config, assumed))
    split = placing.split_of(config)
    engine = planner.engine_memory(split.tensor_parallel) if split.samplers else None
    speeds = planner.speeds
    evaluated = engine is not None and config.rounds.evaluate_every > 0
    return RunPlan(
        planner=planner,
        split=split,
        problems=tuple(problems(planner, split)),
        engine=engine,
        trainer=planner.trainer_memory(split.workers),
        sampling=speeds.sampling(split.samplers, engine, split.tensor_parallel)
        if engine is not None and config.samples
        else None,
        evaluation=speeds.evaluation(split.samplers, engine, split.tensor_parallel)
        if evaluated and engine is not None
        else None,
        training=speeds.training(split.workers),
        vft=speeds.vft(split.workers),
        manifests={
            transport: planner.manifest(split, transport)
            for transport in TRANSPORTS
            if transport != "lora" or config.lora is not None
        },
        time=planner.round_time(split),
        best=best_split(planner),
        price_per_gpu_hour=price_per_gpu_hour,
    )


def fewest_nodes(config: RunConfig, cluster: ClusterShape) -> ClusterShape:
    """The cluster with as many nodes as the config's split needs; one when no number of them is enough."""
    needed = placing.nodes_needed(config, placing.split_of(config), cluster.node)
    return ClusterShape(cluster.node, needed or 1)
