"""What is published after a round, as it crosses from the train workers to the samplers.

Invariant: a publication carries its own proof. The probes were scored by the trainer with the weights published;
an engine that scores them differently has wrong weights and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aft_ray.storage.run_dir import local_model
from aft_ray.weights.broadcast.layout import Layout
from aft_ray.weights.receive_plan import EngineCall, FromDirectory, ReceivePlan

PROBES_FILE = "probes.json"


class WeightUpdateFailed(RuntimeError):
    """New weights did not reach an engine, or reached it wrong. Names the engine and the phase."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence and its score under the published weights: mean token log-prob of the response, nats per token."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """Policy version `version`: the model directory that holds it, and any faster way while the trainer lives.

    model: a local or shared directory, in Hugging Face form, or the URI of one in a run directory on an object store.
    shards: file names in it, in loading order. delivery: how an engine gets the weights; None: from the directory.
    meeting: what the trainer would stream to engines that meet it; None: it does not. bytes: of the weights; 0 when
    they were read from disk. adapter: the number of the adapter that the delivery brings; 0: it brings whole weights.
    """

    version: int
    model: str
    shards: tuple[str, ...]
    probes: tuple[Probe, ...]
    receive_plan: ReceivePlan | None = None
    broadcast: Layout | None = None
    bytes: int = 0
    adapter: int = 0

    def calls(self, timeout_s: float) -> Iterator[EngineCall]:
        """What brings the weights into an engine."""
        return (self.receive_plan or FromDirectory(self.model, self.shards)).calls(timeout_s)

    def verify_probes(self, scores: Sequence[float], tolerance: float, engine: str) -> float:
        """The largest difference between an engine's scores of the probes and the trainer's, nats per token.

        Raises WeightUpdateFailed, naming the engine, when it is above the tolerance, or not a number.
        """
        differences = [abs(score - probe.score) for score, probe in zip(scores, self.probes, strict=True)]
        largest = max(differences, key=lambda difference: (difference != difference, difference), default=0.0)
        # Written so that a NaN is a failure too.
        if not largest <= tolerance:
            raise WeightUpdateFailed(
                f"{engine} scores the probes of version {self.version} up to {largest:.2g} nats per token away from "
                f"the trainer (tolerance {tolerance:g}): its weights are wrong and answer nothing"
            )
        return largest


def write_probes(directory: str | Path, probes: Sequence[Probe]) -> None:
    (Path(directory) / PROBES_FILE).write_text(json.dumps([asdict(probe) for probe in probes]))


def read_version_manifest(version: int, model: str | Path) -> VersionManifest:
    """The publication of a model directory on disk, or of a run. One made elsewhere has no probes, and so no proof."""
    directory = Path(local_model(str(model)))
    probes = directory / PROBES_FILE
    return VersionManifest(
        version=version,
        model=str(model),
        shards=tuple(sorted(path.name for path in directory.glob("*.safetensors"))),
        probes=tuple(Probe(**probe) for probe in json.loads(probes.read_text())) if probes.exists() else (),
    )
