"""The result of a simulation: the times of every round, and the utilisation that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from aft_ray.planning.simulation.trainer import RoundTrainingTimes


@dataclass(frozen=True, slots=True)
class RoundSamplingTimes:
    """When and how a round was sampled; `started` and `ended` are seconds from the start of the run.

    Attributes:
        waited_s: seconds for which the samplers waited for the version.
        load_s: seconds until every engine that answers held the version.
        evaluate_s: seconds of the evaluation before the round.
        tail_s: seconds from 95 % of the questions answered to the last.
        parked: questions that failed.
        full: generated tokens as a share of what the engines generate with `max_num_seqs` sequences each.
        busy: share of the engines' time in which they had a sequence.
    """

    round: int
    version: int
    staleness: int
    waited_s: float
    load_s: float
    evaluate_s: float
    started: float
    ended: float
    tail_s: float
    questions: int
    parked: int
    tokens: int
    full: float
    busy: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True, slots=True)
class Simulated:
    """The result of a simulated run.

    Attributes:
        gpus: GPUs of the engines and of the train workers.
        forwarding: share of the sampling time for which the one forwarding process was busy.
        stopped: why the run ended before its last round; None: it did not.
        curve: pairs of a second and the share of the engines' `max_num_seqs` sequences that were running then.
    """

    sampled: list[RoundSamplingTimes]
    trained: list[RoundTrainingTimes]
    seconds: float
    gpus: int
    sampler_failures: int
    trainer_failures: int
    forwarding: float
    stopped: str | None
    curve: list[tuple[float, float]] = field(repr=False)

    @property
    def round_s(self) -> list[float]:
        """Seconds from one publication to the next, the first from the run's start."""
        return [after - before for before, after in pairwise([0.0, *(one.published for one in self.trained)])]

    @property
    def steady_s(self) -> float:
        """Mean seconds of the rounds after the first; of the first when there is no other."""
        seconds = self.round_s
        return float(np.mean(seconds[1:] or seconds)) if seconds else math.nan

    @property
    def samplers_busy(self) -> float:
        """Share of the run for which an engine had a sequence, mean over the engines."""
        return sum(one.busy * one.seconds for one in self.sampled) / self.seconds if self.seconds else 0.0

    @property
    def trainers_busy(self) -> float:
        """Share of the run for which a train worker computed."""
        return sum(one.busy * one.train_s for one in self.trained) / self.seconds if self.seconds else 0.0
