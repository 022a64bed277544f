"""ServeConfig: everything a served reasoner can be told. It is also what a Serve config file gives as `args`.

Invariant: whatever a request may ask for is bounded by `limits`, and the defaults of `answering` are within them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from aft_ray.config.loader import parse_section, read_tree
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
    temperature: float = Field(0.7, ge=0, le=2, description="of sampling; scores are always at temperature 1")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: Positive = Field(256, description="longest response, end-of-sequence included")
    stop_confidence: float = Field(
        0.95,
        ge=0.5,
        le=1,
        description="sampling stops once the winner will stay the winner with this probability; 1: once it is certain",
    )


class LimitsConfig(Section):
    """What a request may ask for, and how many may wait."""

    body_kib: Positive = Field(256, description="largest request body, KiB")
    question_chars: Positive = Field(8000, description="longest question or prompt, characters")
    n: Positive = Field(64, description="most candidates of a question")
    max_tokens: Positive = Field(1024, description="longest response of a request, tokens")
    concurrency: Positive = Field(16, description="questions that one reasoner works on at once")
    queue: Natural = Field(64, description="questions that may wait in one reasoner; more are refused with 429")
    deadline_s: Seconds = Field(60, description="a request that is not answered by then gets the best so far, or 504")

    @property
    def admitted(self) -> int:
        """Questions in one reasoner, at work or waiting."""
        return self.concurrency + self.queue


class AccessConfig(Section):
    """Who may ask, and what is written down."""

    keys_file: str | None = Field(None, description="file of bearer keys, one a line, read again when it changes")
    keys_env: str = Field("AFT_RAY_API_KEYS", description="environment variable of bearer keys, separated by commas")
    open: bool = Field(False, description="serve without keys; else that is only done on a loopback address")
    cors_origins: tuple[str, ...] = Field((), description="web origins whose pages may ask; none: no other site")
    log_questions: bool = Field(False, description="write questions and answers to the access log")


class EngineConfig(Section):
    """The engines: deployments of ray.serve.llm's LLMServer."""

    replicas: Positive = Field(1, description="engines; with max_replicas the fewest")
    max_replicas: Positive | None = Field(None, description="autoscale up to so many; none: do not")
    ongoing_per_replica: Positive = Field(16, description="questions an engine is to have when autoscaling")
    tensor_parallel_size: Positive = Field(1, description="GPUs, or CPU processes, that share every layer")
    pipeline_parallel_size: Positive = Field(1, description="stages of layers")
    cpus: float = Field(1, gt=0, description="Ray CPUs of an engine's process; of a CPU engine also its threads")
    gpus: Literal[0, 1] = Field(0, description="GPUs per process of an engine: 1, or 0 to run on CPUs")
    accelerator_type: str | None = Field(None, description="Ray's name of the GPU to ask for, such as H100")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="none: the run's, or bfloat16")
    max_length: Positive | None = Field(None, description="prompt + response, tokens; none: the run's, or 2048")
    max_num_seqs: Positive = Field(128, description="sequences an engine runs at once")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine, GiB")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory for the engine")
    start_timeout_s: Seconds = Field(900, description="deadline of an engine's start, seconds")
    drain_s: Seconds = Field(120, description="how long new weights wait for questions that are being answered")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"engine.max_replicas ({self.max_replicas}) is less than engine.replicas")
        return self


class ReasonerConfig(Section):
    """The deployment in front of the engines."""

    replicas: Positive = Field(1, description="processes that rank and answer; they need no GPU")
    cpus: float = Field(0.5, gt=0, description="Ray CPUs of each")


class ServeConfig(Section):
    """A served reasoner."""

    model: str = Field(description="run directory, RUN@VERSION, model directory or hub name")
    name: str | None = Field(None, min_length=1, description="what clients call the model; none: its directory's name")
    task: DataConfig | None = Field(None, description="how a model directory is asked and read; a run knows itself")
    follow: bool = Field(False, description="of a run directory: serve each new version as it is published")
    follow_s: Seconds = Field(10, description="seconds between two looks for a new version")
    answering: AnsweringConfig = AnsweringConfig()
    limits: LimitsConfig = LimitsConfig()
    access: AccessConfig = AccessConfig()
    engine: EngineConfig = EngineConfig()
    reasoner: ReasonerConfig = ReasonerConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.answering.n > self.limits.n:
            raise ConfigError(f"answering.n ({self.answering.n}) is more than limits.n ({self.limits.n})")
        if self.answering.max_tokens > self.limits.max_tokens:
            raise ConfigError(
                f"answering.max_tokens ({self.answering.max_tokens}) is more than limits.max_tokens "
                f"({self.limits.max_tokens})"
            )
        return self


def load_serve_config(model: str | None, path: Path | None, overrides: Sequence[str]) -> ServeConfig:
    """A YAML file, if any, with `model` and `key.sub=value` overrides put in. Raises ConfigError, one sentence."""
    return parse_serve_config(read_tree(path, [*([f"model={model}"] if model else []), *overrides]))


def parse_serve_config(tree: dict[str, Any]) -> ServeConfig:
    """A ServeConfig from nested dicts. Raises ConfigError naming the first wrong key."""
    return parse_section(ServeConfig, tree)
