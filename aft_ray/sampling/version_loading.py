"""Loads a policy version into the samplers that answer.

Invariant: a sampler that ends while it loads is left out, since it must load the version before it answers again; an
engine that is alive and does not take the version fails the update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ray.exceptions import RayActorError, RayError

from aft_ray.cluster.remote_errors import traceback_message
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.sampler_health import SamplerHealth, SamplersFailed, reason_of
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed

# A sampler has a deadline for each of these phases, and these seconds more to reply with the phase that it missed.
_PHASES, _REPLY_S = 3, 30


async def load_version(
    samplers: SamplerHandles, health: SamplerHealth, manifest: VersionManifest
) -> list[UpdateReport]:
    """Loads a version into at least `sampling.min_samplers` of the samplers, and verifies it by its probes.

    Returns:
        How the update went, for each sampler that holds the version now.

    Raises:
        SamplersFailed: too few samplers are left.
        WeightUpdateFailed: an engine that is alive did not take the weights, or not in time.
    """
    loop = asyncio.get_running_loop()
    reports: dict[int, UpdateReport] = {}
    deadline = loop.time() + samplers.start_timeout_s + _PHASES * samplers.load_timeout_s
    while True:
        ready = sorted(await health.wait_for_minimum())
        reports |= await _load_into([i for i in ready if i not in reports], samplers, health, manifest)
        if len(reports) >= samplers.minimum:
            return list(reports.values())
        if loop.time() > deadline:
            raise SamplersFailed(
                f"{len(reports)} samplers reached version {manifest.version} and {samplers.minimum} must "
                f"(sampling.min_samplers); the others ended each time they loaded it"
            )


async def _load_into(
    indexes: Iterable[int], samplers: SamplerHandles, health: SamplerHealth, manifest: VersionManifest
) -> dict[int, UpdateReport]:
    """Loads a version into some samplers at the same time; the result leaves out those that ended."""
    timeout_s = samplers.load_timeout_s
    calls = {
        asyncio.ensure_future(samplers.actors[index].load.remote(manifest, samplers.tolerance, timeout_s)): index
        for index in indexes
    }
    if not calls:
        return {}
    deadline_s = _PHASES * timeout_s + _REPLY_S
    done, late = await asyncio.wait(calls, timeout=deadline_s)
    if late:
        names = ", ".join(f"sampler {index}" for index in sorted(calls[call] for call in late))
        raise WeightUpdateFailed(
            f"{names} did not load version {manifest.version} within {deadline_s:.0f} s"
            f"{samplers.logs_of(calls[call] for call in late)}"
        )
    reports = {}
    for call in sorted(done, key=lambda call: calls[call]):
        index = calls[call]
        try:
            reports[index] = call.result()
        except RayActorError as error:
            health.mark_lost(index, reason_of(error))
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, WeightUpdateFailed):
                raise cause from None
            raise WeightUpdateFailed(
                f"sampler {index} did not load version {manifest.version}: {traceback_message(str(cause))}"
                f"{samplers.logs_of([index])}"
            ) from error
    return reports
