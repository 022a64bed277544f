"""What is published after a round, as it crosses from the train workers to the samplers.

Invariant: a publication carries its own proof. The probes were scored by the trainer with the weights published;
an engine that scores them differently has wrong weights and says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROBES_FILE = "probes.json"


class PublicationFailed(RuntimeError):
    """New weights did not reach an engine, or reached it wrong. Names the engine and the phase."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence and its score under the published weights: mean token log-prob of the response, nats per token."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    score: float


@dataclass(frozen=True, slots=True)
class Publication:
    """Policy version `version`: the model directory that holds it and, while the trainer lives, its shards in memory.

    model: a local or shared directory, in Hugging Face form. shards: file names in it, in loading order.
    objects: the same files as object references, one a shard; empty for the `checkpoint` transport. bytes: of the
    weights; 0 when they were read from disk.
    """

    version: int
    model: str
    shards: tuple[str, ...]
    probes: tuple[Probe, ...]
    objects: tuple[Any, ...] = field(default=())
    bytes: int = 0


def write_probes(directory: str | Path, probes: Sequence[Probe]) -> None:
    (Path(directory) / PROBES_FILE).write_text(json.dumps([asdict(probe) for probe in probes]))


def read_publication(version: int, directory: str | Path) -> Publication:
    """The publication of a model directory on disk. A directory made elsewhere has no probes, and so no proof."""
    directory = Path(directory)
    probes = directory / PROBES_FILE
    return Publication(
        version=version,
        model=str(directory),
        shards=tuple(sorted(path.name for path in directory.glob("*.safetensors"))),
        probes=tuple(Probe(**probe) for probe in json.loads(probes.read_text())) if probes.exists() else (),
    )
