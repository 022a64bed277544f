"""How long sampling, evaluation and training take in a round.

Sources for sampling: the roofline of Pope et al. (arXiv 2211.05102). A decoding step reads the weights and the KV cache
of every running sequence, or is limited by its FLOPs; reading a prompt takes 2 FLOPs a parameter and token. The last
response of a round adds at most its own length (list scheduling, Graham 1969).

Sources for training: 6 FLOPs a parameter and token (Kaplan et al., arXiv 2001.08361; Hoffmann et al., arXiv
2203.15556), a third more with recomputed activations, and 12 x layers x width x length for attention (PaLM, arXiv
2204.02311, appendix B). ZeRO-3 moves three times the weights in a pass (arXiv 1910.02054, section 7).

Invariant: each time is the sum of the parts that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aft_ray.config.run import RunConfig
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.engine_memory import EngineMemory
from aft_ray.planning.plan.hardware import NodeType, device
from aft_ray.planning.plan.quantities import GB, Quantity, duration, giga, gigabytes
from aft_ray.planning.plan.step_shape import StepShapes
from aft_ray.planning.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class SamplingTime:
    """Time of sampling, of the engine with the most questions.

    Attributes:
        seconds: Seconds for all its questions.
        step: Seconds of a decoding step with `running` sequences.
        running: Sequences that it runs at the same time.
        tokens_per_s: Tokens that it decodes in a second.
        lines: The arithmetic.
    """

    seconds: float
    step: float
    running: int
    tokens_per_s: float
    lines: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True)
class TrainingTime:
    """Time of training.

    Attributes:
        seconds: Seconds of all optimiser steps.
        tokens_per_s: Tokens in a second over all workers, each prompt once.
        communication: Share of the seconds in which a worker waits for others.
        lines: The arithmetic.
    """

    seconds: float
    tokens_per_s: float
    communication: float
    lines: tuple[Quantity, ...]


class TimeModel:
    """The times of a config's parts on a kind of node, as functions of the number of processes."""

    def __init__(
        self, config: RunConfig, model: Architecture, work: Workload, assumptions: PlanAssumptions, node: NodeType
    ) -> None:
        self.config, self.model, self.work, self.assumptions, self.node = config, model, work, assumptions, node
        self.width = 2 if config.model.dtype == "bfloat16" else 4
        self._step_shapes = {vft: StepShapes(config, work, assumptions, vft=vft) for vft in (False, True)}

    # --- sampling

    def step(self, running: float, memory: EngineMemory, tensor_parallel: int) -> Quantity:
        """The seconds of one decoding step, in which each of `running` sequences gets a token."""
        assumptions, sampling, model = self.assumptions, self.config.sampling, self.model
        stages = sampling.pipeline_parallel_size
        peak = device(self.node, sampling.gpus_per_sampler, sampling.cpus_per_sampler)
        # Pipeline stages work on different parts of the batch at the same time: a step takes one stage's time for its
        # part.
        batch = running / stages
        mean = self.work.prompt + self.work.response / 2
        reading = (memory.weights + batch * mean * memory.kv_token) / (peak.bandwidth * assumptions.memory_efficiency)
        flops = 2 * (model.body_parameters + model.embedding_parameters) / (stages * tensor_parallel) * batch
        computing = flops / (peak.flops * assumptions.prefill_mfu)
        overhead = assumptions.step_overhead_s + batch * assumptions.token_overhead_s
        if reading > computing:
            how = (
                f"({gigabytes(memory.weights)} + {batch:,.0f} x {mean:.0f} tokens x {gigabytes(memory.kv_token)}) / "
                f"({peak.bandwidth / GB:,.0f} GB/s x {assumptions.memory_efficiency:g})"
            )
        else:
            how = f"{flops:.3g} FLOP / ({peak.flops:.3g} FLOP/s x {assumptions.prefill_mfu:g})"
        how += f" = {duration(max(reading, computing))} + overheads {duration(overhead)}"
        reduces = 0.0
        if tensor_parallel > 1:
            volume = batch * model.hidden * self.width * 2 * (tensor_parallel - 1) / tensor_parallel
            count = 2 * model.layers / stages
            reduces = count * (assumptions.all_reduce_s + volume / self._link_bandwidth(tensor_parallel, inside=True))
            how += f" + {count:.0f} all-reduces {duration(reduces)}"
        return Quantity("a step", max(reading, computing) + overhead + reduces, "s", how)

    def sampling(self, samplers: int, memory: EngineMemory, tensor_parallel: int) -> SamplingTime:
        """The time in which `samplers` engines answer a round's questions with k candidates each."""
        questions = -(-self.work.questions // samplers)
        return self._generation(questions, self.work.k, memory, tensor_parallel)

    def evaluation(self, samplers: int, memory: EngineMemory, tensor_parallel: int) -> SamplingTime:
        """The time in which they answer the validation split: a greedy answer and `during_training_k` samples each."""
        k = 1 + self.config.evaluation.during_training_k
        return self._generation(-(-self.work.validation // samplers), k, memory, tensor_parallel)

    def _generation(self, questions: int, k: int, memory: EngineMemory, tensor_parallel: int) -> SamplingTime:
        sampling, work, assumptions = self.config.sampling, self.work, self.assumptions
        running = max(1, min(memory.running, questions * k))
        full = self.step(running, memory, tensor_parallel)
        step = full.value
        tokens = questions * k * work.response
        decoding = tokens / running * step
        peak = device(self.node, sampling.gpus_per_sampler, sampling.cpus_per_sampler)
        processes = sampling.pipeline_parallel_size * tensor_parallel
        flops = questions * work.prompt * self._forward_flops(work.prompt)
        reading = flops / (processes * peak.flops * assumptions.prefill_mfu)
        last = self.step(1, memory, tensor_parallel).value
        tail = sampling.max_tokens * last if questions else 0.0
        lines = (
            Quantity("reading prompts", reading, "s", f"{questions:,} questions x {work.prompt:.0f} tokens (their k "
                   f"candidates share them) = {flops:.3g} FLOP / ({processes} x {peak.flops:.3g} FLOP/s x "
                   f"{assumptions.prefill_mfu:g})"),
            replace(full, label=f"a step of {running:,} sequences"),
            Quantity("decoding", decoding, "s", f"{questions:,} x k={k} x {work.response:.0f} tokens / {running:,} at "
                   f"once x {duration(step)}"),
            Quantity("the last response", tail, "s", f"max_tokens={sampling.max_tokens} x {duration(last)}, alone"),
        )  # fmt: skip
        return SamplingTime(reading + decoding + tail, step, running, running / step, lines)

    # --- training

    def _forward_flops(self, length: float, response_share: float = 0.0) -> float:
        """FLOPs of one token's forward pass, on average over a row.

        Args:
            length: Tokens of the row.
            response_share: Share of its tokens that belong to the response; only they pass the output layer.
        """
        model = self.model
        body = 2 * model.body_parameters + 4 * model.layers * model.query_width * length
        return body + 2 * model.embedding_parameters * response_share

    def training(self, workers: int) -> TrainingTime:
        """The time of training on a round's groups."""
        training = self.config.training
        responses = self.work.responses
        return self._training(workers, self.work.questions, responses, training.groups_per_step, training.epochs,
                              self.work.steps, vft=False)  # fmt: skip

    def vft(self, workers: int) -> TrainingTime:
        """The time of round 0, which trains on the reference responses alone."""
        vft = self.config.vft
        return self._training(workers, self.work.vft_questions, 1.0, vft.questions_per_step, vft.epochs,
                              self.work.vft_steps, vft=True)  # fmt: skip

    def _training(
        self, workers: int, questions: int, responses: float, per_step: int, epochs: int, steps: int, *, vft: bool
    ) -> TrainingTime:
        work, assumptions = self.work, self.assumptions
        if not steps:
            return TrainingTime(0.0, 0.0, 0.0, ())
        training = self.config.training
        shape = self._step_shapes[vft].of(workers)
        peak = device(self.node, training.gpus_per_worker, training.cpus_per_worker)
        # A backward pass costs two forward passes; with frozen weights only one, as their gradients are not needed.
        factor = (2 if self.config.lora is not None else 3) + (1 if training.activation_checkpointing == "full" else 0)
        forward = self._forward_flops(work.length, min(1.0, responses * work.response / shape.group_tokens))
        passed = shape.train_tokens * factor + shape.score_tokens
        computing = passed * forward / (peak.flops * assumptions.mfu)
        passes = shape.train_passes
        moved, how = self._communicated_bytes(workers, passes, shape.score_passes)
        link = self._link_bandwidth(workers)
        moving = moved / link
        waiting = max(moving - assumptions.overlap * computing, (1 - assumptions.overlap) * moving)
        offloaded, update = self._offload_seconds(workers, passes), self._optimizer_seconds(workers)
        step = computing + waiting + offloaded + update + (passes + shape.score_passes) * assumptions.pass_overhead_s
        seconds = steps * step
        scored = f" + {shape.score_tokens:,.0f} without gradients" if shape.score_tokens else ""
        lines = [
            Quantity("steps", steps, "", f"{epochs} x {questions:,} groups / {per_step}, rounded up"),
            Quantity("computing, a step", computing, "s", f"({shape.train_tokens:,.0f} tokens of the slowest worker x "
                   f"{factor}{scored}) x {giga(forward)} FLOP / ({peak.flops:.3g} FLOP/s x {assumptions.mfu:g})"),
            Quantity("work of a worker / the slowest", shape.balance, "", f"the planner of a run on drawn groups of "
                   f"{shape.group_tokens:,.0f} tokens on average, each prompt once"),
        ]  # fmt: skip
        if workers > 1:
            how += f" = {gigabytes(moved)} / {link / GB:.0f} GB/s = {duration(moving)}"
            how += f", {assumptions.overlap:.0%} of it hidden if it can be"
            lines.append(Quantity("waiting for weights and gradients, a step", waiting, "s", how))
        if offloaded:
            how = f"PCIe at {self.node.pcie:g} GB/s x {assumptions.link_efficiency:g}"
            lines.append(Quantity("to and from host memory, a step", offloaded, "s", how))
        overhead = duration(assumptions.pass_overhead_s)
        split = f", {shape.score_passes:g} of them twice for groups that are split" if shape.score_passes else ""
        lines += [
            Quantity("optimizer, a step", update, "s", "42 bytes a parameter of the worker's share"),
            Quantity("passes, a step", passes, "", f"the fewest with at most tokens_per_microbatch="
                   f"{training.tokens_per_microbatch:,} tokens{split}; {overhead} each beside the model"),
            Quantity("all steps", seconds, "s", f"{steps} x {duration(step)}", total=True),
        ]  # fmt: skip
        tokens = questions * epochs * shape.group_tokens
        return TrainingTime(seconds, tokens / seconds, steps * waiting / seconds, tuple(lines))

    def _communicated_bytes(self, workers: int, passes: float, score_passes: float) -> tuple[float, str]:
        """The bytes that a worker exchanges with others in a step, and the formula (arXiv 1910.02054, section 7)."""
        stage = self.config.training.zero_stage
        trained = self.trained
        share = (workers - 1) / workers
        everything = self.width * self.model.parameters * share
        gradients, weights = 4 * trained * share, self.width * trained * share  # gradients are reduced in float32
        if stage == 3:
            how = f"{passes:.3g} x (2 gathers of {giga(self.model.parameters)} weights, gradients of {giga(trained)})"
            how += f" + {score_passes:.3g} gathers" if score_passes else ""
            return passes * (2 * everything + gradients) + score_passes * everything, how
        if stage == 2:
            how = f"{passes:.3g} x gradients of {giga(trained)}, their weights once"
            return passes * gradients + weights, how
        return 2 * gradients, f"gradients of {giga(trained)} reduced to all once"

    def _offload_seconds(self, workers: int, passes: float) -> float:
        """The seconds of a step in which offloaded states travel between a GPU and host memory."""
        training, share = self.config.training, self.trained / workers
        if not training.gpus_per_worker:
            return 0.0
        moved = 0.0
        if training.offload_optimizer:
            moved += share * (4 * (2 * passes - 1) + 4 + self.width)
        if training.offload_parameters:
            moved += 2 * passes * self.width * self.model.parameters / workers
        return moved / (self.node.pcie * GB * self.assumptions.link_efficiency)

    def _optimizer_seconds(self, workers: int) -> float:
        """The seconds of an optimizer step: norm, clipping and Adam move 42 bytes for each parameter of the worker."""
        training = self.config.training
        stage = training.zero_stage or (1 if self.width == 2 else 0)
        share = self.trained / (workers if stage else 1)
        bandwidth = device(self.node, training.gpus_per_worker, training.cpus_per_worker).bandwidth
        if training.offload_optimizer and training.gpus_per_worker:
            bandwidth = self.node.host_bandwidth * GB / min(workers, max(1, self.node.gpus))
        return 42 * share / (bandwidth * self.assumptions.memory_efficiency)

    @property
    def trained(self) -> int:
        """The number of parameters that are trained."""
        lora = self.config.lora
        return self.model.parameters if lora is None else self.model.lora_parameters(lora.rank, lora.targets)

    def _link_bandwidth(self, processes: int, inside: bool = False) -> float:
        """The bandwidth that collectives reach, bytes/s.

        Inside a node it is that of NVLink. A ring over several nodes passes the network of each node once.

        Args:
            processes: The number of processes that communicate.
            inside: Whether they certainly share a node.
        """
        node, efficiency = self.node, self.assumptions.link_efficiency
        if not node.gpus:
            return (node.host_bandwidth if inside or processes <= node.cpus else node.network) * GB * efficiency
        if inside or processes <= node.gpus:
            return node.gpu_link * GB * efficiency
        return min(node.gpu_link, node.network) * GB * efficiency
