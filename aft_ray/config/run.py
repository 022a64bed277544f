"""RunConfig: everything a run can be told, typed, bounded and described; imports in milliseconds.

A config that loads is a config whose parts agree with each other. What needs the outside world (does the model
exist, does the cluster have the GPUs) is checked by `aft_ray.run.preflight`, before any actor starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from aft_ray.config.loader import parse_section, read_tree
from aft_ray.config.objectives import ObjectiveConfig as ObjectiveConfig
from aft_ray.config.section import ConfigError as ConfigError
from aft_ray.config.section import Natural, Positive, Seconds, Section
from aft_ray.config.tasks import ENTRY_NAME, TaskConfig, TaskName
from aft_ray.config.tasks import ArithmeticConfig as ArithmeticConfig
from aft_ray.config.tasks import DataConfig as DataConfig


class ModelConfig(Section):
    """The model to make a better reasoner."""

    name: str = Field(description="Hugging Face model directory or hub name")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of training and of sampling")
    max_length: Positive = Field(512, description="prompt + response, tokens; at most the model's context")
    chat_template: Literal["auto", "never"] = Field(
        "auto", description="auto: ask through the model's chat template when it has one"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class JudgeConfig(Section):
    """The model that rates candidates with feedback.kind=judge: any OpenAI-compatible endpoint."""

    url: str | None = Field(None, description="base URL of the endpoint, ending in /v1")
    model: str | None = Field(None, description="model name to ask for; none: the first that the endpoint lists")
    api_key_env: str | None = Field(None, description="environment variable that holds the API key; none: no key")
    ratings: int = Field(3, ge=1, le=16, description="ratings a candidate gets; their mean is its reward")
    temperature: float = Field(1.0, ge=0, le=5, description="of the judge's sampling")
    seed: Natural | None = Field(
        0, description="of a candidate's first rating, one more for each other; none: not sent"
    )
    guided: bool = Field(False, description="have the endpoint hold replies to the form; vLLM and a few others can")
    max_tokens: Positive = Field(512, description="longest reply of the judge")
    concurrency: Positive = Field(16, description="requests in flight at once")
    timeout_s: Seconds = Field(120, description="deadline of one request, seconds")
    attempts: Positive = Field(5, description="times a request is sent before the round fails")
    cache: str | None = Field(None, description="SQLite file of the replies; none: judge.sqlite in the run directory")
    max_unparsable: float = Field(0.1, ge=0, le=1, description="share of replies without a rating that is tolerated")


class FeedbackConfig(Section):
    """What a candidate's reward is."""

    kind: Literal["binary", "steps", "judge"] = Field(
        "binary",
        description="binary: 1 right, 0 wrong; steps: share of right steps (arithmetic); judge: a model's rating",
    )
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.kind == "judge" and not self.judge.url:
            raise ConfigError("feedback.kind=judge needs feedback.judge.url, the base URL of an OpenAI-compatible API")
        return self


class SamplingConfig(Section):
    """How candidates are drawn, and what the samplers may use."""

    k: Positive = Field(6, description="candidates per question")
    temperature: float = Field(1.0, gt=0, le=2, description="of sampling; scores are always at temperature 1")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: Positive = Field(256, description="longest response, end-of-sequence included")
    samplers: Positive = Field(1, description="vLLM engines")
    min_samplers: Positive = Field(1, description="engines that sampling starts with; the others join as they come")
    tensor_parallel_size: Positive = Field(1, description="processes in one node that split every layer of an engine")
    pipeline_parallel_size: Positive = Field(1, description="stages of layers, each tensor_parallel_size processes")
    cpus_per_sampler: float = Field(1, gt=0, description="Ray CPUs of an engine; on a CPU engine also its threads")
    gpus_per_sampler: float = Field(
        0, ge=0, description="GPUs of an engine: one a process, a share of one for a single process, or 0"
    )
    colocate: bool = Field(
        False, description="engines take turns with the train workers on the workers' GPUs; needs max_staleness=0"
    )
    max_num_seqs: Positive = Field(128, description="sequences an engine runs at once")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine, GiB")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory for the engine")
    batch_size: int = Field(16, ge=1, le=512, description="questions in one call of a sampler")
    in_flight: Positive = Field(8, description="calls in flight per sampler")
    groups_per_file: Positive = Field(64, description="groups in one Parquet file")
    attempts: Positive = Field(3, description="times a question is tried before it is parked")
    max_parked: float = Field(0.05, ge=0, le=1, description="share of a round's questions that may be parked")
    timeout_s: Seconds = Field(600, description="deadline of one call of a sampler, seconds")
    start_timeout_s: Seconds = Field(900, description="deadline of an engine's start, seconds")

    @property
    def processes_per_sampler(self) -> int:
        """Processes that share an engine's weights."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def spans_nodes(self) -> bool:
        """Whether the stages of an engine may lie on different nodes; without GPUs vLLM keeps them in one."""
        return self.pipeline_parallel_size > 1 and self.gpus_per_sampler > 0


class TrainingConfig(Section):
    """One pass of optimiser steps over the groups of a round."""

    workers: Positive = Field(1, description="Ray Train workers")
    cpus_per_worker: float = Field(1, gt=0, description="Ray CPUs of a worker; without a GPU also its threads")
    gpus_per_worker: Literal[0, 1] = Field(0, description="GPUs of a worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    epochs: Positive = Field(1, description="passes over the groups of a round")
    groups_per_step: Positive = Field(64, description="groups in one optimiser step, over all workers")
    tokens_per_microbatch: Positive = Field(16384, description="padded tokens in one forward pass of a worker")
    learning_rate: float = Field(2e-5, gt=0, description="peak")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps that warm up; linear decay to zero after")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    offload_optimizer: bool = Field(False, description="ZeRO 1 to 3: optimizer state and step in CPU memory")
    offload_parameters: bool = Field(False, description="ZeRO 3: weights in CPU memory until a layer needs them")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, a third slower")
    max_failures: Natural = Field(2, description="times the worker group is restarted from its last checkpoint")
    keep_checkpoints: Positive = Field(2, description="training states kept; models of all rounds are kept")
    timeout_s: Seconds = Field(3600, description="deadline of a wait for another worker, seconds")


class LoraConfig(Section):
    """Low-rank adapters are trained instead of the weights; the model directory of a round is merged."""

    rank: Positive = Field(16, description="rank of the adapters")
    alpha: float = Field(32, gt=0, description="an adapter counts alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' inputs, in training")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the linear layers that get an adapter",
    )


class VftConfig(Section):
    """Round 0: fine-tuning on reference responses."""

    epochs: Natural = Field(3, description="passes over the training questions; 0: the model is fine-tuned already")
    questions_per_step: Positive = Field(64, description="questions in one optimiser step, over all workers")
    learning_rate: float = Field(2e-5, gt=0, description="peak")


class RoundsConfig(Section):
    """The rounds of AFT after round 0."""

    count: Natural = Field(3, description="rounds after round 0")
    questions_per_round: Positive | None = Field(None, description="none: every training question in every round")
    max_staleness: Natural = Field(1, description="0: sampling and training alternate; 1: they overlap")
    evaluate_every: Natural = Field(1, description="rounds between evaluations on the validation split; 0: never")
    timeout_s: Seconds = Field(86_400, description="deadline of a round's sampling or training, seconds")


class WeightsConfig(Section):
    """VersionManifest of new weights to running engines."""

    transport: Literal["object_store", "checkpoint", "nccl", "lora"] = Field(
        "object_store",
        description="checkpoint: engines read the round's model directory from shared storage; nccl: broadcast from "
        "train worker 0 (gloo without GPUs); lora: the adapter alone",
    )
    probes: int = Field(4, ge=1, le=64, description="sequences scored on both sides after each publication")
    tolerance: float | None = Field(
        None, gt=0, description="largest score difference, nats per token; none: 1e-4 in float32, 0.05 in bfloat16"
    )
    shard_mib: Positive = Field(1024, description="size of a safetensors shard, MiB; the most rank 0 holds at once")
    bucket_mib: Positive = Field(512, description="nccl: size of a bucket, MiB; each side holds two")
    timeout_s: Seconds = Field(600, description="deadline of each phase of a publication, seconds")


class EvaluationConfig(Section):
    """What `aft-ray evaluate` and the evaluations during a run measure."""

    split: Literal["validation", "test"] = Field("test", description="of `aft-ray evaluate`; runs use validation")
    k: Positive = Field(6, description="samples per question beside the greedy answer")
    temperature: float = Field(1.0, gt=0, le=2, description="of the samples")
    seed: Natural = Field(0, description="of the samples and of the bootstrap")
    seeds: Positive = Field(
        1, description="times k samples are drawn, by the seeds seed, seed + 1, ...; figures are means. Runs use one"
    )
    resamples: int = Field(1000, ge=100, description="bootstrap resamples of the 95 % intervals")
    during_training_k: Natural = Field(0, description="samples per question in evaluations of a run; 0: greedy only")


class ClusterConfig(Section):
    """Where it runs."""

    address: str | None = Field(None, description="Ray address; none: RAY_ADDRESS, or Ray started on this machine")
    logical_cpus: Positive | None = Field(None, description="CPUs of a Ray started here; none: as many as are needed")
    object_store_mib: Positive = Field(1024, description="object store of a Ray started here, MiB")
    grows: bool = Field(
        False, description="nodes come when they are asked for, up to a limit unknown to Ray; only waiting shows it"
    )


class RunConfig(Section):
    """One run: a YAML file with `key.sub=value` overrides."""

    run_dir: str = Field(description="run directory: a path, or a URI of a pyarrow filesystem")
    seed: Natural = Field(0, description="fixes data order, sampling and training")
    model: ModelConfig
    data: DataConfig | None = Field(None, description="the task, when there is one")
    tasks: dict[str, TaskConfig] = Field({}, description="the tasks, when there are several: name -> its config")
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
    def _one_form(cls, tree: Any) -> Any:
        """Without `tasks` there is `data`, if only its defaults; an entry of `tasks` may be called like its task."""
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
    def _agree(self) -> Self:
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
                    f"feedback.kind=steps grades the calculations of task=arithmetic, which {entry.task} has not; use "
                    f"feedback.kind=binary or judge"
                )
        if self.objective.spec.ranks_candidates and self.sampling.k < 2 and self.rounds.count:
            raise ConfigError(
                f"objective.name={self.objective.name} compares candidates, so sampling.k must be at least 2, "
                f"not {self.sampling.k}"
            )
        if self.sampling.max_tokens >= self.model.max_length:
            raise ConfigError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) leaves no room for a prompt in "
                f"model.max_length ({self.model.max_length}); lower the first or raise the second"
            )
        if self.vft.epochs == 0 and self.rounds.count == 0:
            raise ConfigError("vft.epochs=0 and rounds.count=0 leave nothing to train")
        if self.training.workers > self.training.groups_per_step:
            raise ConfigError(
                f"training.groups_per_step ({self.training.groups_per_step}) is less than training.workers "
                f"({self.training.workers}); every worker needs a group in a step"
            )
        self._placement_agrees()
        return self

    def _placement_agrees(self) -> None:
        sampling, training, weights = self.sampling, self.training, self.weights
        if sampling.gpus_per_sampler not in (0, sampling.processes_per_sampler) and (
            sampling.processes_per_sampler > 1 or sampling.gpus_per_sampler > 1
        ):
            raise ConfigError(
                f"sampling.gpus_per_sampler={sampling.gpus_per_sampler:g} does not go with "
                f"sampling.tensor_parallel_size={sampling.tensor_parallel_size} x "
                f"pipeline_parallel_size={sampling.pipeline_parallel_size}: an engine has one GPU a process, "
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
                f"training.offload_parameters needs training.zero_stage=3, not {training.zero_stage}: only there are "
                f"weights gathered layer by layer"
            )
        if weights.transport == "lora" and self.lora is None:
            raise ConfigError(
                "weights.transport=lora publishes an adapter and there is none; set lora.rank, or another transport"
            )
        if weights.transport == "nccl":
            self._stream_agrees()
        if sampling.colocate and self.rounds.max_staleness > 0:
            raise ConfigError(
                f"sampling.colocate lets engines and train workers take turns, so rounds.max_staleness must be 0, "
                f"not {self.rounds.max_staleness}"
            )
        if sampling.colocate:
            self._colocation_agrees()

    def _colocation_agrees(self) -> None:
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
        if training.zero_stage == 0 or (training.zero_stage == 3 and not training.offload_optimizer):
            raise ConfigError(
                f"sampling.colocate moves the trainer's states off its GPUs, which DeepSpeed can with "
                f"training.zero_stage=1 or 2, or with 3 and training.offload_optimizer=true; not with "
                f"{training.zero_stage}{'' if training.zero_stage == 0 else ' alone'}"
            )
        if self.weights.transport == "nccl":
            raise ConfigError(
                "weights.transport=nccl needs trainer and engines on their GPUs at once, and with sampling.colocate "
                "they take turns; use object_store or checkpoint"
            )

    def tree(self) -> dict[str, Any]:
        """As nested dicts of plain values, with that one of `data` and `tasks` that the run has."""
        return self.model_dump(mode="json", exclude={"data" if self.tasks else "tasks"})

    def _stream_agrees(self) -> None:
        sampling, training, weights = self.sampling, self.training, self.weights
        if self.rounds.max_staleness > 1:
            raise ConfigError(
                f"weights.transport=nccl sends the weights while the trainer holds them still, which it does once a "
                f"round: rounds.max_staleness must be at most 1, not {self.rounds.max_staleness}"
            )
        if (sampling.gpus_per_sampler > 0) != (training.gpus_per_worker > 0):
            raise ConfigError(
                f"weights.transport=nccl goes from GPUs to GPUs, or without any: sampling.gpus_per_sampler="
                f"{sampling.gpus_per_sampler:g} and training.gpus_per_worker={training.gpus_per_worker} do not go "
                f"together; use object_store"
            )
        if sampling.colocate:
            raise ConfigError(
                "weights.transport=nccl needs trainer and engines at work at once, and with sampling.colocate they "
                "take turns; use object_store"
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

    @property
    def task_configs(self) -> dict[str, DataConfig]:
        """The run's tasks by the name that their questions carry; with `data`, the one under its task's name."""
        return dict(self.tasks) if self.data is None else {self.data.task: self.data}

    @property
    def task_weights(self) -> dict[str, float]:
        """The tasks' shares of a round's questions, relative to each other."""
        return {name: entry.weight for name, entry in self.tasks.items()} or dict.fromkeys(self.task_configs, 1.0)

    def task_key(self, name: str) -> str:
        """Where the config of a task stands, for messages."""
        return f"tasks.{name}" if self.tasks else "data"

    @property
    def samples(self) -> bool:
        """Whether the objective's rounds need candidates."""
        return self.objective.spec.uses_candidates

    @property
    def needs_samplers(self) -> bool:
        """Whether the run samples candidates or evaluates the model while it trains."""
        return (self.samples and self.rounds.count > 0) or self.rounds.evaluate_every > 0

    @property
    def score_tolerance(self) -> float:
        """Largest allowed difference of a probe's score between trainer and sampler, nats per token."""
        if self.weights.tolerance is not None:
            return self.weights.tolerance
        return 1e-4 if self.model.dtype == "float32" else 0.05


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `key.sub=value` overrides. Raises ConfigError, one sentence."""
    return parse_config(read_tree(path, overrides))


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """A RunConfig from nested dicts. Raises ConfigError naming the first wrong key."""
    return parse_section(RunConfig, tree)
