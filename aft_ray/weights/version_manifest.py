"""The version manifest: what a published policy version consists of, as train workers hand it to the samplers.

Invariant: a manifest says how to verify its version. The trainer scored the probes with the weights that it published;
an engine whose scores differ has wrong weights, and its update fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from aft_ray.config.run import RunConfig
from aft_ray.storage.run_dir import MANIFEST, RunDir, RunDirError, local_model
from aft_ray.weights.adapter import ADAPTER_FILES
from aft_ray.weights.receive_plan import BroadcastOffer, EngineCall, FromAdapter, FromDirectory, ReceivePlan

PROBES_FILE = "probes.json"


class WeightUpdateFailed(RuntimeError):
    """New weights did not reach an engine, or are wrong there. The message names the engine and the phase."""


class WeightsMissed(WeightUpdateFailed):
    """New weights did not arrive at an engine. It works again after the next update."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence and its score under the published weights: mean token log-prob of the response, nats per token."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """Policy version `version`: the model directory that holds it, and how engines may take it faster.

    Attributes:
        model: a Hugging Face model directory, local or shared, or its URI in a run directory on an object store.
        shards: the names of its weight files, in loading order.
        probes: sequences that verify an engine's weights.
        receive_plan: how an engine receives the weights; None: from the directory.
        broadcast: the trainer's offer to send the weights to engines that run; None: it offers no broadcast.
        bytes: size of the weights; 0 when the manifest was read from disk.
        adapter: vLLM's number of the adapter that the receive plan loads; 0: it loads whole weights.
        durable: whether the model directory was complete when the version was offered. If not, the weights are in the
            trainer's memory, and whoever reads the directory waits until it is complete.
    """

    version: int
    model: str
    shards: tuple[str, ...]
    probes: tuple[Probe, ...]
    receive_plan: ReceivePlan | None = None
    broadcast: BroadcastOffer | None = None
    bytes: int = 0
    adapter: int = 0
    durable: bool = True

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """The calls that bring the weights into an engine."""
        return (self.receive_plan or FromDirectory(self.model, self.shards, self.durable)).calls(timeout_s)

    def once_durable(self) -> VersionManifest:
        """The manifest that takes the place of this one when the directory is complete and the trainer may be gone."""
        plan = self.receive_plan if self.adapter else None
        return replace(self, receive_plan=plan, broadcast=None, durable=True)

    def verify_probes(self, scores: Sequence[float], tolerance: float, engine: str) -> float:
        """The largest difference between an engine's scores of the probes and the trainer's, nats per token.

        Rounding errors of single tokens average out, so that a score of n tokens may differ by less the larger n is;
        and those of all probes together are known better than that of one. A difference d of a probe is counted as
        d sqrt(n), in nats, which is about as large for every length. One probe may count 10 tolerances, since an
        unlikely token is rounded more than others. The root mean square over P probes, of which each counts at most 5
        tolerances there, may be 1 + 4 / sqrt(P) tolerances.

        Args:
            scores: the engine's scores of the probes, nats per token.
            tolerance: how far the log-probabilities of a token may be apart by rounding, nats (root mean square).

        Raises:
            WeightUpdateFailed: the scores are further apart, or not numbers.
        """
        differences = [abs(score - probe.score) for score, probe in zip(scores, self.probes, strict=True)]
        if not differences:
            return 0.0
        counts = [
            difference * math.sqrt(len(probe.response_token_ids)) / tolerance
            for difference, probe in zip(differences, self.probes, strict=True)
        ]
        mean = math.sqrt(sum(min(one, 5.0) ** 2 for one in counts) / len(counts))
        # This form of the condition holds for NaN too.
        if not (all(one <= 10 for one in counts) and mean <= 1 + 4 / math.sqrt(len(counts))):
            worst = max(range(len(counts)), key=lambda i: (math.isnan(counts[i]), counts[i]))
            raise WeightUpdateFailed(
                f"{engine} scores the probes of version {self.version} up to {differences[worst]:.2g} nats per token "
                f"away from the trainer over {len(self.probes[worst].response_token_ids)} tokens, which counts "
                f"{counts[worst]:.2g} times weights.tolerance ({tolerance:g}; 10 are allowed; {mean:.2g} over all "
                f"probes, and {1 + 4 / math.sqrt(len(counts)):.2g} are allowed): its weights are wrong, and it answers "
                f"nothing"
            )
        return max(differences)


def write_probes(directory: str | Path, probes: Sequence[Probe]) -> None:
    """Writes the probes into a model directory."""
    (Path(directory) / PROBES_FILE).write_text(json.dumps([asdict(probe) for probe in probes]))


def read_version_manifest(version: int, model: str | Path) -> VersionManifest:
    """The manifest of a model directory. One that this program did not write has no probes to verify it by."""
    directory = Path(local_model(str(model)))
    probes = directory / PROBES_FILE
    return VersionManifest(
        version=version,
        model=str(model),
        shards=tuple(sorted(path.name for path in directory.glob("*.safetensors"))),
        probes=tuple(Probe(**probe) for probe in json.loads(probes.read_text())) if probes.exists() else (),
    )


def with_adapter(manifest: VersionManifest, directory: str, share_objects: bool = False) -> VersionManifest:
    """The manifest of a version whose engines load its adapter in place of whole weights.

    Args:
        directory: the adapter's directory or URI.
        share_objects: also puts the adapter's files into Ray's object store.
    """
    import numpy as np
    import ray

    paths = [Path(local_model(directory), name) for name in ADAPTER_FILES] if share_objects else []
    contents = [np.fromfile(path, dtype=np.uint8) for path in paths]
    number = manifest.version + 1  # vLLM counts from 1, and version 0 may have an adapter too
    receive_plan = FromAdapter(directory, number, tuple(map(ray.put, contents)))
    return replace(manifest, receive_plan=receive_plan, adapter=number, bytes=sum(one.nbytes for one in contents))


def given_manifest(config: RunConfig) -> VersionManifest:
    """Version 0 of a run without round 0: the given model, from which the engines were started."""
    manifest = read_version_manifest(0, config.model.name)
    return replace(manifest, receive_plan=FromAdapter("", 0)) if config.weights.transport == "lora" else manifest


def stored_manifest(config: RunConfig, run_dir: RunDir, version: int) -> VersionManifest:
    """The manifest of a version in the run directory, with the receive plan of the run's transport.

    Raises:
        RunDirError: the model directory of the version is not complete.
    """
    if not run_dir.is_complete(run_dir.model(version)):
        raise RunDirError(
            f"{run_dir.uri(run_dir.model(version))} has no {MANIFEST}: version {version} was never published completely"
        )
    manifest = read_version_manifest(version, run_dir.uri(run_dir.model(version)))
    if config.weights.transport != "lora":
        return manifest
    return with_adapter(manifest, run_dir.uri(run_dir.adapter(version)))
