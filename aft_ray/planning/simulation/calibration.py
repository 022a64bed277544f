"""Assumptions that are read from a run: the lengths and verdicts of its answers, and the speeds of its processes.

Invariant: they come from the first sampled round alone, so that the later rounds can check the simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.objectives import build_objective
from aft_ray.observe.summary import read_events
from aft_ray.planning.simulation.assumptions import SimulationAssumptions
from aft_ray.planning.simulation.simulate import simulate
from aft_ray.planning.simulation.trainer import pass_cost
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.records import Group, Verdict
from aft_ray.storage.versions import find_run, read_config
from aft_ray.training.batching import group_size

# Times that speeds are corrected by what a simulation of the round takes.
_CORRECTIONS = 4


def assumptions_like(argument: str) -> dict[str, Any]:
    """The values of `SimulationAssumptions` that follow from a run directory.

    Raises:
        ConfigError: there is no run, or no round of it was sampled and trained.
    """
    found = find_run(argument)
    if found is None:
        raise ConfigError(f"{argument} is not a run directory; --like takes one")
    run_dir, config = found[0], read_config(found[0])
    first: dict[str, dict[str, Any]] = {}
    for event in read_events(run_dir):
        if event["event"] == "sampled" or (event["event"] == "trained" and event["round"] > 0):
            first.setdefault(event["event"], event)
        elif event["event"] == "published":
            first[event["event"]] = event
    if not {"sampled", "trained"} <= first.keys() or first["sampled"]["round"] != first["trained"]["round"]:
        raise ConfigError(f"{run_dir.uri()} has no round yet that was sampled and trained; name a run that has")
    groups = Ledger(run_dir).read_groups(first["sampled"]["round"])
    answers = like_answers(groups)
    trained = {"publish_s": first["trained"]["publish_s"], "pass_s": 0.0, "optimizer_s": 0.0, "questions": len(groups)}
    loads = {"load_s": first["published"]["seconds"]} if "published" in first else {}
    tree = {**answers, **trained, **loads, "train_tokens_per_s": 1.0}
    objective = build_objective(config.objective.name, **config.objective.options)
    cost = pass_cost(config, SimulationAssumptions(**tree), [group_size(group, objective) for group in groups], 1)
    tree["train_tokens_per_s"] = cost.seconds / first["trained"]["train_s"]
    return {**tree, **_like_speeds(config, tree, first["sampled"]["seconds"], first["trained"]["train_s"])}


def like_answers(groups: Sequence[Group]) -> dict[str, float]:
    """The parameters of `draw_work` that describe the lengths and verdicts of groups with candidates."""
    lengths = [[max(1, len(one.token_ids)) for one in group.candidates] for group in groups]
    logs = [np.log(of_one) for of_one in lengths]
    variance = float(np.var(np.concatenate(logs)))
    within = float(np.mean([np.var(of_one, ddof=1) if len(of_one) > 1 else 0.0 for of_one in logs]))
    right = [[one.verdict is Verdict.RIGHT for one in group.candidates] for group in groups]
    rates, k = np.array([np.mean(of_one) for of_one in right]), max(len(of_one) for of_one in right)
    rate = float(np.mean(rates))
    # The variance of a question's rate is p (1 - p) (1 + (k - 1) spread) / k.
    chance = rate * (1 - rate)
    spread = (float(np.var(rates)) / chance * k - 1) / (k - 1) if chance and k > 1 else 0.0
    return {
        "prompt_tokens": max(1, round(np.mean([len(group.prompt_token_ids) for group in groups]))),
        "reference_tokens": max(1, round(np.mean([len(group.reference_token_ids) for group in groups]))),
        "response_tokens": max(1, round(np.mean([length for of_one in lengths for length in of_one]))),
        "length_spread": min(3.0, variance**0.5),
        "length_shared": min(1.0, max(0.0, 1 - within / variance)) if variance else 0.0,
        "pass_rate": rate,
        "pass_spread": min(0.99, max(0.0, spread)),
    }


def _like_speeds(config: RunConfig, tree: dict[str, Any], sampling_s: float, train_s: float) -> dict[str, float]:
    """Speeds with which a simulated first round takes as long as the real one.

    The parts of an engine's step keep their proportions.
    """
    once = config.model_copy(update={"rounds": config.rounds.model_copy(update={"count": 1, "evaluate_every": 0})})
    speeds = {
        name: getattr(SimulationAssumptions(), name)
        for name in ("step_ms", "step_us_per_sequence", "prefill_tokens_per_s")
    }
    fixed = {"overhead_s": min(SimulationAssumptions().overhead_s, sampling_s / 2), "forward_ms": 0.1}
    speeds["train_tokens_per_s"] = tree["train_tokens_per_s"]
    for _ in range(_CORRECTIONS):
        simulated = simulate(once, SimulationAssumptions(**{**tree, **fixed, **speeds}))
        slower = (sampling_s - fixed["overhead_s"]) / (simulated.sampled[0].seconds - fixed["overhead_s"])
        speeds["step_ms"] *= slower
        speeds["step_us_per_sequence"] *= slower
        speeds["prefill_tokens_per_s"] /= slower
        speeds["train_tokens_per_s"] *= simulated.trained[0].train_s / train_s
    return {**fixed, **speeds}
