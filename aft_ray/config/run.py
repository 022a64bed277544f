"""RunConfig, the config of a run: its sections, and the rules about several of them.

Invariant: a config that loads is consistent in itself. What depends on the outside world, such as whether the model
exists, is checked by `aft_ray.run.preflight` before any actor starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, get_args

from pydantic import Field, model_validator

from aft_ray.config.loader import parse_section, read_yaml
from aft_ray.config.objectives import ObjectiveConfig as ObjectiveConfig
from aft_ray.config.section import ConfigError as ConfigError
from aft_ray.config.section import Natural, Section
from aft_ray.config.sections import AdaptiveConfig as AdaptiveConfig
from aft_ray.config.sections import ClusterConfig as ClusterConfig
from aft_ray.config.sections import EvaluationConfig as EvaluationConfig
from aft_ray.config.sections import FeedbackConfig as FeedbackConfig
from aft_ray.config.sections import JudgeConfig as JudgeConfig
from aft_ray.config.sections import LoraConfig as LoraConfig
from aft_ray.config.sections import ModelConfig as ModelConfig
from aft_ray.config.sections import RoundsConfig as RoundsConfig
from aft_ray.config.sections import SamplingConfig as SamplingConfig
from aft_ray.config.sections import TrainingConfig as TrainingConfig
from aft_ray.config.sections import VftConfig as VftConfig
from aft_ray.config.sections import WeightsConfig as WeightsConfig
from aft_ray.config.tasks import ENTRY_NAME, TaskConfig, TaskName
from aft_ray.config.tasks import ArithmeticConfig as ArithmeticConfig
from aft_ray.config.tasks import DataConfig as DataConfig


class RunConfig(Section):
    """The config of one run: a YAML file with `key.sub=value` overrides."""

    run_dir: str = Field(description="run directory: a path, or a URI of a pyarrow filesystem")
    seed: Natural = Field(0, description="seed of data order, sampling and training")
    model: ModelConfig
    data: DataConfig | None = Field(None, description="the task, if there is one")
    tasks: dict[str, TaskConfig] = Field({}, description="the tasks, if there are several: name -> its config")
    feedback: FeedbackConfig = FeedbackConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    vft: VftConfig = VftConfig()
    rounds: RoundsConfig = RoundsConfig()
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
    lora: LoraConfig | None = Field(None, description="train adapters; none: all weights")
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_tasks(cls, tree: Any) -> Any:
        """Adds the defaults of `data` if there are no `tasks`, and the task of an entry that has the name of a task."""
        if not isinstance(tree, dict):
            return tree
        tasks = tree.get("tasks")
        if not tasks and tree.get("data") is None:
            return {**tree, "data": {}}
        if not isinstance(tasks, dict):
            return tree
        entries = {name: {} if entry is None else entry for name, entry in tasks.items()}
        for name, entry in entries.items():
            if isinstance(entry, dict) and name in get_args(TaskName):
                entries[name] = {"task": name, **entry}
        return {**tree, "tasks": entries}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data is not None and self.tasks:
            raise ConfigError(
                f"data and tasks ({', '.join(self.tasks)}) are both given; write what data says as one more entry of "
                f"tasks, or leave tasks out"
            )
        for name, entry in self.task_configs.items():
            if not ENTRY_NAME.fullmatch(name):
                raise ConfigError(f"tasks.{name}: a task's name is made of letters, digits, - and _ alone")
            if self.feedback.kind == "steps" and entry.task != "arithmetic":
                raise ConfigError(
                    f"feedback.kind=steps grades the calculations of task=arithmetic, which {entry.task} does not "
                    f"have; use feedback.kind=binary or judge"
                )
        if self.objective.spec.ranks_candidates and self.sampling.k < 2 and self.rounds.count:
            raise ConfigError(
                f"objective.name={self.objective.name} compares candidates, so sampling.k must be at least 2, "
                f"not {self.sampling.k}"
            )
        if self.sampling.adaptive is not None:
            self._check_adaptive(self.sampling.adaptive)
        if self.sampling.max_tokens >= self.model.max_length:
            raise ConfigError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) leaves no room for a prompt in "
                f"model.max_length ({self.model.max_length}); lower the first or raise the second"
            )
        together = self.training.sequence_parallel_size
        if self.training.tokens_per_microbatch * together < self.model.max_length:
            shared = f" x training.sequence_parallel_size ({together})" if together > 1 else ""
            raise ConfigError(
                f"training.tokens_per_microbatch ({self.training.tokens_per_microbatch}){shared} is less than "
                f"model.max_length ({self.model.max_length}), so a forward pass might not hold a prompt with one "
                f"response; raise the first or lower the last"
            )
        if self.vft.epochs == 0 and self.rounds.count == 0:
            raise ConfigError("vft.epochs=0 and rounds.count=0 leave nothing to train")
        if self.training.workers > self.training.groups_per_step:
            raise ConfigError(
                f"training.groups_per_step ({self.training.groups_per_step}) is less than training.workers "
                f"({self.training.workers}); every worker needs a group in a step"
            )
        self._check_placement()
        return self

    def _check_adaptive(self, adaptive: AdaptiveConfig) -> None:
        if not self.objective.spec.ranks_candidates:
            why = (
                "trains on every right candidate, also of a question without wrong ones"
                if self.objective.spec.uses_candidates
                else "samples nothing"
            )
            raise ConfigError(f"objective.name={self.objective.name} {why}, so sampling.adaptive must be none")
        if adaptive.initial_k > self.sampling.k:
            raise ConfigError(
                f"sampling.adaptive.initial_k ({adaptive.initial_k}) is more than sampling.k ({self.sampling.k}), the "
                f"most candidates of a question; lower the first or raise the second"
            )

    def _check_placement(self) -> None:
        sampling, training, weights = self.sampling, self.training, self.weights
        if sampling.gpus_per_sampler not in (0, sampling.processes_per_sampler) and (
            sampling.processes_per_sampler > 1 or sampling.gpus_per_sampler > 1
        ):
            raise ConfigError(
                f"sampling.gpus_per_sampler={sampling.gpus_per_sampler:g} does not go with "
                f"sampling.tensor_parallel_size={sampling.tensor_parallel_size} x "
                f"pipeline_parallel_size={sampling.pipeline_parallel_size}: an engine has one GPU per process, "
                f"so {sampling.processes_per_sampler}, or 0 on the CPU"
            )
        if sampling.min_samplers > sampling.samplers:
            raise ConfigError(
                f"sampling.min_samplers ({sampling.min_samplers}) is more than sampling.samplers "
                f"({sampling.samplers}); lower the first or raise the second"
            )
        if training.offload_optimizer and training.zero_stage == 0:
            raise ConfigError("training.offload_optimizer needs training.zero_stage of at least 1")
        if training.offload_parameters and training.zero_stage != 3:
            raise ConfigError(
                f"training.offload_parameters needs training.zero_stage=3, not {training.zero_stage}: only "
                f"that stage gathers weights layer by layer"
            )
        if weights.transport == "lora" and self.lora is None:
            raise ConfigError(
                "weights.transport=lora publishes an adapter and there is none; set lora.rank, or another transport"
            )
        if self.lora is not None and self.lora.quantize != "none":
            self._check_quantized(self.lora.quantize)
        if weights.transport == "nccl":
            self._check_broadcast()
        if sampling.colocate and self.rounds.max_staleness > 0:
            raise ConfigError(
                f"sampling.colocate lets engines and train workers use the GPUs in turn, so rounds.max_staleness must "
                f"be 0, not {self.rounds.max_staleness}"
            )
        if sampling.colocate:
            self._check_colocation()

    def _check_quantized(self, numbers: str) -> None:
        if self.training.zero_stage == 3:
            raise ConfigError(
                f"lora.quantize={numbers} needs training.zero_stage of at most 2, not 3: DeepSpeed would cut the "
                f"packed weights into shards and lose the scales that belong to them; 4-bit weights of 70B are 35 GB, "
                f"so every worker can hold them whole"
            )
        if self.weights.transport == "lora":
            raise ConfigError(
                f"weights.transport=lora lets the engines keep the weights as they were before lora.quantize="
                f"{numbers}, and on those the adapter is another policy than the trained one; use object_store or "
                f"checkpoint, which publish the quantized weights merged with the adapter"
            )

    def _check_colocation(self) -> None:
        sampling, training = self.sampling, self.training
        if sampling.pipeline_parallel_size > 1:
            raise ConfigError(
                "sampling.colocate is for engines inside a node: sampling.pipeline_parallel_size must be 1"
            )
        engines = sampling.samplers * sampling.processes_per_sampler
        if training.gpus_per_worker and (sampling.gpus_per_sampler < 1 or engines > training.workers):
            raise ConfigError(
                f"sampling.colocate puts {sampling.samplers} engines of {sampling.gpus_per_sampler:g} GPUs on the "
                f"{training.workers} GPUs of the train workers; sampling.gpus_per_sampler must be "
                f"sampling.tensor_parallel_size, and that times sampling.samplers at most training.workers"
            )
        if not training.gpus_per_worker and sampling.gpus_per_sampler:
            raise ConfigError(
                "sampling.colocate shares the train workers' GPUs, and they have none; set training.gpus_per_worker=1, "
                "or sampling.gpus_per_sampler=0"
            )

    def _check_broadcast(self) -> None:
        sampling, training, weights = self.sampling, self.training, self.weights
        if self.rounds.max_staleness > 1:
            raise ConfigError(
                f"weights.transport=nccl sends the weights while the trainer does not change them, which is once "
                f"a round: rounds.max_staleness must be at most 1, not {self.rounds.max_staleness}"
            )
        if (sampling.gpus_per_sampler > 0) != (training.gpus_per_worker > 0):
            raise ConfigError(
                f"weights.transport=nccl sends from GPUs to GPUs, or from CPUs to CPUs: sampling.gpus_per_sampler="
                f"{sampling.gpus_per_sampler:g} and training.gpus_per_worker={training.gpus_per_worker} do not go "
                f"together; use object_store"
            )
        if sampling.colocate:
            raise ConfigError(
                "weights.transport=nccl needs trainer and engines at work at once, and with sampling.colocate they "
                "use the GPUs in turn; use object_store"
            )
        if self.lora is not None:
            raise ConfigError(
                "weights.transport=nccl sends the weights as they are trained, and with lora those are adapters; use "
                "lora or object_store"
            )
        if training.workers > 1 and training.timeout_s <= weights.timeout_s:
            raise ConfigError(
                f"training.timeout_s ({training.timeout_s:g}) must be above weights.timeout_s "
                f"({weights.timeout_s:g}): with weights.transport=nccl the other workers wait while worker 0 waits for "
                f"the engines"
            )

    def tree(self) -> dict[str, Any]:
        """The config as nested dicts of plain values, without the one of `data` and `tasks` that is not used."""
        return self.model_dump(mode="json", exclude={"data" if self.tasks else "tasks"})

    @property
    def task_configs(self) -> dict[str, DataConfig]:
        """The tasks by the name that `Question.task` has. With `data` it is the name of its task."""
        return dict(self.tasks) if self.data is None else {self.data.task: self.data}

    @property
    def task_weights(self) -> dict[str, float]:
        """The share of each task in the questions of a round, relative to the others."""
        return {name: entry.weight for name, entry in self.tasks.items()} or dict.fromkeys(self.task_configs, 1.0)

    def task_key(self, name: str) -> str:
        """The key of the section that describes a task, for messages."""
        return f"tasks.{name}" if self.tasks else "data"

    @property
    def samples(self) -> bool:
        """Whether the rounds of the objective need candidates."""
        return self.objective.spec.uses_candidates

    @property
    def needs_samplers(self) -> bool:
        """Whether the run samples candidates or evaluates the model while it trains."""
        return (self.samples and self.rounds.count > 0) or self.rounds.evaluate_every > 0

    @property
    def score_tolerance(self) -> float:
        """How far a token's log-probabilities on trainer and engine may be apart by rounding, nats."""
        if self.weights.tolerance is not None:
            return self.weights.tolerance
        return 1e-4 if self.model.dtype == "float32" else 0.05


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The config in a YAML file with `key.sub=value` overrides. Raises ConfigError, one sentence."""
    return parse_section(RunConfig, read_yaml(path), overrides)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """A RunConfig from nested dicts. Raises ConfigError naming the first wrong key."""
    return parse_section(RunConfig, tree)
