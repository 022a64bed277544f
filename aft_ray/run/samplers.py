"""The samplers of a run, as the orchestrator uses them: with GPUs of their own, or on those of the train workers.

Invariant: after `load` every sampler that answers holds the version, verified by its probes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from aft_ray.cluster.colocated_placement import EnginePlacement
from aft_ray.config.run import RunConfig
from aft_ray.coordination.client import CoordinatorClient
from aft_ray.coordination.colocation import Colocation
from aft_ray.inference.versioned_engine import UpdateReport
from aft_ray.observe.reporter import Reporter
from aft_ray.sampling.broadcast import broadcast_version
from aft_ray.sampling.sampler_health import HealthChange, SamplersFailed
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.storage.run_dir import LOGS, RunDir
from aft_ray.weights.version_manifest import VersionManifest, WeightsMissed


class LoadingPool(Protocol):
    """A pool of samplers, as far as `load_or_wait` uses it."""

    def load(self, manifest: VersionManifest) -> list[UpdateReport]:
        """Loads a version into the samplers that answer."""
        ...


class NoSamplers:
    """The samplers of a run that neither samples nor evaluates."""

    def load(self, manifest: VersionManifest) -> None:
        """Does nothing."""
        del manifest

    def release(self) -> None:
        """Does nothing."""


class RunSamplers:
    """The samplers of a run that samples or evaluates. Colocated samplers start when the first version is loaded.

    Args:
        coordinator: the coordinator's actor.
        eos_token_ids: the tokens that end a response.
    """

    def __init__(
        self, config: RunConfig, run_dir: RunDir, reporter: Reporter, coordinator: Any, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._config, self._run_dir, self._reporter = config, run_dir, reporter
        self._coordinator, self._eos_token_ids = coordinator, eos_token_ids
        self._client: CoordinatorClient[VersionManifest] = CoordinatorClient.of_actor(coordinator)
        self._pool: SamplerPool | None = None
        self._colocation: Colocation[SamplerPool] | None = None
        if config.sampling.colocate:
            self._colocation = Colocation(config, self._client, self._start)
        else:
            self._pool = self._start(None)

    @property
    def pool(self) -> SamplerPool:
        """The samplers that hold the version which was loaded last."""
        assert self._pool is not None, "colocated samplers were used before a version was loaded"
        return self._pool

    def wait_ready(self) -> None:
        """Waits until as many samplers answer as the run needs; colocated ones start later. Raises SamplersFailed."""
        if self._colocation is None:
            self.pool.wait_ready()

    def load(self, manifest: VersionManifest) -> None:
        """Loads a version into the samplers that answer: by its broadcast, if it has one, then by its receive plan.

        Raises:
            SamplersFailed: fewer samplers answer than the run needs.
            WeightUpdateFailed: an engine did not load the version, or the version's probes do not verify.
        """
        if self._colocation is not None:
            try:
                self._pool = self._colocation.acquire(manifest.version + 1)
            except ValueError as error:
                raise SamplersFailed(str(error)) from None
        started = time.monotonic()
        reports = []
        if manifest.broadcast is not None:
            processes = self._config.sampling.processes_per_sampler
            broadcast = broadcast_version(self._coordinator, self.pool, manifest, processes)
            for sentence in broadcast.missed:
                self._reporter.say(f"version {manifest.version} did not reach every engine by broadcast: {sentence}")
            reports += broadcast.loaded
            if not all(status.version == manifest.version for status in self.pool.statuses()):
                wait_until_durable(manifest, self._client, self._config.rounds.timeout_s, self._reporter.say)
        # Samplers that the broadcast reached report that they hold the version already.
        reports += load_or_wait(self.pool, manifest, self._client, self._config.rounds.timeout_s, self._reporter.say)
        slowest = max(reports, key=lambda report: report.seconds)
        if slowest.seconds > 0:
            self._reporter.event(
                "published",
                version=manifest.version,
                seconds=time.monotonic() - started,
                bytes=manifest.bytes,
                rendezvous_s=slowest.rendezvous_s,
                fetch_s=slowest.fetch_s,
                load_s=slowest.load_s,
                prove_s=slowest.verify_s,
                probe_difference=max(report.probe_difference for report in reports),
            )

    def release(self) -> None:
        """Releases the train workers' GPUs, if the samplers use them."""
        if self._colocation is not None:
            self._colocation.release()

    def close(self) -> None:
        """Ends the samplers."""
        if self._colocation is not None:
            self._colocation.close()
        elif self._pool is not None:
            self._pool.close()

    def _start(self, placements: tuple[EnginePlacement, ...] | None) -> SamplerPool:
        log_dir = str(self._run_dir.local_path(LOGS)) if self._run_dir.is_local else None
        # Without round 0 the given model is version 0 already when the engines start from it.
        version = None if self._config.vft.epochs else 0
        return SamplerPool.start(
            self._config,
            self._config.model.name,
            self._eos_token_ids,
            log_dir,
            version,
            report_changes(self._reporter),
            placements,
            self._coordinator,
        )


def load_or_wait(
    pool: LoadingPool,
    manifest: VersionManifest,
    coordinator: CoordinatorClient[VersionManifest],
    timeout_s: float,
    say: Callable[[str], None],
) -> list[UpdateReport]:
    """Loads a version into the samplers that answer. If its weights are lost, waits for the model directory.

    They are lost when train workers end that held them in memory; those that start again train the version again.

    Raises:
        PeerFailed: the directory was not complete within `timeout_s`, or training has failed.
        WeightUpdateFailed: an engine did not load the version.
    """
    try:
        return pool.load(manifest)
    except WeightsMissed:
        if manifest.durable:
            raise
        wait_until_durable(manifest, coordinator, timeout_s, say)
        return pool.load(manifest.once_durable())


def wait_until_durable(
    manifest: VersionManifest,
    coordinator: CoordinatorClient[VersionManifest],
    timeout_s: float,
    say: Callable[[str], None],
) -> None:
    """Waits until samplers can read the model directory of a version. Raises PeerFailed."""
    if not manifest.durable and not coordinator.is_durable(manifest.version):
        say(f"version {manifest.version}: samplers wait until its model directory is written")
        coordinator.wait_durable(manifest.version, timeout_s)


def report_changes(reporter: Reporter) -> Callable[[HealthChange], None]:
    """A function that reports when a sampler starts to answer and when one is lost."""

    def report(change: HealthChange) -> None:
        reporter.event("sampler_joined" if change.reason is None else "sampler_lost", **asdict(change))
        reporter.say(change.line)

    return report
