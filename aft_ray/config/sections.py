"""The sections of RunConfig, apart from the tasks and the objective.

Invariant: each section checks only its own keys. Rules about several sections are in `aft_ray.config.run`.
"""

from __future__ import annotations

import logging
from datetime import date
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from aft_ray.config.deepspeed_keys import check_deepspeed_keys
from aft_ray.config.engine_arguments import CPU_ARGUMENTS, SAMPLER_ARGUMENTS, refuse_owned
from aft_ray.config.section import ConfigError, Natural, Positive, Seconds, Section

# What a run itself gives a chat template, and the parameters of transformers' `apply_chat_template`.
_NOT_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


_logger = logging.getLogger(__name__)

_Beta = Annotated[float, Field(ge=0, lt=1)]


def _numbers(value: Any) -> Any:
    """The parts of a list on the command line, such as `[0.9, 0.95]`, which arrives as a text."""
    return value.strip("[]() ").split(",") if isinstance(value, str) else value


def _checkpointing_mode(value: Any) -> Any:
    """Today's value of `training.activation_checkpointing` for the one that earlier releases had."""
    if not isinstance(value, bool):
        return value
    mode = "full" if value else "none"
    _report_former_value(f"training.activation_checkpointing={str(value).lower()}", mode)
    return mode


@cache  # once in a process
def _report_former_value(given: str, value: str) -> None:
    _logger.warning("%s is now called %s; the old value is still understood in this release", given, value)


class ModelConfig(Section):
    """The model that is trained."""

    name: str = Field(description="Hugging Face model directory or hub name")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="number format in training and sampling")
    max_length: Positive = Field(512, description="prompt + response, tokens; at most the model's context")
    chat_template: Literal["auto", "never"] = Field(
        "auto", description="auto: put questions into the model's chat template if it has one"
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="values for the chat template, such as enable_thinking: false for Qwen3"
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="system message before every question; none: as the chat template does"
    )
    template_date: date | None = Field(
        None,
        description="day that strftime_now tells a chat template, YYYY-MM-DD; none: the day on which the run begins",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if owned := sorted(_NOT_TEMPLATE_KWARGS & self.chat_template_kwargs.keys()):
            hint = "; the date is model.template_date" if "strftime_now" in owned else ""
            raise ConfigError(
                f"model.chat_template_kwargs cannot have {owned[0]}, which the run itself gives the chat template{hint}"
            )
        if self.chat_template == "never":
            for key in ("chat_template_kwargs", "system_prompt"):
                if getattr(self, key):
                    raise ConfigError(
                        f"model.{key} needs a chat template, and model.chat_template=never leaves it out; remove one "
                        f"of the two"
                    )
        return self

    def dated(self, day: date) -> Self:
        """The same section with `day` as its template date, unless it has one."""
        return self if self.template_date is not None else self.model_copy(update={"template_date": day})


class JudgeConfig(Section):
    """The model that rates candidates with feedback.kind=judge: any OpenAI-compatible endpoint."""

    url: str | None = Field(None, description="base URL of the endpoint, ending in /v1")
    model: str | None = Field(None, description="model name in requests; none: the first that the endpoint lists")
    api_key_env: str | None = Field(None, description="environment variable that holds the API key; none: no key")
    ratings: int = Field(3, ge=1, le=16, description="ratings per candidate; their mean is its reward")
    temperature: float = Field(1.0, ge=0, le=5, description="sampling temperature of the judge")
    seed: Natural | None = Field(
        0, description="seed of the first rating of a candidate, one more for each further rating; none: not sent"
    )
    guided: bool = Field(
        False, description="have the endpoint constrain replies to the expected form; vLLM and a few others can"
    )
    max_tokens: Positive = Field(512, description="longest reply of the judge, tokens")
    concurrency: Positive = Field(16, description="requests in flight at once")
    timeout_s: Seconds = Field(120, description="deadline of one request, seconds")
    attempts: Positive = Field(5, description="times a request is sent before the round fails")
    cache: str | None = Field(None, description="SQLite file of the replies; none: judge.sqlite in the run directory")
    max_unparsable: float = Field(0.1, ge=0, le=1, description="largest share of replies that contain no rating")


class FeedbackConfig(Section):
    """How the reward of a candidate is computed."""

    kind: Literal["binary", "steps", "judge"] = Field(
        "binary",
        description="binary: 1 right, 0 wrong; steps: share of right steps (arithmetic); judge: a model's rating",
    )
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        if self.kind == "judge" and not self.judge.url:
            raise ConfigError("feedback.kind=judge needs feedback.judge.url, the base URL of an OpenAI-compatible API")
        return self


class VftConfig(Section):
    """Round 0: VFT (supervised fine-tuning, SFT) on the reference responses."""

    epochs: Natural = Field(3, description="passes over the training questions; 0: the model is fine-tuned already")
    questions_per_step: Positive = Field(64, description="questions in one optimiser step, over all workers")
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")


class RoundsConfig(Section):
    """The rounds of AFT after round 0."""

    count: Natural = Field(3, description="rounds after round 0")
    questions_per_round: Positive | None = Field(
        None, description="questions of a round; none: every training question"
    )
    max_staleness: Natural = Field(1, description="0: sampling and training alternate; 1: they overlap")
    evaluate_every: Natural = Field(1, description="rounds between evaluations on the validation split; 0: never")
    timeout_s: Seconds = Field(86_400, description="deadline of a round's sampling or training, seconds")


class AdaptiveConfig(Section):
    """Fewer candidates than sampling.k where they are enough, and questions left out; off unless a key is set."""

    initial_k: Positive = Field(2, description="candidates that every question gets; sampling.k is the most")
    step: Positive = Field(
        2, description="further candidates at a time, while the verdicts on those of a question are all the same"
    )
    skip_after: Natural = Field(
        2,
        description="rounds in a row in which every answer to a question was right, after which a round may leave it "
        "out; 0: every round asks every question",
    )
    ask_probability: float = Field(
        0.5, gt=0, lt=1, description="probability of being asked after skip_after such rounds; its power after more"
    )
    min_ask_probability: float = Field(0.1, gt=0, le=1, description="the probability of being asked is never lower")


class SamplingConfig(Section):
    """How candidates are sampled, and which resources the samplers use."""

    renamed_keys: ClassVar[dict[str, str]] = {"max_parked": "max_failed"}

    k: Positive = Field(6, description="candidates per question; with adaptive, the most")
    temperature: float = Field(1.0, gt=0, le=2, description="sampling temperature; scores are always at temperature 1")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: Positive = Field(256, description="longest response, tokens, end-of-sequence included")
    samplers: Positive = Field(1, description="vLLM engines")
    min_samplers: Positive = Field(1, description="engines that sampling starts with; the others join when they are up")
    tensor_parallel_size: Positive = Field(1, description="processes in one node that split every layer of an engine")
    pipeline_parallel_size: Positive = Field(1, description="stages of layers, each tensor_parallel_size processes")
    cpus_per_sampler: float = Field(1, gt=0, description="Ray CPUs of an engine; for a CPU engine also its threads")
    gpus_per_sampler: float = Field(
        0, ge=0, description="GPUs of an engine: one per process, a fraction for a single process, or 0"
    )
    colocate: bool = Field(
        False, description="engines and train workers share the workers' GPUs in turn; needs max_staleness=0"
    )
    max_num_seqs: Positive | None = Field(
        None, description="most sequences that an engine runs at once; none: vLLM's own number for the hardware"
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a CPU engine, GiB")
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the engine's GPU memory that it uses; none: 0.9, or 0.8 with colocate, where the train "
        "workers keep a CUDA context on the GPU",
    )
    engine_args: dict[str, JsonValue] = Field(
        {}, description="further engine arguments of the installed vLLM, by name, such as kv_cache_dtype"
    )
    batch_size: int = Field(16, ge=1, le=512, description="questions in one call of a sampler")
    in_flight: Positive = Field(8, description="calls in flight per sampler")
    groups_per_file: Positive = Field(64, description="groups in one Parquet file")
    attempts: Positive = Field(3, description="times a question is tried before it counts as failed")
    max_failed: float = Field(0.05, ge=0, le=1, description="largest share of a round's questions that may fail")
    timeout_s: Seconds = Field(600, description="deadline of one call of a sampler, seconds")
    start_timeout_s: Seconds = Field(900, description="deadline of an engine's start, seconds")
    adaptive: AdaptiveConfig | None = Field(
        None, description="ask for more candidates only where they are needed; none: k for every question"
    )

    @model_validator(mode="after")
    def _check_engine_args(self) -> Self:
        owned = SAMPLER_ARGUMENTS if self.gpus_per_sampler else SAMPLER_ARGUMENTS | CPU_ARGUMENTS
        refuse_owned(self.engine_args, "sampling.engine_args", owned)
        return self

    @property
    def gpu_memory_share(self) -> float:
        """The share of the whole memory of each of its GPUs that an engine uses."""
        share = self.gpu_memory_utilization or (0.8 if self.colocate else 0.9)
        return share * min(1.0, self.gpus_per_sampler)

    @property
    def processes_per_sampler(self) -> int:
        """Processes that share an engine's weights."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def spans_nodes(self) -> bool:
        """Whether the stages of an engine may be on different nodes; without GPUs vLLM keeps them on one."""
        return self.pipeline_parallel_size > 1 and self.gpus_per_sampler > 0


class TrainingConfig(Section):
    """One pass of optimiser steps over the groups of a round."""

    workers: Positive = Field(1, description="Ray Train workers")
    cpus_per_worker: float = Field(1, gt=0, description="Ray CPUs of a worker; without a GPU also its threads")
    gpus_per_worker: Literal[0, 1] = Field(0, description="GPUs of a worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what DeepSpeed shards: 1 optimizer, 2 gradients, 3 weights")
    epochs: Positive = Field(1, description="passes over the groups of a round")
    groups_per_step: Positive = Field(64, description="groups in one optimiser step, over all workers")
    tokens_per_microbatch: Positive = Field(
        16384,
        description="most tokens in one forward pass of a worker, each prompt once; at least model.max_length. A group "
        "with more is split and trained exactly, at the price of one more forward pass over it",
    )
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="learning rate after the warm-up, over all rounds; round 0 has a curve of its own"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps that warm up, linearly, to the peak")
    min_learning_rate_ratio: float = Field(
        0.0, ge=0, le=1, description="linear, cosine: where the learning rate ends, as a share of its peak"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW with float32 states, or with bitsandbytes' 8-bit ones; paged: a GPU moves them to CPU "
        "memory while it is full",
    )
    betas: Annotated[tuple[_Beta, _Beta], BeforeValidator(_numbers)] = Field(
        (0.9, 0.999), description="decay of AdamW's two moments"
    )
    eps: float = Field(1e-8, gt=0, description="what AdamW adds to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    offload_optimizer: bool = Field(False, description="ZeRO 1 to 3: optimizer state and step in CPU memory")
    offload_parameters: bool = Field(False, description="ZeRO 3: weights in CPU memory until a layer needs them")
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], BeforeValidator(_checkpointing_mode)] = (
        Field(
            "none",
            description="activations that are recomputed in the backward pass: none; selective: all but the results of "
            "matrix products and attention; full: all but each layer's input, a third slower",
        )
    )
    attn_implementation: str = Field(
        "packed",
        min_length=1,
        description="packed: a prompt is computed once for all its responses, where the model can; or a name of "
        "transformers' implementations, such as sdpa, eager or flash_attention_2: a prompt is repeated per response",
    )
    sequence_parallel_size: Positive = Field(
        1,
        description="workers that compute a packed row together, each an equal share of its tokens (DeepSpeed "
        "Ulysses), for responses that are too long for one",
    )
    compile: bool = Field(False, description="torch.compile each decoder layer; needs a C++ compiler, on GPUs Triton")
    max_failures: Natural = Field(2, description="times the worker group is restarted from its last checkpoint")
    checkpoint_every_s: float = Field(
        1800, ge=0, description="seconds between training states saved inside a round; 0: only after each round"
    )
    keep_checkpoints: Positive = Field(2, description="training states kept; models of all rounds are kept")
    timeout_s: Seconds = Field(3600, description="deadline of a wait for another worker, seconds")
    deepspeed: dict[str, JsonValue] = Field(
        {}, description="further keys of DeepSpeed's configuration, merged into the run's; see docs/scale.md"
    )

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.schedule == "constant" and self.min_learning_rate_ratio:
            raise ConfigError(
                f"training.min_learning_rate_ratio={self.min_learning_rate_ratio:g} has no effect with "
                f"training.schedule=constant, which never falls; remove one of the two"
            )
        if self.optimizer != "adamw" and self.offload_optimizer:
            raise ConfigError(
                f"training.optimizer={self.optimizer} does not go with training.offload_optimizer, since the step in "
                f"CPU memory is DeepSpeed's own AdamW with float32 states; use training.optimizer=adamw, or leave the "
                f"states on the GPU"
            )
        if self.optimizer == "paged_adamw_8bit" and not self.gpus_per_worker:
            raise ConfigError(
                "training.optimizer=paged_adamw_8bit moves states between a GPU and CPU memory and needs "
                "training.gpus_per_worker=1; without a GPU use adamw_8bit"
            )
        return self

    @model_validator(mode="after")
    def _check_compilation(self) -> Self:
        if self.compile and self.activation_checkpointing == "selective":
            raise ConfigError(
                "training.compile chooses by itself which cheap operations it computes again, so that "
                "training.activation_checkpointing must be none or full, not selective"
            )
        return self

    @model_validator(mode="after")
    def _check_sequence_parallel(self) -> Self:
        size = self.sequence_parallel_size
        if self.workers % size:
            raise ConfigError(
                f"training.sequence_parallel_size={size} does not divide training.workers={self.workers}; change one "
                f"of the two"
            )
        if size > 1 and self.attn_implementation != "packed":
            raise ConfigError(
                f"training.sequence_parallel_size={size} needs training.attn_implementation=packed, not "
                f"{self.attn_implementation}"
            )
        return self

    @model_validator(mode="after")
    def _check_deepspeed(self) -> Self:
        check_deepspeed_keys(
            self.deepspeed,
            stage=self.zero_stage,
            workers=self.workers,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
        )
        return self


class LoraConfig(Section):
    """Low-rank adapters are trained instead of the weights; the model directory of a round is merged."""

    rank: Positive = Field(16, description="rank of the adapters")
    alpha: float = Field(32, gt=0, description="an adapter is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' inputs in training")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the linear layers that get an adapter",
    )
    quantize: Literal["none", "nf4"] = Field(
        "none",
        description="QLoRA: keep the frozen weights of linear layers as 4-bit numbers (bitsandbytes); ZeRO 0 to 2",
    )


class WeightsConfig(Section):
    """How new weights get from the train workers to the running engines."""

    transport: Literal["object_store", "checkpoint", "nccl", "lora"] = Field(
        "object_store",
        description="object_store: through Ray's object store; checkpoint: engines read the round's model directory "
        "from shared storage; nccl: broadcast from train worker 0 (gloo without GPUs); lora: the adapter alone",
    )
    probes: int = Field(16, ge=1, le=64, description="sequences scored on both sides after each publication")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="rounding error of a token's log-probability between trainer and engine, nats; a response of n "
        "tokens may differ by up to 10 / sqrt(n) times as much per token; none: 1e-4 in float32, 0.05 in bfloat16",
    )
    shard_mib: Positive = Field(1024, description="largest size of a safetensors shard of several tensors, MiB")
    bucket_mib: Positive = Field(512, description="nccl: size of a bucket, MiB; each side holds two")
    timeout_s: Seconds = Field(600, description="deadline of each phase of a publication, seconds")


class EvaluationConfig(Section):
    """What `aft-ray evaluate` and the evaluations during a run measure."""

    split: Literal["validation", "test"] = Field(
        "test", description="split of `aft-ray evaluate`; evaluations during a run use validation"
    )
    k: Positive = Field(6, description="samples per question beside the greedy answer")
    temperature: float = Field(1.0, gt=0, le=2, description="temperature of the samples")
    seed: Natural = Field(0, description="seed of the samples and of the bootstrap")
    seeds: Positive = Field(
        1,
        description="times that k samples are drawn, with the seeds seed, seed + 1, ...; metrics are means; "
        "evaluations during a run use one seed",
    )
    resamples: int = Field(1000, ge=100, description="bootstrap resamples of the 95 % intervals")
    during_training_k: Natural = Field(0, description="samples per question in evaluations of a run; 0: greedy only")


class ClusterConfig(Section):
    """The Ray cluster to use."""

    address: str | None = Field(None, description="Ray address; none: RAY_ADDRESS, or Ray started on this machine")
    logical_cpus: Positive | None = Field(None, description="CPUs of a Ray started here; none: as many as are needed")
    object_store_mib: Positive = Field(1024, description="object store of a Ray started here, MiB")
    grows: bool = Field(
        False,
        description="an autoscaler adds nodes on demand up to a limit that Ray does not know, so resources are waited "
        "for instead of counted",
    )
