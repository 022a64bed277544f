"""The conductor's part in a meeting: whom to invite, and what became of each.

Invariant: a meeting never fails a run. A sampler that does not come through it is left where it is, without a version,
and takes the model directory like one that was started again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from aft_ray import board
from aft_ray.sampling.phases import GRACE_S
from aft_ray.sampling.pool import SamplerPool, last_line
from aft_ray.sampling.sampler import Loaded
from aft_ray.weights.delivery import FromMeeting
from aft_ray.weights.meeting import Guest, Invitation, Seat
from aft_ray.weights.publication import Publication

# Seconds that a sampler may answer later than the first of them.
_GREETING_S = 10.0


@dataclass(frozen=True, slots=True)
class Met:
    """How the samplers came through a meeting; `missed`: a sentence for each that did not, naming it."""

    loaded: list[Loaded]
    missed: list[str]


def meet(the_board: Any, pool: SamplerPool, publication: Publication, processes: int) -> Met:
    """Brings the samplers to a version through a meeting with the trainer, as far as they come through it.

    processes: of each engine. Raises BoardFailed when the trainer has failed for good.
    """
    assert publication.meeting is not None
    coming = _without(publication.version, pool)
    invitation = Invitation(publication.version, tuple(Guest(f"sampler {index}", processes) for index in coming))
    table = board.call(the_board.invite, invitation, pool.load_timeout_s)
    if table is None:
        return Met([], [])
    calls = {}
    for index, rank in zip(coming, invitation.first_ranks, strict=True):
        seat = Seat(table, rank, invitation.world_size, publication.meeting)
        seated = replace(publication, delivery=FromMeeting(seat))
        calls[index] = pool.actors[index].load.remote(seated, pool.tolerance, pool.load_timeout_s)
    deadline = 4 * (pool.load_timeout_s + GRACE_S)
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=deadline) if calls else ([], [])
    loaded, missed = [], []
    for index, call in calls.items():
        if call not in done:
            missed.append(f"sampler {index} did not come back from the meeting within {deadline:.0f} s")
            continue
        try:
            loaded.append(ray.get(call))
        except RayError as error:
            missed.append(f"sampler {index}: {last_line(str(getattr(error, 'cause', None) or error))}")
    return Met(loaded, missed)


def _without(version: int, pool: SamplerPool) -> list[int]:
    """The samplers that answer, and hold another version."""
    calls = [actor.status.remote() for actor in pool.actors]
    ray.wait(calls, num_returns=1, timeout=pool.start_timeout_s)  # they may still be starting
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=_GREETING_S)
    coming = []
    for index, call in enumerate(calls):
        if call in done:
            try:
                status = ray.get(call)
            except RayError:
                continue
            if status["version"] != version:
                coming.append(index)
    return coming
