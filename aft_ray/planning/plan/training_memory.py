"""Memory of a train worker, as DeepSpeed 0.19 allocates it for `training.deepspeed.ds_config` and `training.step`.

Sources. States: ZeRO (Rajbhandari et al., arXiv 1910.02054): 2 bytes of bfloat16 weights, gradients, and 12 bytes of
float32 master weights and Adam moments for each parameter. Gradients are accumulated in float32 here, so stages 2 and 3
hold 4 bytes of them instead of 2, and stage 1 (`BF16_Optimizer`) holds 4 beside the 2 of bfloat16, unsharded.
Offloading: ZeRO-Offload (arXiv 2101.06840). Activations: the tensors that autograd saves in transformers' Llama,
counted in the manner of Korthikanti et al. (arXiv 2205.05198), and what a step holds beside them at its peak. Tests
compare states with real ones, and activations with those of the real step at the sizes of 7B to 72B.

Invariant: GPU and host memory are upper bounds for a run that uses the limits of its config fully, not means.
"""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.quantities import GB, Quantity, giga
from aft_ray.planning.plan.workload import Workload

# Numbers of elements: aft_ray.training.deepspeed._BUCKET, and the defaults of DeepSpeed's stage3_max_live_parameters
# and sub_group_size.
BUCKET, MAX_LIVE, SUB_GROUP = 50_000_000, 1_000_000_000, 1_000_000_000
# Logits that exist at once on a GPU: aft_ray.training.forward.scoring's chunk.
LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Memory of one train worker.

    Attributes:
        device: Bytes on its GPU; without a GPU, bytes of host memory.
        host: Bytes of host memory beside `device`.
        states: Bytes of weights, gradients and optimizer states in `device`.
        lines: The parts of `device`.
        host_lines: The parts of `host`.
    """

    device: float
    host: float
    states: float
    lines: tuple[Quantity, ...]
    host_lines: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class ModelState:
    """A value that a worker keeps for each parameter, such as a gradient.

    Attributes:
        label: What it is.
        bytes: Bytes for a parameter.
        count: The number of parameters that have it.
        sharded: Whether each worker keeps only its share of the parameters.
        on_host: Whether it is offloaded to host memory.
    """

    label: str
    bytes: float
    count: int
    sharded: bool
    on_host: bool

    def quantity(self, workers: int) -> Quantity:
        """The bytes that one of `workers` workers keeps."""
        how = f"{self.bytes:g} bytes x {giga(self.count)}" + (f" / {workers} workers" if self.sharded else "")
        return Quantity(self.label, self.bytes * self.count / (workers if self.sharded else 1), "bytes", how)


def model_states(config: RunConfig, model: Architecture) -> list[ModelState]:
    """The weights, gradients and optimizer states that DeepSpeed keeps. Weights that LoRA freezes have no others."""
    training, half = config.training, config.model.dtype == "bfloat16"
    stage = max(training.zero_stage, 1) if half else training.zero_stage
    width = 2 if half else 4
    everything = model.parameters
    trained = everything
    if config.lora is not None:
        trained = model.lora_parameters(config.lora.rank, config.lora.targets)
        everything += trained
    offload = training.offload_optimizer
    kept = [ModelState("weights", width, everything, stage == 3, stage == 3 and training.offload_parameters)]
    if stage == 0:
        kept.append(ModelState("gradients, float32", 4, trained, False, False))
    elif stage == 1 and half:
        kept.append(ModelState("gradients, bfloat16", 2, trained, False, False))
        kept.append(ModelState("gradients accumulated in float32", 4, trained, False, False))
    elif stage == 1:
        kept.append(ModelState("gradients, float32", 4, trained, False, False))
    else:
        kept.append(ModelState("gradients accumulated in float32", 4, trained, True, offload))
        if offload:
            kept.append(ModelState("gradients as the optimizer reads them", 4, trained, True, True))
    # Without ZeRO, Adam updates the weights themselves. With ZeRO it updates a copy of the worker's share, also when
    # the weights are in float32.
    if stage > 0:
        kept.append(ModelState("master weights, float32", 4, trained, True, offload))
    if training.optimizer == "adamw":
        kept.append(ModelState("Adam's two moments, float32", 8, trained, stage > 0, offload))
    else:  # bitsandbytes' blocks of 256 values have a float32 scale each
        kept.append(ModelState("Adam's two moments, 8 bits", 2 * (1 + 4 / 256), trained, stage > 0, False))
    return kept


def activation_bytes(model: Architecture, half: bool) -> float:
    """The bytes that autograd saves of one layer, for each token.

    These are: of two RMSNorms the input in float32, the normalised input and the output; queries, keys and values; the
    output of attention and its log-sum-exp; and four tensors of the MLP. No mask is saved, and nothing that grows with
    the length.

    Args:
        model: The model.
        half: Whether the model is in bfloat16 instead of float32.
    """
    h, q, f, a = model.hidden, model.query_width, model.intermediate, model.heads
    width = 2 if half else 4
    norms = 2 * ((4 + 2 + 2) if half else (4 + 4 + 4)) * h + 8
    head_norms = (q + model.kv_width) * (6 if half else 8) + 4 * (a + model.kv_heads) if model.head_norms else 0
    return norms + head_norms + width * (2 * q + 2 * model.kv_width) + 4 * a + 4 * width * f


def saved_bytes(model: Architecture, half: bool, checkpointing: str) -> float:
    """The bytes that a layer keeps for its backward pass, for each token.

    Args:
        checkpointing: `training.activation_checkpointing`: "none" keeps all that autograd saves, "selective" the
            results of matrix products and of attention, "full" the layer's input.
    """
    width, h = 2 if half else 4, model.hidden
    if checkpointing == "full":
        return float(width * h)
    if checkpointing == "selective":
        products = 3 * h + 2 * model.query_width + 2 * model.kv_width + 2 * model.intermediate
        return float(width * products + 4 * model.heads)
    return activation_bytes(model, half)


def training_memory(
    config: RunConfig, model: Architecture, work: Workload, assumptions: PlanAssumptions, workers: int
) -> TrainingMemory:
    """The peak memory of one of `workers` train workers."""
    training, half = config.training, config.model.dtype == "bfloat16"
    kept = model_states(config, model)
    lines = [state.quantity(workers) for state in kept if not state.on_host]
    state_bytes = sum(line.value for line in lines)
    host_lines = [state.quantity(workers) for state in kept if state.on_host]
    lines += _buffers(config, model)
    lines += _activations(config, model, work, workers, half)
    if training.gpus_per_worker:
        reserve = assumptions.training_reserve * GB
        lines.append(Quantity("CUDA, NCCL, fragmentation", reserve, "bytes", "assumed (training_reserve)"))
    if config.sampling.colocate:
        host_lines.append(Quantity("states while engines have the GPU", state_bytes, "bytes", "sampling.colocate"))
    # The layers that the worker owns, until they are written into the model directory.
    width = 2 if half else 4
    how = f"{width} bytes x {giga(model.parameters)} / {workers} workers"
    host_lines.append(Quantity("layers to be written", width * model.parameters / workers, "bytes", how))
    process = assumptions.process_memory * GB
    host_lines.append(Quantity("the process", process, "bytes", "assumed (process_memory)"))
    device, host = sum(line.value for line in lines), sum(line.value for line in host_lines)
    return TrainingMemory(device, host, state_bytes, tuple(lines), tuple(host_lines))


def _buffers(config: RunConfig, model: Architecture) -> list[Quantity]:
    """DeepSpeed's own buffers and, at stage 3, the weights that are gathered at the same time."""
    half = config.model.dtype == "bfloat16"
    stage = max(config.training.zero_stage, 1) if half else config.training.zero_stage
    width = 2 if half else 4
    lines = []
    if stage >= 2:
        buckets = 2 if config.training.gpus_per_worker else 1
        largest = model.embedding_parameters if config.lora is None else 0
        size = width * (buckets * BUCKET + largest)
        how = f"{width} bytes x ({buckets} x {giga(BUCKET)} + {giga(largest)} of the largest gradient)"
        if half:  # they are reduced in float32: a bucket that is copied and flattened, or one large gradient
            copied = max(2 * BUCKET, largest)
            size += 4 * copied
            how += f" + 4 bytes x {giga(copied)} reduced in float32"
        lines.append(Quantity("reduction buckets", size, "bytes", how))
    if stage == 3:
        live = min(model.parameters, MAX_LIVE)
        lines.append(
            Quantity("weights gathered at one time", width * live, "bytes", f"{width} bytes x at most {giga(live)}")
        )
    return lines


def row_tokens(config: RunConfig, workers: int) -> tuple[int, str]:
    """The tokens that a worker computes at most in one forward pass, and what limits them.

    It is the config's budget, or a worker's whole share of a step.
    """
    training, longest = config.training, config.model.max_length
    candidates = config.sampling.k if config.samples else 0
    together = training.sequence_parallel_size
    share = -(-training.groups_per_step * together // workers)
    step = -(-share * (1 + candidates) * longest // together)
    if step >= training.tokens_per_microbatch:
        return training.tokens_per_microbatch, "tokens_per_microbatch"
    source = f"a worker's share of a step, {share} x (1 + k={candidates}) x max_length={longest}"
    return step, source + (f" / sequence_parallel_size={together}" if together > 1 else "")


def _activations(config: RunConfig, model: Architecture, work: Workload, workers: int, half: bool) -> list[Quantity]:
    """Saved activations, and the largest of the needs that arise only for a part of a step."""
    training, width = config.training, 2 if half else 4
    tokens, source = row_tokens(config, workers)
    layer = activation_bytes(model, half)
    kept = saved_bytes(model, half, training.activation_checkpointing)
    saved = kept * model.layers * tokens
    how = f"{tokens:,} tokens ({source}) x {model.layers} layers x {kept:,.0f} bytes"
    if training.activation_checkpointing != "none":
        how += f", {training.activation_checkpointing} checkpointing"
    lines = [Quantity("saved activations", saved, "bytes", how)]
    candidates = config.sampling.k if config.samples else 0
    responses = (1 + candidates) * config.sampling.max_tokens
    targets = tokens * min(1.0, responses / (work.prompt + responses))
    # One chunk of logits in float32, in bfloat16 beside its copy; the gradient of the head; what the last norm saves;
    # hidden states of the targets, and what their gradient is made of.
    chunk = (6 if half else 4) * max(LOGITS, 128 * model.vocabulary)
    head = width * model.embedding_parameters if config.lora is None else 0
    logits = chunk + head + (8 if half else 12) * model.hidden * (tokens + targets)
    # Backward: gradients of the two factors in the MLP and of the product, whose input is not needed any more.
    gradients = 2 * width * model.intermediate + width * model.hidden
    recomputed = layer if training.activation_checkpointing != "none" else 0.0
    what = "a layer recomputed and its gradients" if recomputed else "the gradients of a layer"
    temporary = {
        f"a chunk of logits, the gradient of {giga(model.embedding_parameters)} weights of the head, and the hidden "
        f"states of {targets:,.0f} response tokens": logits,
        f"{what}: {tokens:,} x {recomputed + gradients:,.0f} bytes": (recomputed + gradients) * tokens,
    }
    if training.zero_stage == 3 and not training.offload_optimizer and config.lora is None:
        share = min(SUB_GROUP, model.parameters // workers)
        name = f"the optimizer's step: 2 x 4 bytes x {giga(share)}, in the activations' place"
        temporary[name] = max(0.0, 8.0 * share - saved)
    name, peak = max(temporary.items(), key=lambda item: item[1])
    lines.append(Quantity("largest passing need", peak, "bytes", name))
    return lines
