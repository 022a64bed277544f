"""The conductor's part in a meeting: whom to invite, and what became of each.

Invariant: a meeting never fails a run. A sampler that does not come through it is left where it is, without a version,
and takes the model directory like one that was started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from aft_ray.coordination.broadcast_group import BroadcastGroup, BroadcastMembership, Receiver
from aft_ray.coordination.coordinator import call
from aft_ray.inference.update_phases import GRACE_S
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.sampling.sampler_health import last_line
from aft_ray.sampling.sampler_pool import SamplerPool, Samplers
from aft_ray.weights.receive_plan import FromBroadcast
from aft_ray.weights.version_manifest import VersionManifest

# Seconds in which a sampler says what it holds.
_GREETING_S = 10.0


@dataclass(frozen=True, slots=True)
class Met:
    """How the samplers came through a meeting; `missed`: a sentence for each that did not, naming it."""

    loaded: list[UpdateReport]
    missed: list[str]


def meet(coordinator: Any, pool: SamplerPool, manifest: VersionManifest, processes: int) -> Met:
    """Brings the samplers that answer to a version through a meeting with the trainer, as far as they come through it.

    processes: of each engine. Raises PeerFailed when the trainer has failed for good, SamplersFailed when too few
    samplers answer.
    """
    assert manifest.broadcast is not None
    ready, samplers = pool.wait_ready(), pool.handles()
    coming = _without(manifest.version, samplers, ready)
    invitation = BroadcastGroup(manifest.version, tuple(Receiver(f"sampler {index}", processes) for index in coming))
    table = call(coordinator.invite, invitation, samplers.load_timeout_s)
    if table is None:
        return Met([], [])
    calls = {}
    for index, rank in zip(coming, invitation.first_ranks, strict=True):
        place = BroadcastMembership(table, rank, invitation.world_size, manifest.broadcast)
        placed = replace(manifest, receive_plan=FromBroadcast(place))
        calls[index] = samplers.actors[index].load.remote(placed, samplers.tolerance, samplers.load_timeout_s)
    deadline = 4 * (samplers.load_timeout_s + GRACE_S)
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=deadline)
    loaded, missed = [], []
    for index, pending in calls.items():
        if pending not in done:
            missed.append(f"sampler {index} did not come back from the meeting within {deadline:.0f} s")
            continue
        try:
            loaded.append(ray.get(pending))
        except RayActorError:
            missed.append(f"sampler {index}: its process or node ended")
        except RayError as error:
            missed.append(last_line(str(getattr(error, "cause", None) or error)))
    return Met(loaded, missed)


def _without(version: int, samplers: Samplers, ready: Sequence[int]) -> list[int]:
    """Those of the samplers that are there and hold another version."""
    calls = {samplers.actors[index].status.remote(): index for index in ready}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_GREETING_S)
    coming = []
    for pending, index in calls.items():
        if pending in done:
            try:
                status = ray.get(pending)
            except RayError:
                continue
            if status.version != version:
                coming.append(index)
    return coming
