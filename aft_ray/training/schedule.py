"""The schedule of a round: its objective, its passes, and where its steps lie on the learning rate's curve.

Round 0 (VFT) has a curve of its own. All later rounds share one curve, so the learning rate falls over the whole run
and not in each round. Each of them has an equally long part of it, as if every question of the round had a group. A
round in which questions have failed or are skipped takes fewer steps, at the beginning of its part; the next round
begins with its own part all the same. Invariant: a rate depends on the config and on the step's number alone, and not
on an optimizer's state or on what was skipped before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aft_ray.config.run import RunConfig
from aft_ray.objectives import Objective, build_objective
from aft_ray.tasks.dataset import round_size
from aft_ray.training.batching import count_steps


@dataclass(frozen=True)
class RoundSchedule:
    """How the groups of one round are trained on.

    Attributes:
        epochs: passes over the groups of the round.
        groups_per_step: groups in one optimiser step, over all ranks.
        first_step: number of the round's first step on the learning rate's curve.
        total_steps: steps of the whole curve.
        warmup: share of the curve's steps in which the learning rate rises.
        shape: `training.schedule`, what follows the warm-up.
        floor: where the curve ends, as a share of its peak.
    """

    objective: Objective
    epochs: int
    groups_per_step: int
    peak_learning_rate: float
    first_step: int
    total_steps: int
    warmup: float
    shape: str
    floor: float

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step of the curve."""
        return learning_rate(
            step, self.total_steps, self.peak_learning_rate, self.warmup, shape=self.shape, floor=self.floor
        )


def round_schedule(config: RunConfig, questions: Mapping[str, int], round_number: int) -> RoundSchedule:
    """The schedule of a round.

    Args:
        questions: for each task, the number of questions that the run trains on.
    """
    vft, training = config.vft, config.training
    size = round_size(config, questions, round_number)
    if round_number == 0:
        return RoundSchedule(
            objective=build_objective("vft"),
            epochs=vft.epochs,
            groups_per_step=vft.questions_per_step,
            peak_learning_rate=vft.learning_rate,
            first_step=0,
            total_steps=count_steps(size, vft.questions_per_step, vft.epochs),
            warmup=training.warmup,
            shape=training.schedule,
            floor=training.min_learning_rate_ratio,
        )
    steps = count_steps(size, training.groups_per_step, training.epochs)
    return RoundSchedule(
        objective=build_objective(config.objective.name, **config.objective.options),
        epochs=training.epochs,
        groups_per_step=training.groups_per_step,
        peak_learning_rate=training.learning_rate,
        first_step=(round_number - 1) * steps,
        total_steps=config.rounds.count * steps,
        warmup=training.warmup,
        shape=training.schedule,
        floor=training.min_learning_rate_ratio,
    )


def learning_rate(
    step: int, total_steps: int, peak: float, warmup: float, *, shape: str = "linear", floor: float = 0.0
) -> float:
    """The learning rate of a step: a linear warm-up over the share `warmup` of the steps, then the curve of `shape`.

    `step` counts from 0. The first step has the rate peak / warm-up steps and not zero, so it is not lost; from then on
    the warm-up is that of transformers' schedulers one step earlier, and what follows it is theirs step by step.

    Args:
        shape: "linear" or "cosine", which fall to `floor` * peak at `total_steps`, or "constant".
        floor: a share of the peak; "constant" does not fall and has none.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    left = max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)
    height = left if shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return peak * (floor + (1 - floor) * height)
