"""A plan as tables for a person and as JSON for a program.

Invariant: every number in a table stands beside the formula that gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aft_ray.cluster.reservations import Split
from aft_ray.planning.plan.assumptions import PlanAssumptions
from aft_ray.planning.plan.plan import RunPlan
from aft_ray.planning.plan.planner import describe
from aft_ray.planning.plan.publish_time import sizes
from aft_ray.planning.plan.quantities import GB, Quantity, QuantityTable, duration, gigabytes


def tables(plan: RunPlan) -> list[QuantityTable]:
    """All quantities of a plan, in reading order. Times are left out when the config does not fit the GPUs' memory."""
    found = [_model_table(plan), _trainer_table(plan)]
    if plan.engine is not None:
        found.append(QuantityTable("memory of an engine's process", plan.engine.lines))
    if not plan.fits_memory:
        return found
    found.append(QuantityTable("training a round", plan.training.lines))
    if plan.sampling is not None:
        found.append(QuantityTable("sampling a round, the busiest engine", plan.sampling.lines))
    if plan.evaluation is not None:
        found.append(QuantityTable("evaluating a version, the busiest engine", plan.evaluation.lines))
    found.append(_publish_table(plan))
    found.append(_round_table(plan))
    return [table for table in found if table.quantities]


def _model_table(plan: RunPlan) -> QuantityTable:
    planner = plan.planner
    model, config, work = planner.model, planner.config, planner.work
    quantities = [Quantity("parameters", model.parameters, "", model.parameters_formula())]
    if config.lora is not None:
        trained = model.lora_parameters(config.lora.rank, config.lora.targets)
        targets = len(set(config.lora.targets))
        quantities.append(Quantity("of adapters", trained, "", f"rank {config.lora.rank} on {targets} linear layers"))
    quantities += [
        Quantity("questions a round", work.questions, "", work.counted),
        Quantity("responses of a group", work.responses, "", "1 reference + trained candidates (signal, distinct)"),
        Quantity("tokens of a prompt", work.prompt, "", f"log lengths deviate by {work.prompt_spread:.2f}"),
        Quantity("tokens of a response", work.response, "", f"log lengths deviate by {work.response_spread:.2f}"),
    ]
    return QuantityTable(model.name, tuple(quantities))


def _trainer_table(plan: RunPlan) -> QuantityTable:
    planner, memory = plan.planner, plan.trainer
    training = planner.config.training
    device = "GPU" if training.gpus_per_worker else "process"
    quantities = list(memory.lines)
    verdict = ""
    if training.gpus_per_worker:
        room = planner.cluster.node.gpu_memory * GB
        verdict = f" of {gigabytes(room)}: " + ("fits" if memory.device <= room else "does NOT fit")
    quantities.append(Quantity(f"a train worker's {device}", memory.device, "bytes", f"the sum{verdict}", total=True))
    quantities += [
        Quantity(f"in host memory: {line.label}", line.value, line.unit, line.how) for line in memory.host_lines
    ]
    stage = f"ZeRO-{training.zero_stage}"
    return QuantityTable(f"memory of a train worker's {device}, {stage} over {plan.split.workers}", tuple(quantities))


def _publish_table(plan: RunPlan) -> QuantityTable:
    config = plan.planner.config
    chosen = plan.publish_times[config.weights.transport]
    quantities = [*chosen.trainer_lines, *chosen.engine_lines, *chosen.beside]
    quantities += [
        Quantity(f"by {name} instead", time.engines, "s", "; ".join(line.how for line in time.engine_lines))
        for name, time in plan.publish_times.items()
        if name != config.weights.transport
    ]
    size = gigabytes(sizes(config, plan.planner.model).weights)
    return QuantityTable(f"publication of a version ({size})", tuple(quantities))


def _round_table(plan: RunPlan) -> QuantityTable:
    time, config, planner = plan.time, plan.planner.config, plan.planner
    staleness = config.rounds.max_staleness
    formula = "max(G, T)" if staleness and not config.sampling.colocate else "G + T"
    longer = f"{time.bottleneck} is the longer side"
    sampling = " + ".join(f"{duration(seconds)} {name}" for name, seconds in planner.sampling_parts(plan.split).items())
    published = plan.publish_times[config.weights.transport].trainer
    steps = f"{duration(plan.training.seconds)} steps ({plan.training.tokens_per_s:,.0f} tokens/s)"
    if offload := planner.offload_seconds(plan.split.workers):
        steps += f" + {duration(offload)} to offload and reload the states"
    quantities = [
        Quantity("G, sampling side", time.sampling, "s", sampling or "nothing is sampled"),
        Quantity("T, training side", time.training, "s", f"{steps} + {duration(published)} publication"),
        Quantity("a round", time.round, "s", f"{formula}, rounds.max_staleness={staleness}; {longer}", total=True),
    ]
    if config.vft.epochs:
        quantities.append(Quantity("round 0 (VFT)", plan.vft.seconds, "s", f"{planner.work.vft_steps} steps"))
    cluster = planner.cluster
    quantities.append(
        Quantity("the whole run", plan.seconds, "s", f"round 0 + {config.rounds.count} rounds", total=True)
    )
    if cluster.gpus:
        hours = plan.gpu_hours(plan.seconds)
        quantities.append(Quantity("GPU-hours", hours, "", f"{cluster.gpus} GPUs x {duration(plan.seconds)}"))
        if plan.price_per_gpu_hour is not None:
            cost = hours * plan.price_per_gpu_hour
            quantities.append(Quantity("cost", cost, "", f"{hours:,.1f} GPU-hours x {plan.price_per_gpu_hour:g}"))
    return QuantityTable("a round", tuple(quantities))


def placement_lines(plan: RunPlan) -> list[str]:
    """What the config uses of the cluster, what is idle, and which split would be the fastest."""
    planner, split = plan.planner, plan.split
    cluster, config = planner.cluster, planner.config
    lines = [f"cluster        {cluster}: {cluster.gpus} GPUs, {cluster.cpus:,} CPUs"]
    idle = cluster.gpus - plan.gpus
    state = f"{idle:g} GPUs idle" if idle > 0 else "none idle" if idle == 0 else f"{-idle:g} GPUs MISSING"
    lines.append(f"the config     {describe(config, split)}: {plan.gpus:g} GPUs, {state}")
    if plan.best is None:
        lines.append(f"best split     none fits: {plan.why_no_split_fits}")
        return lines
    best, time = plan.best
    if best == split:
        lines.append(f"best split     this one: a round takes {duration(time.round)}")
        return lines
    if not plan.problems and plan.time.round <= 1.01 * time.round:
        lines.append(f"best split     this one, within 1 % of the fastest: a round takes {duration(plan.time.round)}")
        return lines
    gain = "" if plan.problems else f" instead of {duration(plan.time.round)} ({plan.time.round / time.round:.2f}x)"
    lines.append(
        f"best split     {describe(config, best)}: {planner.reservations(best).gpus:g} GPUs, a round takes "
        f"{duration(time.round)}{gain}"
    )
    lines.append(f"               {' '.join(overrides(plan, best))}")
    return lines


def overrides(plan: RunPlan, split: Split) -> list[str]:
    """The command line's `key=value` overrides that turn the config into one with this split."""
    config = plan.planner.config
    changed = {"sampling.samplers": (config.sampling.samplers, split.samplers or config.sampling.samplers)}
    if split.samplers:
        changed["sampling.tensor_parallel_size"] = (config.sampling.tensor_parallel_size, split.tensor_parallel)
        if config.sampling.gpus_per_sampler >= 1:
            wanted = split.tensor_parallel * config.sampling.pipeline_parallel_size
            changed["sampling.gpus_per_sampler"] = (int(config.sampling.gpus_per_sampler), wanted)
    changed["training.workers"] = (config.training.workers, split.workers)
    return [f"{key}={new}" for key, (old, new) in changed.items() if old != new]


def assumption_rows(assumptions: PlanAssumptions) -> Iterator[tuple[str, str, str]]:
    """Name, value and meaning of every assumption. Those that were given are marked."""
    for name, field in PlanAssumptions.model_fields.items():
        value = getattr(assumptions, name)
        given = " (given)" if name in assumptions.model_fields_set else ""
        yield name, ("none" if value is None else f"{value:g}") + given, field.description or ""


def rendered(plan: RunPlan) -> RenderableType:
    """A plan for the terminal: the splits, the tables and the assumptions."""
    blocks: list[RenderableType] = [Text("\n".join(placement_lines(plan)))]
    for quantities in tables(plan):
        table = Table(title=quantities.title, title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 1))
        table.add_column(min_width=34, no_wrap=True)
        table.add_column(justify="right", min_width=14, no_wrap=True)
        table.add_column(overflow="fold")
        for quantity in quantities.quantities:
            style = "bold" if quantity.total else None
            table.add_row(quantity.label, quantity.text(), quantity.how, style=style)
        blocks += [Text(), table]
    table = Table(
        title="assumed (--assume name=value)", title_justify="left", show_header=False, box=None, padding=(0, 1)
    )
    for row in assumption_rows(plan.planner.assumptions):
        table.add_row(*row)
    blocks += [Text(), table]
    return Group(*blocks)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """All numbers of a plan as plain values, in seconds, bytes and counts."""
    planner = plan.planner
    best = None
    if plan.best is not None:
        best = {"split": asdict(plan.best[0]), "time": asdict(plan.best[1]), "overrides": overrides(plan, plan.best[0])}
    return {
        "config": planner.config.model_dump(mode="json"),
        "cluster": {"nodes": planner.cluster.nodes, "node": planner.cluster.node.model_dump()},
        "assumed": planner.assumptions.model_dump(),
        "model": {**asdict(planner.model), "parameters": planner.model.parameters},
        "work": asdict(planner.work),
        "split": asdict(plan.split),
        "gpus": plan.gpus,
        "idle_gpus": planner.cluster.gpus - plan.gpus,
        "problems": list(plan.problems),
        "trainer": asdict(plan.trainer),
        "engine": asdict(plan.engine) if plan.engine else None,
        "sampling": asdict(plan.sampling) if plan.sampling else None,
        "evaluation": asdict(plan.evaluation) if plan.evaluation else None,
        "training": asdict(plan.training),
        "vft": asdict(plan.vft),
        "publications": {name: asdict(time) for name, time in plan.publish_times.items()},
        "round": {**asdict(plan.time), "bottleneck": plan.time.bottleneck},
        "run_seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours(plan.seconds),
        "best": best,
    }
