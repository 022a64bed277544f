"""What the arithmetic has to assume, with its defaults: shares of peak speeds that are reached, and lengths of texts.

Invariant: everything here is printed with a plan and can be overridden by `--assume name=value`; nothing else is
guessed. The shares are round figures in the range that is published for such runs (model FLOP/s utilisation of 0.35 to
0.5: PaLM, arXiv 2204.02311, and Megatron-LM, arXiv 2104.04473; decoding bound by memory: arXiv 2211.05102). They were
not measured on these GPUs here: replace them by those of a run of your own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from aft_ray.config.loader import apply_override, parse_section
from aft_ray.config.section import Natural, Positive, Section


class PlanAssumptions(Section):
    """See the module."""

    questions: Positive | None = Field(None, description="training questions; none: the config's or the task's")
    validation_questions: Natural | None = Field(None, description="likewise for validation")
    prompt_tokens: float | None = Field(None, gt=0, description="mean prompt, tokens; none: the task's")
    response_tokens: float | None = Field(None, gt=0, description="mean response, tokens; none: the task's")
    signal: float = Field(0.6, ge=0, le=1, description="groups with right and wrong candidates; others train on 1 row")
    distinct: float = Field(0.95, gt=0, le=1, description="candidates that repeat no other of their group")
    filling: float = Field(0.85, gt=0, le=1, description="tokens of a micro-batch that are no padding")
    mfu: float = Field(0.4, gt=0, le=1, description="share of peak FLOP/s in training, recomputation included")
    prefill_mfu: float = Field(0.5, gt=0, le=1, description="share of peak FLOP/s in reading prompts")
    memory_efficiency: float = Field(0.7, gt=0, le=1, description="share of peak memory bandwidth, decoding, optimizer")
    link_efficiency: float = Field(0.7, gt=0, le=1, description="share of peak bandwidth of NVLink, network, PCIe")
    overlap: float = Field(0.7, ge=0, le=1, description="share of ZeRO's communication hidden behind computing")
    step_overhead_s: float = Field(0.003, ge=0, description="an engine's step beside the model, seconds")
    token_overhead_s: float = Field(
        20e-6, ge=0, description="and for each token it samples (seeds, log-probs), seconds"
    )
    all_reduce_s: float = Field(15e-6, ge=0, description="latency of one all-reduce inside an engine, seconds")
    pass_overhead_s: float = Field(0.02, ge=0, description="a training pass beside the model, seconds")
    round_overhead_s: float = Field(5, ge=0, description="Ray Data's start and the probes of a round, seconds")
    training_reserve: float = Field(5, ge=0, description="GPU memory for CUDA, NCCL and fragmentation in training, GB")
    engine_reserve: float = Field(5, ge=0, description="GPU memory of an engine beside weights and KV cache, GB")
    process_memory: float = Field(3, ge=0, description="host memory of a process before any weights, GB")
    object_store: float = Field(5, gt=0, description="what Ray's object store moves out of a node, GB/s")
    shared_storage: float = Field(40, gt=0, description="shared storage, all nodes together, GB/s")


def assume(overrides: Sequence[str]) -> PlanAssumptions:
    """The assumptions with `name=value` overrides. Raises ConfigError naming an unknown one."""
    tree: dict[str, object] = {}
    for override in overrides:
        apply_override(tree, override)
    return parse_section(PlanAssumptions, tree)
