"""How long the parts of a round take: sampling, training, publication, evaluation.

Sources. Sampling: the roofline of Pope et al. (arXiv 2211.05102): a step reads the weights and every running
sequence's cache, or is bound by its FLOPs; prompts are read at 2 FLOPs a parameter and token. The last response of a
batch adds at most its own length (Graham 1969, list scheduling). Training: 6 FLOPs a parameter and token (Kaplan et
al., arXiv 2001.08361; Hoffmann et al., arXiv 2203.15556), a third more with recomputed layers, 12 x layers x width x
length for attention (PaLM, arXiv 2204.02311, appendix B); ZeRO-3 moves three times the weights a pass (arXiv
1910.02054, section 7).

Invariant: G (all that samplers do for a round) and T (all that train workers do) are sums of the parts that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.engine_memory import EngineMemory
from aft_ray.planning.plan.hardware import NodeType, device
from aft_ray.planning.plan.quantities import GB, Quantity, duration, giga, gigabytes
from aft_ray.planning.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class SamplingTime:
    """seconds: of all questions of a round. step: of an engine with all its places taken. tokens_per_s: of an engine,
    decoding."""

    seconds: float
    step: float
    running: int
    tokens_per_s: float
    lines: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class TrainingTime:
    """seconds: of all steps. tokens_per_s: over all workers, without padding. communication: share of the seconds that
    waits for other workers."""

    seconds: float
    tokens_per_s: float
    communication: float
    lines: tuple[Quantity, ...]


class Speeds:
    """The times of a config's parts on a kind of node, as functions of how many processes do them."""

    def __init__(
        self, config: RunConfig, model: Architecture, work: Workload, assumed: PlanAssumptions, node: NodeType
    ) -> None:
        self.config, self.model, self.work, self.assumed, self.node = config, model, work, assumed, node
        self.width = 2 if config.model.dtype == "bfloat16" else 4

    # --- sampling

    def step(self, running: float, memory: EngineMemory, tensor_parallel: int) -> Quantity:
        """One step of an engine in which `running` sequences get a token each, seconds."""
        assumed, sampling, model = self.assumed, self.config.sampling, self.model
        stages = sampling.pipeline_parallel_size
        one = device(self.node, sampling.gpus_per_sampler, sampling.cpus_per_sampler)
        # Stages work on different parts of the batch at the same time; one stage's time is the step of its part.
        part = running / stages
        mean = self.work.prompt + self.work.response / 2
        reading = (memory.weights + part * mean * memory.kv_token) / (one.bandwidth * assumed.memory_efficiency)
        flops = 2 * (model.body_parameters + model.embedding_parameters) / (stages * tensor_parallel) * part
        computing = flops / (one.flops * assumed.prefill_mfu)
        overhead = assumed.step_overhead_s + part * assumed.token_overhead_s
        if reading > computing:
            how = (
                f"({gigabytes(memory.weights)} + {part:,.0f} x {mean:.0f} tokens x {gigabytes(memory.kv_token)}) / "
                f"({one.bandwidth / GB:,.0f} GB/s x {assumed.memory_efficiency:g})"
            )
        else:
            how = f"{flops:.3g} FLOP / ({one.flops:.3g} FLOP/s x {assumed.prefill_mfu:g})"
        how += f" = {duration(max(reading, computing))} + overheads {duration(overhead)}"
        reduces = 0.0
        if tensor_parallel > 1:
            volume = part * model.hidden * self.width * 2 * (tensor_parallel - 1) / tensor_parallel
            count = 2 * model.layers / stages
            reduces = count * (assumed.all_reduce_s + volume / self._link(tensor_parallel, inside=True))
            how += f" + {count:.0f} all-reduces {duration(reduces)}"
        return Quantity("a step", max(reading, computing) + overhead + reduces, "s", how)

    def sampling(self, samplers: int, memory: EngineMemory, tensor_parallel: int) -> SamplingTime:
        """A round's questions, k candidates each."""
        questions = -(-self.work.questions // samplers)
        return self._answering(questions, self.work.k, memory, tensor_parallel)

    def evaluation(self, samplers: int, memory: EngineMemory, tensor_parallel: int) -> SamplingTime:
        """The validation split, a greedy answer and `during_training_k` samples each."""
        k = 1 + self.config.evaluation.during_training_k
        return self._answering(-(-self.work.validation // samplers), k, memory, tensor_parallel)

    def _answering(self, questions: int, k: int, memory: EngineMemory, tensor_parallel: int) -> SamplingTime:
        sampling, work, assumed = self.config.sampling, self.work, self.assumed
        running = max(1, min(memory.running, questions * k))
        full = self.step(running, memory, tensor_parallel)
        step = full.value
        tokens = questions * k * work.response
        decoding = tokens / running * step
        one = device(self.node, sampling.gpus_per_sampler, sampling.cpus_per_sampler)
        processes = sampling.pipeline_parallel_size * tensor_parallel
        flops = questions * work.prompt * self._forward_flops(work.prompt)
        reading = flops / (processes * one.flops * assumed.prefill_mfu)
        last = self.step(1, memory, tensor_parallel).value
        tail = sampling.max_tokens * last if questions else 0.0
        lines = (
            Quantity("reading prompts", reading, "s", f"{questions:,} questions x {work.prompt:.0f} tokens (their k "
                   f"candidates share them) = {flops:.3g} FLOP / ({processes} x {one.flops:.3g} FLOP/s x "
                   f"{assumed.prefill_mfu:g})"),
            replace(full, label=f"a step of {running:,} sequences"),
            Quantity("decoding", decoding, "s", f"{questions:,} x k={k} x {work.response:.0f} tokens / {running:,} at "
                   f"once x {duration(step)}"),
            Quantity("the last response", tail, "s", f"max_tokens={sampling.max_tokens} x {duration(last)}, alone"),
        )  # fmt: skip
        return SamplingTime(reading + decoding + tail, step, running, running / step, lines)

    # --- training

    def _forward_flops(self, length: float, response_share: float = 0.0) -> float:
        """Of one token in a row of `length`; the head only for response tokens."""
        model = self.model
        body = 2 * model.body_parameters + 4 * model.layers * model.query_width * length
        return body + 2 * model.embedding_parameters * response_share

    def training(self, workers: int) -> TrainingTime:
        """One round's passes over its groups."""
        training = self.config.training
        steps = self.work.steps
        return self._passes(
            workers, self.work.questions, self.work.rows, training.groups_per_step, training.epochs, steps
        )

    def vft(self, workers: int) -> TrainingTime:
        """Round 0: reference responses alone."""
        vft = self.config.vft
        return self._passes(
            workers, self.work.vft_questions, 1.0, vft.questions_per_step, vft.epochs, self.work.vft_steps
        )

    def _passes(
        self, workers: int, questions: int, rows: float, per_step: int, epochs: int, steps: int
    ) -> TrainingTime:
        config, work, assumed = self.config, self.work, self.assumed
        if not steps:
            return TrainingTime(0.0, 0.0, 0.0, ())
        training = config.training
        one = device(self.node, training.gpus_per_worker, training.cpus_per_worker)
        length = work.row / assumed.filling
        group = rows * length
        groups = -(-min(per_step, questions) // workers)
        in_a_pass = max(1, int(training.tokens_per_microbatch // group))
        passes = -(-groups // in_a_pass)
        # Backward is twice forward; with frozen weights once, as their gradients are not needed.
        factor = (2 if config.lora is not None else 3) + (1 if training.activation_checkpointing else 0)
        forward = self._forward_flops(length, work.response / work.row)
        computing = groups * group * factor * forward / (one.flops * assumed.mfu)
        moved, how = self._communicated(workers, passes)
        link = self._link(workers)
        moving = moved / link
        waiting = max(moving - assumed.overlap * computing, (1 - assumed.overlap) * moving)
        offloaded, update = self._offloaded(workers, passes), self._update(workers)
        step = computing + waiting + offloaded + update + passes * assumed.pass_overhead_s
        seconds = steps * step
        lines = [
            Quantity("steps", steps, "", f"{epochs} x {questions:,} groups / {per_step}, rounded up"),
            Quantity("computing, a step", computing, "s", f"{groups} groups of the busiest worker x {rows:.3g} rows x "
                   f"{work.row:.0f} tokens / {assumed.filling:g} = {groups * group:,.0f} tokens x {factor} x "
                   f"{giga(forward)} FLOP / ({one.flops:.3g} FLOP/s x {assumed.mfu:g})"),
        ]  # fmt: skip
        if workers > 1:
            how += (
                f" = {gigabytes(moved)} / {link / GB:.0f} GB/s = {duration(moving)}, {assumed.overlap:.0%} of it hidden"
            )
            lines.append(Quantity("waiting for others, a step", waiting, "s", f"{how} if it can be"))
        if offloaded:
            how = f"PCIe at {self.node.pcie:g} GB/s x {assumed.link_efficiency:g}"
            lines.append(Quantity("to and from host memory, a step", offloaded, "s", how))
        overhead = duration(assumed.pass_overhead_s)
        lines += [
            Quantity("optimizer, a step", update, "s", "42 bytes a parameter of the worker's share"),
            Quantity("passes, a step", passes, "", f"{groups} groups, {in_a_pass} in tokens_per_microbatch="
                   f"{training.tokens_per_microbatch}; {overhead} each beside the model"),
            Quantity("all steps", seconds, "s", f"{steps} x {duration(step)}", total=True),
        ]  # fmt: skip
        tokens = questions * epochs * rows * work.row
        return TrainingTime(seconds, tokens / seconds, steps * waiting / seconds, tuple(lines))

    def _communicated(self, workers: int, passes: int) -> tuple[float, str]:
        """Bytes that pass a worker's link in a step, and why (ZeRO, section 7)."""
        stage = self.config.training.zero_stage
        trained = self.trained
        share = (workers - 1) / workers
        everything = self.width * self.model.parameters * share
        gradients = self.width * trained * share
        if stage == 3:
            how = f"{passes} x (2 gathers of {giga(self.model.parameters)} weights, gradients of {giga(trained)})"
            return passes * (2 * everything + gradients), how
        if stage == 2:
            how = f"{passes} x gradients of {giga(trained)}, their weights once"
            return (passes + 1) * gradients, how
        return 2 * gradients, f"gradients of {giga(trained)} reduced to all once"

    def _offloaded(self, workers: int, passes: int) -> float:
        training, share = self.config.training, self.trained / workers
        if not training.gpus_per_worker:
            return 0.0
        moved = 0.0
        if training.offload_optimizer:
            moved += share * (4 * (2 * passes - 1) + 4 + self.width)
        if training.offload_parameters:
            moved += 2 * passes * self.width * self.model.parameters / workers
        return moved / (self.node.pcie * GB * self.assumed.link_efficiency)

    def _update(self, workers: int) -> float:
        """Norm, clipping and Adam read and write 42 bytes of a float32 share of the trained parameters."""
        training = self.config.training
        stage = training.zero_stage or (1 if self.width == 2 else 0)
        share = self.trained / (workers if stage else 1)
        bandwidth = device(self.node, training.gpus_per_worker, training.cpus_per_worker).bandwidth
        if training.offload_optimizer and training.gpus_per_worker:
            bandwidth = self.node.host_bandwidth * GB / min(workers, max(1, self.node.gpus))
        return 42 * share / (bandwidth * self.assumed.memory_efficiency)

    @property
    def trained(self) -> int:
        lora = self.config.lora
        return self.model.parameters if lora is None else self.model.lora_parameters(lora.rank, lora.targets)

    def _link(self, processes: int, inside: bool = False) -> float:
        """What collectives reach, bytes/s: NVLink in a node; what goes round nodes passes the network of each once."""
        node, efficiency = self.node, self.assumed.link_efficiency
        if not node.gpus:
            return (node.host_bandwidth if inside or processes <= node.cpus else node.network) * GB * efficiency
        if inside or processes <= node.gpus:
            return node.between_gpus * GB * efficiency
        return min(node.between_gpus, node.network) * GB * efficiency
