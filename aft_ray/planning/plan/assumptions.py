"""What a plan has to assume: the shares of peak speeds that are reached, the lengths of texts, fixed costs.

Invariant: every assumption is printed with the plan and can be replaced by `--assume name=value`; a plan assumes
nothing else. The default shares are round numbers in the range that is published for such runs: a model FLOP/s
utilisation (MFU) of 0.35 to 0.5 (PaLM, arXiv 2204.02311; Megatron-LM, arXiv 2104.04473), and decoding that is limited
by memory bandwidth (arXiv 2211.05102). They were not measured on the GPUs of the presets: replace them by those of a
run of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from aft_ray.config.loader import apply_override, parse_section
from aft_ray.config.section import Natural, Positive, Section


class PlanAssumptions(Section):
    """The assumptions of a plan, with their defaults."""

    key_list: ClassVar[str] = "the end of every plan"

    questions: Positive | None = Field(None, description="training questions; none: as the config or the task says")
    validation_questions: Natural | None = Field(None, description="validation questions; none: as the task says")
    prompt_tokens: float | None = Field(None, gt=0, description="mean length of a prompt, tokens; none: the task's")
    response_tokens: float | None = Field(None, gt=0, description="mean length of a response, tokens; none: the task's")
    signal: float = Field(
        0.6, ge=0, le=1, description="share of groups with right and wrong candidates; others train on the reference"
    )
    distinct: float = Field(
        0.95, gt=0, le=1, description="share of candidates that differ from all others of their group"
    )
    mfu: float = Field(0.4, gt=0, le=1, description="share of peak FLOP/s in training, recomputation included")
    prefill_mfu: float = Field(0.5, gt=0, le=1, description="share of peak FLOP/s in reading prompts (prefill)")
    memory_efficiency: float = Field(
        0.7, gt=0, le=1, description="share of peak memory bandwidth in decoding and in the optimizer"
    )
    link_efficiency: float = Field(0.7, gt=0, le=1, description="share of peak bandwidth of NVLink, network and PCIe")
    overlap: float = Field(0.7, ge=0, le=1, description="share of ZeRO's communication that is hidden behind computing")
    step_overhead_s: float = Field(0.003, ge=0, description="time of an engine's step outside the model, seconds")
    token_overhead_s: float = Field(
        20e-6, ge=0, description="further time for each token that it samples (seeds, log-probs), seconds"
    )
    all_reduce_s: float = Field(15e-6, ge=0, description="latency of one all-reduce inside an engine, seconds")
    pass_overhead_s: float = Field(0.02, ge=0, description="time of a training pass outside the model, seconds")
    round_overhead_s: float = Field(5, ge=0, description="start of Ray Data and probes of a round, seconds")
    training_reserve: float = Field(5, ge=0, description="GPU memory for CUDA, NCCL and fragmentation in training, GB")
    engine_reserve: float = Field(5, ge=0, description="GPU memory of an engine beside weights and KV cache, GB")
    process_memory: float = Field(3, ge=0, description="host memory of a process before any weights, GB")
    object_store: float = Field(5, gt=0, description="rate at which Ray's object store moves data out of a node, GB/s")
    shared_storage: float = Field(40, gt=0, description="bandwidth of the shared storage for all nodes together, GB/s")


def parse_assumptions(overrides: Sequence[str]) -> PlanAssumptions:
    """The default assumptions with `name=value` overrides.

    Raises:
        ConfigError: A name is not known, or a value is not valid.
    """
    tree: dict[str, object] = {}
    for override in overrides:
        apply_override(tree, override)
    return parse_section(PlanAssumptions, tree)
