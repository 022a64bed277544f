"""Serves a run's model on this machine for the time of a benchmark."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from aft_ray.cluster.connect import connected
from aft_ray.cluster.reservations import serving_reservations
from aft_ray.config.run import RunConfig
from aft_ray.config.serve import ServeConfig, load_serve_config
from aft_ray.observe.logs import library_output_to
from aft_ray.observe.reporter import Reporter
from aft_ray.serving.model import ServedModel, resolve
from aft_ray.storage.versions import find_run, read_config

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Service:
    """The running service, the run of its model, and the reporter for the results."""

    url: str
    run: RunConfig
    config: ServeConfig
    served: ServedModel
    reporter: Reporter


@contextlib.contextmanager
def service_of(model: str, port: int, overrides: Sequence[str]) -> Iterator[Service]:
    """Serves RUN or RUN@VERSION without API keys while the context is open, with `key.sub=value` overrides.

    Raises typer.BadParameter if `model` is not a run directory.
    """
    found = find_run(model)
    if found is None:
        raise typer.BadParameter(f"{model} is not a run directory")
    config = load_serve_config(model, None, ["access.open=true", *overrides])
    resolved = resolve(config)
    with (
        library_output_to(Path(tempfile.gettempdir()) / "aft-ray-benchmark.log") as console,
        Reporter(None, console) as reporter,
        connected(config.cluster, serving_reservations(config)),
    ):
        from aft_ray.serving.command import running_service

        with running_service(config, resolved, HOST, port, reporter):
            yield Service(f"http://{HOST}:{port}", read_config(found[0]), config, resolved[0], reporter)
