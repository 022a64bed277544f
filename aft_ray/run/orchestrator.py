"""The order of a round. The orchestrator is the driver's loop over the rounds of a run.

For each round it waits for the policy version that samples the round, loads that version into the samplers, evaluates
it if that is due, samples the round, and marks the round ready. The train workers' half, in `training/worker.py`:

    wait until the round is ready
    take the round's optimiser steps
    publish the new version: its weights get to the running engines
    begin to write its model directory and to save the training state, while the next round trains;
    the ledger records the round as trained when both are durable

Both halves run at the same time; with `rounds.max_staleness: 1` the driver samples round r + 1 while the workers train
round r. `aft-ray simulate` runs this module with simulated samplers and train workers.

Invariant: a round is sampled by exactly one policy version, which the ledger records before the first question is
asked, and which is at most `rounds.max_staleness` older than the version that the round trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from aft_ray.config.run import RunConfig
from aft_ray.coordination.client import CoordinatorClient
from aft_ray.evaluation.during_run import EvaluationDuringRun
from aft_ray.run.schedule import AwaitVersion, SampleRound, order_of_rounds
from aft_ray.sampling.round import RoundSampling
from aft_ray.storage.ledger import Ledger
from aft_ray.weights.version_manifest import VersionManifest


class Samplers(Protocol):
    """The samplers of a run. They answer with one policy version at a time."""

    def load(self, manifest: VersionManifest) -> None:
        """Loads a version into the samplers that answer. Does nothing in those that hold it already."""
        ...

    def release(self) -> None:
        """Releases the GPUs that the samplers share with train workers, if they share any."""
        ...


@dataclass(frozen=True, slots=True)
class Orchestrator:
    """Runs the rounds of a run in order.

    Args:
        coordinator: the actor through which driver and train workers tell each other of rounds and versions.
        sampling: samples one round and records it in the ledger.
        evaluation: answers the validation split when a version is due for that.
        version_on_disk: the manifest of a version that is in the run directory, or was given.
    """

    config: RunConfig
    ledger: Ledger
    coordinator: CoordinatorClient[VersionManifest]
    samplers: Samplers
    sampling: RoundSampling
    evaluation: EvaluationDuringRun
    version_on_disk: Callable[[int], VersionManifest]

    def run(self, first_round: int) -> None:
        """Runs every round from `first_round` to the last, and evaluates the versions that they publish.

        Raises:
            PeerFailed: training has failed, or did not publish a version in time.
            RunFailed: too many questions of a round could not be sampled.
            SamplersFailed: fewer samplers answer than the run needs.
            WeightUpdateFailed: an engine did not load a version, or the version's probes do not verify.
        """
        rounds = self.config.rounds
        for trained in self.ledger.trained_rounds():
            if trained < first_round:  # train workers whose last training state is damaged go back to such a round
                self.coordinator.set_ready(trained)
        if first_round > 0:
            self.coordinator.publish(self.version_on_disk(first_round - 1))
        for step in order_of_rounds(first_round, rounds.count, rounds.max_staleness):
            if isinstance(step, AwaitVersion):
                manifest, _ = self.coordinator.wait_version(step.version, rounds.timeout_s)
                self._load(manifest)
                self.samplers.release()  # train workers that have started again may still have to train
                continue
            if step.round > 0 and self.config.samples:
                manifest, waited_s = self._wait_for_version(step)
                self._load(manifest)
                self.sampling.sample(step.round, manifest, waited_s)
            else:
                self.sampling.write_references(step.round)
            self.samplers.release()
            self.coordinator.set_ready(step.round)

    def _wait_for_version(self, step: SampleRound) -> tuple[VersionManifest, float]:
        """The version that samples a round, and the seconds waited for it.

        It is the newest one, unless the round was begun with another before the run was interrupted.
        """
        begun_with = self.ledger.policy_version(step.round)
        # Training may have been interrupted before that version was durable: then it trains it again.
        oldest = step.version if begun_with is None else begun_with
        manifest, waited_s = self.coordinator.wait_version(oldest, self.config.rounds.timeout_s)
        if begun_with is not None and begun_with != manifest.version:
            manifest = self.version_on_disk(begun_with)
        self.ledger.record_policy_version(step.round, manifest.version)
        return manifest, waited_s

    def _load(self, manifest: VersionManifest) -> None:
        """Loads a version into the samplers, and evaluates it if that is due."""
        self.samplers.load(manifest)
        self.evaluation.evaluate_if_due(manifest)
