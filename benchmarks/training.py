"""Claim: a training step computes what it needs and little else: many times less work and memory than padded rows.

The benchmark takes the same optimiser steps in three ways, on one thread, in turn:

- before: the step of this project before packed rows, frozen in `padded_step.py`;
- TRL: `SFTTrainer`, and `DPOTrainer` with policy and reference model, in an own environment (not with --quick); once
  as it ships, which recomputes activations, and once with activations kept, as the other sides keep them;
- now: the step of `aft_ray.training`.

All take the same model and groups in float32. Before anything is timed, the loss and the norm of the gradient of both
steps of the project must agree; that of SFT must be TRL's. The numbers compared are CPU seconds, which other processes
on the machine change least: a ratio is the median over the repetitions, with the smallest and the largest.

    python benchmarks/training.py --quick              # at most 5 minutes on two cores, no network
    python benchmarks/training.py --json training.json # with TRL, which is installed on the first use; about 15 minutes

The last line that it prints is one JSON object with the ratios.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from training_data import gsm8k_groups, needed_tokens, uniform_groups, write_model
from training_memory import Memory, MemoryTask, measure
from training_sides import LEARNING_RATE, Outcome, Packed, Padded, Side, Task, prepare_process

from aft_ray.objectives import build_objective
from aft_ray.storage.records import Group

TARGETS = {
    "speedup_gsm8k": 1.8,
    "speedup_prompt900": 3.0,
    "memory_ratio_152k": 0.3,
    "memory_k64_over_k4": 1.1,
    "trl_sft": 1.6,
    "trl_dpo": 2.5,
}
VOCABULARY, LARGE_VOCABULARY = 8192, 152_064
RESPONSE = (78, 182)  # tokens
# What TRL does with activations: it recomputes them unless told otherwise, and the step of the project does not.
TRL_SIDES = {"trl": "recomputed", "trl_kept": "kept"}
RANKS, GROUPS_PER_STEP = 8, 64
# Steps of one run of `make demo`: five epochs over 5,000 questions in steps of 32, then three rounds of 1,600 groups.
DEMO_STEPS = {"vft": 5 * -(-5000 // 32), "aft": 3 * 1600 // 32}


@dataclass(frozen=True)
class Regime:
    """Steps of one kind.

    Attributes:
        tasks: the steps; each repetition takes all of them.
        check: a step that both sides take whole, to compare losses and gradients.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    check: Task
    repeats: int


@dataclass(frozen=True)
class Timing:
    """The CPU and wall seconds of all tasks of a regime, one entry per repetition."""

    cpu_s: list[float]
    wall_s: list[float]


@dataclass(frozen=True)
class Ratio:
    """The seconds of a peer divided by those of the step now: the median of the repetitions, and the extremes."""

    median: float
    low: float
    high: float


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer repetitions, without TRL and dpo")] = False,
    only: Annotated[list[str] | None, typer.Option(help="only this regime, or `memory`; may be repeated")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all numbers to this file")] = None,
) -> None:
    """Compare the training step with what it was, and with TRL's."""
    prepare_process()
    results: dict[str, Any] = {"benchmark": "training", "quick": quick, "targets": TARGETS, "regimes": {}, "memory": {}}
    with tempfile.TemporaryDirectory(prefix="aft-ray-benchmark-") as scratch:
        model = write_model(Path(scratch) / "model", vocabulary=VOCABULARY, hidden=384, layers=6, longest=2048)
        chosen = [regime for regime in regimes(quick) if not only or regime.name in only]
        for regimes_of_model, directory in (
            ([one for one in chosen if not one.name.startswith("demo")], model),
            ([one for one in chosen if one.name.startswith("demo")], None),
        ):
            if not regimes_of_model:
                continue
            sides = build_sides(directory or demo_model(Path(scratch)))
            for regime in regimes_of_model:
                peer = None if quick or directory is None else trl_trainer(regime.name)
                results["regimes"][regime.name] = run_regime(regime, sides, peer, model)
        if not only or "memory" in only:
            results["memory"] = measure_memory(Path(scratch), model)
    results["summary"] = summary(results)
    show(results)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))
    typer.echo(json.dumps(results["summary"]))


def regimes(quick: bool) -> list[Regime]:
    """The steps that are timed. Lengths and settings are those that the table in docs/benchmarks.md states."""
    vft, dpo, aft = build_objective("vft"), build_objective("dpo"), build_objective("aft_boundary", beta=0.15)
    batch = uniform_groups(16, 2, VOCABULARY, 0, prompt=(120, 120), response=RESPONSE)
    long_prompts = uniform_groups(2, 7, VOCABULARY, 1, prompt=(900, 900), response=RESPONSE)
    steps = [Task(gsm8k_groups(GROUPS_PER_STEP, 7, VOCABULARY, seed), aft, RANKS) for seed in range(21)]
    demo = uniform_groups(32, 6, demo_vocabulary(), 3, prompt=(45, 75), response=(18, 42))
    tasks = {
        "gsm8k": (steps_at_quantiles(steps, (0.5,) if quick else (0.25, 0.5, 0.75)), 2 if quick else 3),
        "prompt900": ((Task(long_prompts, aft),), 2 if quick else 5),
        "sft": ((Task(batch, vft),), 3 if quick else 7),
        "dpo": ((Task(batch, dpo),), 0 if quick else 5),
        "demo_vft": ((Task(demo, vft),), 10),
        "demo_aft": ((Task(demo, build_objective("aft_boundary", beta=0.3)),), 10),
    }
    titles = {
        "gsm8k": f"AFT, k = 7, GSM8K's lengths, slowest of {RANKS} ranks",
        "prompt900": "AFT, k = 7, prompts of 900 tokens",
        "sft": "VFT, prompts of 120 tokens",
        "dpo": "dpo, k = 2, prompts of 120 tokens",
        "demo_vft": "VFT step of the demo",
        "demo_aft": "AFT step of the demo, k = 6",
    }
    return [
        Regime(
            name,
            titles[name],
            chosen,
            # The share of one of several ranks has other groups on each side; a few whole groups have the same.
            chosen[0] if chosen[0].ranks == 1 else Task(chosen[0].groups[:3], chosen[0].objective),
            repeats,
        )
        for name, (chosen, repeats) in tasks.items()
        if repeats
    ]


def steps_at_quantiles(steps: Sequence[Task], quantiles: Sequence[float]) -> tuple[Task, ...]:
    """Those steps in which the slowest rank gains a typical number of tokens from the new plan.

    All steps are planned by both sides; they are ordered by the ratio of the tokens that their slowest ranks compute.
    """
    ordered = sorted(steps, key=lambda task: max(Padded.tokens_of_ranks(task)) / max(Packed.tokens_of_ranks(task)))
    return tuple(ordered[round(quantile * (len(ordered) - 1))] for quantile in quantiles)


def build_sides(model: Path) -> dict[str, Side]:
    return {"before": Padded(model), "now": Packed(model)}


def demo_model(scratch: Path) -> Path:
    """The untrained model of `make demo`."""
    from jobs.tiny_model import build_tiny_model

    return build_tiny_model(scratch / "demo", 0)


def demo_vocabulary() -> int:
    from jobs.tiny_model import build_tokenizer

    return len(build_tokenizer())


def trl_trainer(regime: str) -> str | None:
    """The trainer of TRL that takes the steps of a regime."""
    return regime if regime in ("sft", "dpo") else None


def check_equal(sides: dict[str, Side], task: Task) -> Outcome:
    """Both sides take one step of a task. Raises RuntimeError unless its loss and gradient norm are the same."""
    before, now = sides["before"].step(task), sides["now"].step(task)
    for what in ("loss", "grad_norm"):
        expected, found = getattr(before, what), getattr(now, what)
        if not math.isclose(expected, found, rel_tol=2e-5):
            raise RuntimeError(f"the {what} of the two steps differs: {expected!r} before, {found!r} now")
    return now


def run_regime(regime: Regime, sides: dict[str, Side], trainer: str | None, model: Path) -> dict[str, Any]:
    """Checks a regime, times it on all sides in turn, and returns its numbers."""
    checked = check_equal(sides, regime.check)
    takes: dict[str, Callable[[], tuple[float, float]]] = {
        name: lambda side=side: seconds([side.step(task) for task in regime.tasks])  # type: ignore[misc]
        for name, side in sides.items()
    }
    peers = []
    if trainer is not None:
        from trl_peer import TrlPeer

        rows = trl_rows(regime.tasks[0].groups)
        for name, activations in TRL_SIDES.items():
            peer = TrlPeer(trainer, activations, model, rows, LEARNING_RATE)
            peers.append(peer)
            first = peer.step()  # not timed: it makes the states of the optimizer
            if trainer == "sft" and not math.isclose(first["loss"], checked.loss, rel_tol=1e-4):
                raise RuntimeError(f"TRL's loss is {first['loss']}, and that of the same batch here {checked.loss}")
            takes[name] = lambda peer=peer: ((answer := peer.step())["cpu_s"], answer["wall_s"])  # type: ignore[misc]
    timings = {name: Timing([], []) for name in takes}
    for repeat in range(regime.repeats):
        names = list(takes)
        for name in names if repeat % 2 == 0 else reversed(names):
            cpu_s, wall_s = takes[name]()
            timings[name].cpu_s.append(cpu_s)
            timings[name].wall_s.append(wall_s)
        spent = ", ".join(f"{name} {timing.cpu_s[-1]:.2f} CPU s" for name, timing in timings.items())
        typer.echo(f"{regime.title}: repetition {repeat + 1} of {regime.repeats}: {spent}")
    for peer in peers:
        peer.close()
    return numbers(regime, timings)


def numbers(regime: Regime, timings: dict[str, Timing]) -> dict[str, Any]:
    """What is shown and written of a regime."""
    needed = sum(needed_tokens(trained_groups(task)) / task.ranks for task in regime.tasks)
    sides = {
        name: {
            **asdict(timing),
            "median_cpu_s": statistics.median(timing.cpu_s),
            "median_wall_s": statistics.median(timing.wall_s),
            "needed_tokens_per_cpu_s": needed / statistics.median(timing.cpu_s),
        }
        for name, timing in timings.items()
    }
    ratios = {name: asdict(ratio(timings[name], timings["now"])) for name in timings if name != "now"}
    slowest = {
        name: sum(max(side.tokens_of_ranks(task)) for task in regime.tasks)
        for name, side in (("before", Padded), ("now", Packed))
    }
    return {
        "title": regime.title,
        "needed_tokens": needed,
        "computed_tokens": slowest,
        "sides": sides,
        "ratios": ratios,
    }


def trained_groups(task: Task) -> list[Group]:
    """The groups with the candidates that the objective trains on: none for VFT, else all of the benchmark's."""
    from dataclasses import replace

    if task.objective.uses_candidates:
        return list(task.groups)
    return [replace(group, candidates=[]) for group in task.groups]


def ratio(peer: Timing, now: Timing) -> Ratio:
    """CPU seconds of a peer over those of the step now, pair by pair."""
    pairs = [theirs / own for theirs, own in zip(peer.cpu_s, now.cpu_s, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def seconds(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """CPU and wall seconds of some steps together."""
    return sum(one.cpu_s for one in outcomes), sum(one.wall_s for one in outcomes)


def trl_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The batch as `trl_steps.py` reads it: the reference, the right candidate and the wrong one."""
    return [
        {
            "prompt": group.prompt_token_ids,
            "responses": [group.reference_token_ids, *(candidate.token_ids for candidate in group.candidates[:2])],
        }
        for group in groups
    ]


def measure_memory(scratch: Path, model: Path) -> dict[str, Any]:
    """Peak memory: before and now at a large vocabulary, and now at two values of k with the same budget."""
    large = write_model(scratch / "large", vocabulary=LARGE_VOCABULARY, hidden=256, layers=2, longest=1024)
    one_group = MemoryTask(
        groups=1, k=7, vocabulary=LARGE_VOCABULARY, prompt=(120, 120), response=(512, 512), budget=4608
    )
    # A piece of the large group and the small groups together fill the budget equally: 2,958 and 3,060 tokens.
    few, many = (
        MemoryTask(groups=groups, k=k, vocabulary=VOCABULARY, prompt=(120, 120), response=(130, 130), budget=3072)
        for groups, k in ((4, 4), (1, 64))
    )
    measured: dict[str, Memory] = {}
    for name, side, directory, task in (
        ("before_152k", "padded", large, one_group),
        ("now_152k", "packed", large, one_group),
        ("now_k4", "packed", model, few),
        ("now_k64", "packed", model, many),
    ):
        measured[name] = measure(side, directory, task)
        typer.echo(f"memory, {name}: {measured[name].peak / 2**20:,.0f} MiB at most")
    return {name: {**asdict(memory), "step": memory.step} for name, memory in measured.items()}


def summary(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of the last line. A regime that was left out has none."""
    found: dict[str, float] = {}
    timed, memory = results["regimes"], results["memory"]
    for name, regime in timed.items():
        found[f"speedup_{name}"] = regime["ratios"]["before"]["median"]
        for side in TRL_SIDES.keys() & regime["ratios"].keys():
            found[f"{side}_{name}"] = regime["ratios"][side]["median"]
    if "demo_vft" in timed and "demo_aft" in timed:
        totals = {
            side: sum(timed[f"demo_{kind}"]["sides"][side]["median_cpu_s"] * DEMO_STEPS[kind] for kind in DEMO_STEPS)
            for side in ("before", "now")
        }
        found["speedup_demo"] = totals["before"] / totals["now"]
    if memory:
        # With weights and states, which both have: without them the ratio would be smaller.
        found["memory_ratio_152k"] = memory["now_152k"]["peak"] / memory["before_152k"]["peak"]
        # Without them, which hide what depends on k.
        found["memory_k64_over_k4"] = memory["now_k64"]["step"] / memory["now_k4"]["step"]
    return {name: round(value, 3) for name, value in found.items()}


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table("", "CPU s", "wall s", "needed tokens/CPU s", "ratio", "smallest", "largest", title="one step")
    for regime in results["regimes"].values():
        for name, side in regime["sides"].items():
            against = regime["ratios"].get(name)
            cells = [f"{against[key]:.2f}" for key in ("median", "low", "high")] if against else ["", "", ""]
            table.add_row(
                f"{regime['title']}: {name}",
                f"{side['median_cpu_s']:.2f}",
                f"{side['median_wall_s']:.2f}",
                f"{side['needed_tokens_per_cpu_s']:,.0f}",
                *cells,
            )
    console.print(table)
    if results["memory"]:
        table = Table("", "at rest, MiB", "peak, MiB", "of the step, MiB", title="memory")
        for name, memory in results["memory"].items():
            table.add_row(name, *(f"{memory[key] / 2**20:,.0f}" for key in ("at_rest", "peak", "step")))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
