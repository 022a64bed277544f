"""The failures of a simulated run: processes that end and nodes that are lost, at random times.

Invariant: the times depend on the seed and on the number of the source of failures alone.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aft_ray.config.run import RunConfig
from aft_ray.planning.simulation.assumptions import SimulationAssumptions
from aft_ray.planning.simulation.questions import EVALUATION_STAGE


class CanFail(Protocol):
    """A simulated sampler, or the simulated train workers."""

    def fail(self, noticed_s: float, back_s: float) -> None:
        """The process ends now; others notice it after `noticed_s`, and it works again after `back_s`."""
        ...


@dataclass(frozen=True, slots=True)
class FailureSource:
    """A process or a node that fails repeatedly.

    Attributes:
        mean_s: mean seconds from one failure to the next.
        victims: the processes that end then, each with the seconds until it works again.
        noticed_s: seconds until others notice the failure.
    """

    mean_s: float
    victims: Sequence[tuple[CanFail, float]]
    noticed_s: float


def gpus_of(config: RunConfig) -> tuple[int, int]:
    """GPUs of all engines, and of all train workers. Without GPUs each process counts as one, since it can fail."""
    sampling, training = config.sampling, config.training
    return sampling.samplers * sampling.processes_per_sampler, training.workers


def failure_sources(
    config: RunConfig, assumed: SimulationAssumptions, samplers: Sequence[CanFail], trainer: CanFail
) -> list[FailureSource]:
    """One source for each engine, one for the train workers together, and one for each node."""
    sampling, training = gpus_of(config)
    each = sampling // len(samplers)
    sources: list[FailureSource] = []
    if assumed.mtbf_hours:
        hour = 3600 * assumed.mtbf_hours
        sources += [FailureSource(hour / each, [(sampler, assumed.start_s)], 0.0) for sampler in samplers]
        sources.append(FailureSource(hour / training, [(trainer, assumed.trainer_start_s)], 0.0))
    if assumed.node_mtbf_hours:
        back = assumed.node_back_s
        for node in range(math.ceil((sampling + training) / assumed.gpus_per_node)):
            gpus = range(node * assumed.gpus_per_node, (node + 1) * assumed.gpus_per_node)
            lost = sorted({gpu // each for gpu in gpus if gpu < sampling})
            victims: list[tuple[CanFail, float]] = [(samplers[index], back + assumed.start_s) for index in lost]
            if any(sampling <= gpu < sampling + training for gpu in gpus):
                victims.append((trainer, back + assumed.trainer_start_s))
            sources.append(FailureSource(3600 * assumed.node_mtbf_hours, victims, assumed.notice_s))
    return sources


async def fail_repeatedly(source: FailureSource, seed: int, number: int) -> None:
    """Has a source fail at exponentially distributed intervals, for ever."""
    rng = np.random.default_rng([seed, EVALUATION_STAGE, number])
    while True:
        await asyncio.sleep(rng.exponential(source.mean_s))
        for victim, back_s in source.victims:
            victim.fail(source.noticed_s, back_s)
