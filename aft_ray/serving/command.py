"""The command `aft-ray serve`: starts the Serve application, reports its progress, and deletes it at the end.

Invariant: a service without keys listens on a loopback address only, unless `access.open=true` is given.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from aft_ray.cluster.compat import start_serve_application
from aft_ray.cluster.connect import connected
from aft_ray.cluster.reservations import serving_reservations
from aft_ray.config.run import ConfigError
from aft_ray.config.serve import ServeConfig
from aft_ray.observe.logs import library_output_to
from aft_ray.observe.reporter import Reporter
from aft_ray.serving.api.proxy import CALLBACK_IMPORT_PATH
from aft_ray.serving.model import Resolved, resolve

APPLICATION = "aft_ray"
# Seconds between two lines about a service that has not started yet.
_STATUS_INTERVAL_S = 15.0


class ServingFailed(RuntimeError):
    """The service did not start, or it was deleted by another program."""


def serve(config: ServeConfig, host: str, port: int, log: Path) -> None:
    """Serves until SIGINT or SIGTERM. Raises ConfigError, or ServingFailed with the reason."""
    config = _open_on_loopback(config, host)
    _check_port_free(host, port)
    resolved = resolve(config)
    # Serve's proxies read this variable if this process starts Ray or Serve.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK_IMPORT_PATH)
    ended = threading.Event()
    with (
        _set_on_signals(ended),
        library_output_to(log) as console,
        Reporter(None, console) as reporter,
        connected(config.cluster, serving_reservations(config)),
    ):
        started = time.monotonic()
        with running_service(config, resolved, host, port, reporter, ended):
            if ended.is_set():
                return
            reporter.say(f"ready after {time.monotonic() - started:.0f} s")
            for line in _usage_lines(config, host, port):
                reporter.say(line)
            _wait_until_ended(ended)
            reporter.say("stopping; questions that are being answered are finished first")


def _open_on_loopback(config: ServeConfig, host: str) -> ServeConfig:
    """Returns the config, with `access.open` set if there are no keys and `host` is a loopback address.

    Raises ConfigError if there are no keys and other machines could reach the service.
    """
    access = config.access
    if access.open or access.keys_file or os.environ.get(access.keys_env):
        return config
    if not _is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and there are no keys: name a file of keys with "
            f"access.keys_file=FILE, set {access.keys_env}, or set access.open=true to let anyone ask"
        )
    return config.model_copy(update={"access": access.model_copy(update={"open": True})})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port_free(host: str, port: int) -> None:
    """Raises ConfigError if the service could not listen at this address."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"port {port} of {host} is in use; choose another with --port") from error
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


@contextlib.contextmanager
def _set_on_signals(ended: threading.Event) -> Iterator[None]:
    """Makes SIGINT and SIGTERM set `ended` while the context is open."""
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running_service(
    config: ServeConfig,
    resolved: Resolved,
    host: str,
    port: int,
    reporter: Reporter,
    ended: threading.Event | None = None,
) -> Iterator[None]:
    """Runs the service on the connected Ray cluster while the context is open.

    The context begins when the service is ready, or when `ended` is set.

    Raises:
        ServingFailed: the service did not start in time.
    """
    ended = ended or threading.Event()
    from aft_ray.serving.app import application

    bound = application(config, resolved)
    reporter.say(f"starting {config.engine.replicas} engine(s) with {config.model}")
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    serve.start(
        http_options={
            "host": host,
            "port": port,
            # Far above the service's own deadline: it only ends requests that the service failed to end itself.
            "request_timeout_s": 2 * config.limits.deadline_s + 60,
        }
    )
    try:
        start_serve_application(bound, APPLICATION)
        deadline = time.monotonic() + config.engine.start_timeout_s
        reported = time.monotonic()
        while not ended.wait(0.5):
            status = serve.status().applications[APPLICATION]
            if status.status == ApplicationStatus.RUNNING:
                break
            if status.status == ApplicationStatus.DEPLOY_FAILED:
                raise ServingFailed(f"the service did not start: {_failure_reason(status)}")
            if time.monotonic() > deadline:
                raise ServingFailed(
                    f"the service was not running after engine.start_timeout_s ({config.engine.start_timeout_s:.0f} s)"
                )
            if time.monotonic() - reported > _STATUS_INTERVAL_S:
                reported = time.monotonic()
                waiting = [name for name, one in status.deployments.items() if one.status != "HEALTHY"]
                reporter.say(f"waiting for {', '.join(waiting)}")
        if not ended.is_set():
            _wait_ready(host, port, config.engine.start_timeout_s)
        yield
    finally:
        # Waits for the questions that are being answered, within each deployment's graceful_shutdown_timeout_s.
        serve.delete(APPLICATION)


def _failure_reason(status: object) -> str:
    """Returns the sentence that says why a deployment did not start, from Serve's message with its stack frames."""
    from aft_ray.cluster.remote_errors import traceback_message

    messages = [one.message for one in status.deployments.values() if one.message]  # type: ignore[attr-defined]
    return traceback_message("\n".join(messages or [status.message]))  # type: ignore[attr-defined]


def _wait_ready(host: str, port: int, timeout_s: float) -> None:
    """Waits until the service answers at its address. Raises ServingFailed if it does not.

    The proxy learns the routes a moment after the application runs. If Serve ran on the cluster before, it may listen
    at another address.
    """
    deadline = time.monotonic() + min(60.0, timeout_s)
    reason = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{_url(host, port)}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            reason = str(error)
            time.sleep(0.2)
    raise ServingFailed(
        f"{_url(host, port)}/ready does not answer ({reason}); if Serve ran on this cluster before, it listens at the "
        f"address of its start: give the same --host and --port"
    )


def _wait_until_ended(ended: threading.Event) -> None:
    """Returns when `ended` is set. Raises ServingFailed if another program deletes the service before."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    while not ended.wait(2.0):
        status = serve.status().applications.get(APPLICATION)
        if status is None or status.status in (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED):
            raise ServingFailed("the service was deleted by another program")


def _url(host: str, port: int) -> str:
    """Returns the URL by which this machine reaches the address that the service listens on."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _metrics_url() -> str:
    """Returns the address of this node's metrics for Prometheus; every other node has an address of its own."""
    import ray

    address = ray.util.get_node_ip_address()
    node = next((node for node in ray.nodes() if node["NodeManagerAddress"] == address), ray.nodes()[0])
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _usage_lines(config: ServeConfig, host: str, port: int) -> list[str]:
    """Returns the lines that tell a user how to use the running service."""
    url = _url(host, port)
    key = "" if config.access.open else ' -H "Authorization: Bearer $KEY"'
    question = '{"question": "Tom has 3 apples and buys 4 more. How many apples does Tom have?"}'
    return [
        f"  web page      {url}/",
        f"  ask           curl {url}/v1/reason{key} -H 'Content-Type: application/json' -d '{question}'",
        f"  OpenAI        base_url={url}/v1",
        f"  API           {url}/docs",
        f"  metrics       {_metrics_url()}",
        "  keys          " + ("none: anyone who can reach the service may ask" if config.access.open else "required"),
        "Ctrl-C stops it.",
    ]
