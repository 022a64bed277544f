"""Memory of a train worker, line by line, as DeepSpeed 0.19 under `training.deepspeed.ds_config` and `training.step`
allocate it.

Sources. States: ZeRO (Rajbhandari et al., arXiv 1910.02054), 2 bytes of bfloat16 weights, gradients, 12 bytes of
float32 master weights and Adam moments; here gradients are accumulated in float32, so stages 2 and 3 hold 4 bytes of
them instead of 2, and stage 1 (`BF16_Optimizer`) 4 beside the 2 of bfloat16, unsharded. Offloading: ZeRO-Offload
(arXiv 2101.06840). Activations: the tensors that autograd saves in transformers' Llama, in the manner of Korthikanti et
al. (arXiv 2205.05198) for this layer; tests hold states and activations to real ones, to the byte.

Invariant: GPU and host memory are upper bounds of what a run at the edge of its limits needs, not means.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.quantities import GB, Quantity, giga
from aft_ray.planning.plan.workload import Workload

# aft_ray.training.deepspeed._BUCKET, and DeepSpeed's stage3_max_live_parameters and sub_group_size: elements.
BUCKET, MAX_LIVE, SUB_GROUP = 50_000_000, 1_000_000_000, 1_000_000_000


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one worker. device: on what it computes. host: beside that, in its node's memory. The first, when the
    worker has no GPU, is host memory too. lines and host_lines: the arithmetic of each."""

    device: float
    host: float
    states: float
    lines: tuple[Quantity, ...]
    host_lines: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class States:
    """Bytes a parameter that a worker keeps, by what it is: whole of all N, or a share of N / workers."""

    label: str
    bytes: float
    count: int
    sharded: bool
    on_host: bool

    def figure(self, workers: int) -> Quantity:
        how = f"{self.bytes:g} bytes x {giga(self.count)}" + (f" / {workers} workers" if self.sharded else "")
        return Quantity(self.label, self.bytes * self.count / (workers if self.sharded else 1), "bytes", how)


def states(config: RunConfig, model: Architecture) -> list[States]:
    """What DeepSpeed keeps of weights, gradients and optimizer. Frozen weights of a LoRA run have the weights alone."""
    training, half = config.training, config.model.dtype == "bfloat16"
    stage = max(training.zero_stage, 1) if half else training.zero_stage
    width = 2 if half else 4
    everything = model.parameters
    trained = everything
    if config.lora is not None:
        trained = model.lora_parameters(config.lora.rank, config.lora.targets)
        everything += trained
    offload = training.offload_optimizer
    kept = [States("weights", width, everything, stage == 3, stage == 3 and training.offload_parameters)]
    if stage == 0:
        kept.append(States("gradients, float32", 4, trained, False, False))
    elif stage == 1 and half:
        kept.append(States("gradients, bfloat16", 2, trained, False, False))
        kept.append(States("gradients accumulated in float32", 4, trained, False, False))
    elif stage == 1:
        kept.append(States("gradients, float32", 4, trained, False, False))
    else:
        kept.append(States("gradients accumulated in float32", 4, trained, True, offload))
        if offload:
            kept.append(States("gradients as the optimizer reads them", 4, trained, True, True))
    # Without ZeRO, Adam updates the weights themselves; with it a copy of a share of them, in float32 too.
    if stage > 0:
        kept.append(States("master weights, float32", 4, trained, True, offload))
    kept.append(States("Adam's two moments, float32", 8, trained, stage > 0, offload))
    return kept


def activation_bytes(model: Architecture, row: int, half: bool) -> float:
    """What autograd saves of one layer, bytes a token; `row` is the tokens of a row.

    Two RMSNorms (input and its norm in float32 and the model's type, output), queries, keys and values repeated for
    all heads, output and log-sum-exp of attention, its mask, and four tensors of the MLP.
    """
    h, q, f, a = model.hidden, model.query_width, model.intermediate, model.heads
    width = 2 if half else 4
    norms = 2 * ((4 + 2 + 2) if half else (4 + 4 + 4)) * h + 8
    head_norms = (q + model.kv_width) * (6 if half else 8) + 4 * (a + model.kv_heads) if model.head_norms else 0
    return norms + head_norms + 4 * width * q + 4 * a + width * row + 4 * width * f


def training_memory(
    config: RunConfig, model: Architecture, work: Workload, assumed: PlanAssumptions, workers: int
) -> TrainingMemory:
    """The peak of one of `workers` train workers."""
    training, half = config.training, config.model.dtype == "bfloat16"
    kept = states(config, model)
    lines = [one.figure(workers) for one in kept if not one.on_host]
    state_bytes = sum(line.value for line in lines)
    host_lines = [one.figure(workers) for one in kept if one.on_host]
    lines += _buffers(config, model)
    lines += _working(config, model, work, workers, half)
    if training.gpus_per_worker:
        reserve = assumed.training_reserve * GB
        lines.append(Quantity("CUDA, NCCL, fragmentation", reserve, "bytes", "assumed (training_reserve)"))
    if config.sampling.colocate:
        host_lines.append(Quantity("states while engines have the GPU", state_bytes, "bytes", "sampling.colocate"))
    process = assumed.process_memory * GB
    host_lines.append(Quantity("the process", process, "bytes", "assumed (process_memory)"))
    device, host = sum(line.value for line in lines), sum(line.value for line in host_lines)
    return TrainingMemory(device, host, state_bytes, tuple(lines), tuple(host_lines))


def _buffers(config: RunConfig, model: Architecture) -> list[Quantity]:
    """DeepSpeed's own buffers, and at stage 3 the weights that are whole at one time."""
    half = config.model.dtype == "bfloat16"
    stage = max(config.training.zero_stage, 1) if half else config.training.zero_stage
    width = 2 if half else 4
    lines = []
    if stage >= 2:
        buckets = 2 if config.training.gpus_per_worker else 1
        largest = model.embedding_parameters if config.lora is None else 0
        size = width * (buckets * BUCKET + largest)
        how = f"{width} bytes x ({buckets} x {giga(BUCKET)} + {giga(largest)} of the largest gradient)"
        lines.append(Quantity("reduction buckets", size, "bytes", how))
    if stage == 3:
        live = min(model.parameters, MAX_LIVE)
        lines.append(
            Quantity("weights gathered at one time", width * live, "bytes", f"{width} bytes x at most {giga(live)}")
        )
    return lines


def microbatch_tokens(config: RunConfig, workers: int) -> tuple[int, str]:
    """Padded tokens of the largest forward pass: the budget, a single group that is larger, or all of a step."""
    training, longest = config.training, config.model.max_length
    candidates = config.sampling.k if config.samples else 0
    group = (1 + candidates) * longest
    if group > training.tokens_per_microbatch:
        return group, f"a group of (1 + k={candidates}) x max_length={longest}"
    step = -(-training.groups_per_step // workers) * group
    if step < training.tokens_per_microbatch:
        return step, f"a worker's share of a step, {step // group} x (1 + k={candidates}) x max_length={longest}"
    return training.tokens_per_microbatch, "tokens_per_microbatch"


def _working(config: RunConfig, model: Architecture, work: Workload, workers: int, half: bool) -> list[Quantity]:
    """Activations, logits, and the larger of what they and the optimizer's step need only for a while."""
    tokens, source = microbatch_tokens(config, workers)
    longest, width = config.model.max_length, 2 if half else 4
    layer = activation_bytes(model, longest, half)
    if config.training.activation_checkpointing:
        saved = float(width * model.hidden * model.layers * tokens)
        how = f"{tokens:,} tokens ({source}) x {model.layers} layers x {width} x {model.hidden:,}: layer inputs"
    else:
        saved = layer * model.layers * tokens
        how = f"{tokens:,} tokens ({source}) x {model.layers} layers x {layer:,.0f} bytes"
    lines = [Quantity("saved activations", saved, "bytes", how)]
    columns: float = min(1.0, config.sampling.max_tokens / min(longest, work.prompt + config.sampling.max_tokens))
    responses = tokens * columns
    # Logits, their float32 copy and log-softmax forward; log-softmax and two gradients of it backward.
    logits = (width + 10) * model.vocabulary * responses
    passing = {
        f"logits: {responses:,.0f} response tokens x {model.vocabulary:,} x {width + 10} bytes": logits,
        f"a layer recomputed or its gradients: {tokens:,} x {layer:,.0f} bytes": layer * tokens,
    }
    training = config.training
    if training.zero_stage == 3 and not training.offload_optimizer and config.lora is None:
        share = min(SUB_GROUP, model.parameters // workers)
        what = f"the optimizer's step: 2 x 4 bytes x {giga(share)}, in the activations' place"
        passing[what] = max(0.0, 8.0 * share - saved)
    what, peak = max(passing.items(), key=lambda item: item[1])
    lines.append(Quantity("largest passing need", peak, "bytes", what))
    return lines
