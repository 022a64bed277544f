"""ServeConfig, the config of a served reasoner. A Ray Serve config file gives it as the `args` of the application.

Invariant: `limits` bounds everything that a request may ask for, and the defaults of `answering` are within them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, JsonValue, model_validator

from aft_ray.config.engine_arguments import CPU_ARGUMENTS, SERVICE_ARGUMENTS, refuse_owned
from aft_ray.config.loader import parse_section, read_yaml
from aft_ray.config.run import ClusterConfig
from aft_ray.config.section import ConfigError, Natural, Positive, Seconds, Section
from aft_ray.config.tasks import DataConfig

Strategy = Literal["greedy", "score", "vote", "weighted_vote"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class AnsweringConfig(Section):
    """How a question is answered when the request does not say."""

    strategy: Strategy = Field(
        "weighted_vote",
        description="greedy: one response; score: the candidate with the best score; vote: the answer given most "
        "often; weighted_vote: votes weighted by exp(score)",
    )
    n: Positive = Field(8, description="candidates sampled for a question")
    temperature: float = Field(0.7, ge=0, le=2, description="sampling temperature; scores are always at temperature 1")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: Positive = Field(256, description="longest response, tokens, end-of-sequence included")
    stop_confidence: float = Field(
        0.95,
        ge=0.5,
        le=1,
        description="sampling stops when the leading answer wins with this probability; 1: when it is certain to win",
    )


class LimitsConfig(Section):
    """The bounds of a request, and how many requests may wait."""

    body_kib: Positive = Field(256, description="largest request body, KiB")
    question_chars: Positive = Field(8000, description="longest question or prompt, characters")
    n: Positive = Field(64, description="most candidates of a question")
    max_tokens: Positive = Field(1024, description="longest response of a request, tokens")
    concurrency: Positive = Field(16, description="questions that one reasoner answers at once")
    queue: Natural = Field(64, description="questions that may wait in one reasoner; more are refused with 429")
    deadline_s: Seconds = Field(60, description="seconds after which a request gets the best answer so far, or 504")

    @property
    def admitted(self) -> int:
        """The largest number of questions in one reasoner, being answered or waiting."""
        return self.concurrency + self.queue


class AccessConfig(Section):
    """Who may send requests, and what is logged."""

    keys_file: str | None = Field(
        None, description="file of bearer keys, one per line; it is read again when it changes"
    )
    keys_env: str = Field("AFT_RAY_API_KEYS", description="environment variable of bearer keys, separated by commas")
    open: bool = Field(
        False, description="serve without keys on any address; otherwise only a loopback address is served without"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="web origins whose pages may send requests; none: no other site"
    )
    log_questions: bool = Field(False, description="write questions and answers to the access log")


class EngineConfig(Section):
    """The engines, which are deployments of LLMServer from ray.serve.llm."""

    replicas: Positive = Field(1, description="number of engines; with max_replicas the smallest number")
    max_replicas: Positive | None = Field(
        None, description="largest number of engines when autoscaling; none: no autoscaling"
    )
    ongoing_per_replica: Positive = Field(16, description="target number of questions per engine when autoscaling")
    tensor_parallel_size: Positive = Field(1, description="GPUs, or CPU processes, that share every layer")
    pipeline_parallel_size: Positive = Field(1, description="stages of layers")
    cpus: float = Field(1, gt=0, description="Ray CPUs of an engine's process; for a CPU engine also its threads")
    gpus: Literal[0, 1] = Field(0, description="GPUs per process of an engine: 1, or 0 to run on CPUs")
    accelerator_type: str | None = Field(None, description="Ray's name of the GPU type to reserve, such as H100")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="none: the run's, or bfloat16")
    max_length: Positive | None = Field(None, description="prompt + response, tokens; none: the run's, or 2048")
    max_num_seqs: Positive | None = Field(
        None, description="most sequences that an engine runs at once; none: vLLM's own number for the hardware"
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine, GiB")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory for the engine")
    args: dict[str, JsonValue] = Field(
        {}, description="further engine arguments of the installed vLLM, by name, such as kv_cache_dtype"
    )
    start_timeout_s: Seconds = Field(900, description="deadline of an engine's start, seconds")
    drain_s: Seconds = Field(120, description="seconds that new weights wait for questions that are being answered")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"engine.max_replicas ({self.max_replicas}) is less than engine.replicas")
        refuse_owned(self.args, "engine.args", SERVICE_ARGUMENTS if self.gpus else SERVICE_ARGUMENTS | CPU_ARGUMENTS)
        return self


class ReasonerConfig(Section):
    """The deployment in front of the engines."""

    replicas: Positive = Field(1, description="processes that rank candidates and answer; they need no GPU")
    cpus: float = Field(0.5, gt=0, description="Ray CPUs of each process")


# How a model is asked that is not from a run. The keys are those of `model` in the config of a run.
ASKING_KEYS = ("chat_template", "chat_template_kwargs", "system_prompt", "template_date")


class ServeConfig(Section):
    """A served reasoner."""

    key_list: ClassVar[str] = "`aft-ray keys --serve`"

    model: str = Field(description="run directory, RUN@VERSION, model directory or hub name")
    name: str | None = Field(
        None, min_length=1, description="name of the model in requests; none: the name of its directory"
    )
    task: DataConfig | None = Field(None, description="task of a model directory; a run directory has its own")
    chat_template: Literal["auto", "never"] = Field(
        "auto", description="of a model directory: whether questions go into its chat template; a run has its own"
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="of a model directory: values for its chat template; a run has its own"
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="of a model directory: system message before every question; a run has its own"
    )
    template_date: date | None = Field(
        None, description="of a model directory: day that strftime_now tells its chat template; none: that of the start"
    )
    follow: bool = Field(False, description="serve each new version of a run directory when it is published")
    follow_s: Seconds = Field(10, description="seconds between two checks for a new version")
    answering: AnsweringConfig = AnsweringConfig()
    limits: LimitsConfig = LimitsConfig()
    access: AccessConfig = AccessConfig()
    engine: EngineConfig = EngineConfig()
    reasoner: ReasonerConfig = ReasonerConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answering.n > self.limits.n:
            raise ConfigError(f"answering.n ({self.answering.n}) is more than limits.n ({self.limits.n})")
        if self.answering.max_tokens > self.limits.max_tokens:
            raise ConfigError(
                f"answering.max_tokens ({self.answering.max_tokens}) is more than limits.max_tokens "
                f"({self.limits.max_tokens})"
            )
        return self


def load_serve_config(model: str | None, path: Path | None, overrides: Sequence[str]) -> ServeConfig:
    """The config in a YAML file, if any, with `model` and `key.sub=value` overrides. Raises ConfigError."""
    tree = read_yaml(path) if path is not None else {}
    return parse_section(ServeConfig, tree, [*([f"model={model}"] if model else []), *overrides])


def parse_serve_config(tree: dict[str, Any]) -> ServeConfig:
    """A ServeConfig from nested dicts. Raises ConfigError naming the first wrong key."""
    return parse_section(ServeConfig, tree)
