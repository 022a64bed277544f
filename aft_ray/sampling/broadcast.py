"""The driver's part in a weight broadcast: it chooses the samplers that receive a version, and collects the results.

Invariant: a broadcast never fails a run. A sampler that does not receive the version holds none afterwards, and must
load it from the model directory, like one that has started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from aft_ray.cluster.remote_errors import traceback_message
from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.coordination.coordinator import call
from aft_ray.inference.update_phases import GRACE_S
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.weights.receive_plan import FromBroadcast
from aft_ray.weights.version_manifest import VersionManifest

# Seconds that samplers have to say which version they hold.
_STATUS_TIMEOUT_S = 10.0
# A sampler has a deadline for each of these phases.
_PHASES = 4


@dataclass(frozen=True, slots=True)
class BroadcastResult:
    """How a broadcast reached the samplers.

    Attributes:
        loaded: a report for each sampler that holds the version now.
        missed: a sentence for each sampler that does not, which names it; or the one reason why there was no broadcast.
    """

    loaded: list[UpdateReport]
    missed: list[str]


def broadcast_version(
    coordinator: Any, pool: SamplerPool, manifest: VersionManifest, processes: int
) -> BroadcastResult:
    """Announces the broadcast of a version that the trainer offers, and has the samplers that answer receive it.

    The samplers go on with what they do until every train worker has come to the broadcast.

    Args:
        coordinator: the coordinator's actor.
        processes: the number of processes of each engine.

    Returns:
        The results; `loaded` is empty when the trainer's offer does not stand any more.

    Raises:
        PeerFailed: training has failed for good.
        SamplersFailed: fewer samplers answer than the run needs.
    """
    offer = manifest.broadcast
    assert offer is not None
    ready, samplers = pool.wait_ready(), pool.handles()
    receiving = _without_version(manifest.version, samplers, ready)
    receivers = tuple(Receiver(f"sampler {index}", processes) for index in receiving)
    group = BroadcastGroup(manifest.version, receivers)
    if reason := call(coordinator.announce_broadcast, group, samplers.load_timeout_s):
        return BroadcastResult([], [reason] if receivers else [])
    calls = {}
    for index, first_rank in zip(receiving, group.first_ranks, strict=True):
        plan = FromBroadcast(offer, first_rank, group.world_size)
        actor = samplers.actors[index]
        calls[index] = actor.load.remote(
            replace(manifest, receive_plan=plan), samplers.tolerance, samplers.load_timeout_s
        )
    return _results(calls, _PHASES * (samplers.load_timeout_s + GRACE_S))


def _without_version(version: int, samplers: SamplerHandles, ready: Sequence[int]) -> list[int]:
    """Those of the samplers that answer and do not hold the version."""
    calls = {samplers.actors[index].status.remote(): index for index in ready}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_STATUS_TIMEOUT_S)
    indexes = []
    for pending, index in calls.items():
        if pending in done:
            try:
                status = ray.get(pending)
            except RayError:
                continue
            if status.version != version:
                indexes.append(index)
    return indexes


def _results(calls: dict[int, Any], timeout_s: float) -> BroadcastResult:
    """Waits for the samplers' calls to `load`."""
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    result = BroadcastResult([], [])
    for index, pending in calls.items():
        if pending not in done:
            result.missed.append(f"sampler {index} did not answer within {timeout_s:.0f} s of the broadcast's start")
            continue
        try:
            result.loaded.append(ray.get(pending))
        except RayActorError:
            result.missed.append(f"sampler {index}: its process or node ended")
        except RayError as error:
            result.missed.append(traceback_message(str(getattr(error, "cause", None) or error)))
    return result
