"""The work of `aft-ray submit`: it submits a training run to a cluster with `ray job submit`.

Invariants: the printed command is the one that is run. A config that cannot work on the cluster is refused before
anything is uploaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from aft_ray.cluster.compat import upload_filter
from aft_ray.config.messages import first_line
from aft_ray.config.run import ConfigError, RunConfig, load_config
from aft_ray.operations.upload import EXCLUDES, checkout, measure_upload, upload_limit
from aft_ray.storage.run_dir import RunDir

# Every process of the job needs these variables; `cluster.connect` sets them for a Ray that it starts.
JOB_ENVIRONMENT = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONUNBUFFERED": "1"}
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class SubmissionFailed(RuntimeError):
    """A job was not accepted, or it failed. The message says how to see its output."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that can be submitted.

    Attributes:
        copied: path of a config outside the working directory, and of its copy inside; None: no copy is needed.
        wait: whether to show the output of the job until it ends.
    """

    address: str
    id: str
    working_dir: Path
    entrypoint: tuple[str, ...]
    environment: dict[str, str]
    copied: tuple[Path, Path] | None
    wait: bool

    def command(self) -> list[str]:
        """The arguments of `ray job submit`."""
        runtime = {"env_vars": self.environment, "excludes": list(EXCLUDES)}
        return [
            "ray", "job", "submit", "--address", self.address, "--submission-id", self.id,
            "--working-dir", str(self.working_dir), "--runtime-env-json", json.dumps(runtime),
            *([] if self.wait else ["--no-wait"]), "--", *self.entrypoint,
        ]  # fmt: skip

    def shell(self) -> str:
        """The whole submission as one shell command."""
        line = shlex.join(self.command())
        if self.copied is None:
            return line
        source, target = self.copied
        return f"{shlex.join(['cp', str(source), str(target)])} && {line}"


def plan_submission(
    config: Path,
    overrides: Sequence[str],
    address: str | None,
    working_dir: Path | None,
    forwarded: Sequence[str],
    wait: bool,
) -> Submission:
    """Checks the config of a run and plans the job.

    Args:
        address: URL of the dashboard; None: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS.
        working_dir: checkout to upload; None: this directory, else the checkout of aft_ray.
        forwarded: environment variables of the job as NAME or NAME=VALUE.

    Raises:
        ConfigError: the job cannot work; the message is one sentence.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError(
            "no cluster is named; give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
        )
    parsed = load_config(config, list(overrides))
    directory = (working_dir or checkout() or Path.cwd()).resolve()
    if not (directory / "aft_ray" / "cli.py").is_file():
        raise ConfigError(f"{directory} is no checkout of aft_ray; give one with --working-dir")
    more_overrides = _overrides_for_cluster(parsed, directory, _is_local(address))
    _check_size(directory)
    id = f"{_slug(RunDir(parsed.run_dir).name)}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    source = config.resolve()
    copied = None
    if source.is_relative_to(directory):
        name = source.relative_to(directory)
    else:
        name = Path(f"submitted-{id}.yaml")
        copied = (source, directory / name)
    entrypoint = ("python", "-m", "aft_ray.cli", "train", str(name), *overrides, *more_overrides)
    return Submission(address, id, directory, entrypoint, JOB_ENVIRONMENT | _environment(forwarded), copied, wait)


def run_submission(submission: Submission, say: Callable[[str], None]) -> int:
    """Submits the job and, if `wait` is set, shows its output until it ends. An interrupt leaves the job running.

    Returns:
        The exit status of the job, or of `ray job submit` without `wait`.

    Raises:
        SubmissionFailed: the cluster does not accept the job, or the job ends without an exit status.
    """
    if submission.copied is not None:
        shutil.copyfile(*submission.copied)
    program = Path(sys.executable).with_name("ray")
    command = [str(program) if program.exists() else "ray", *submission.command()[1:]]
    try:
        status = subprocess.run(command).returncode
    except KeyboardInterrupt:
        where = f"--address {submission.address} {submission.id}"
        say(f"\nthe job is still running. To see its output: ray job logs -f {where}. To stop it: ray job stop {where}")
        raise
    finally:
        if submission.copied is not None:
            submission.copied[1].unlink(missing_ok=True)
    return _job_status(submission) if submission.wait else status


def _job_status(submission: Submission) -> int:
    """The exit status of a job that has ended."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        info = JobSubmissionClient(submission.address).get_job_info(submission.id)
    except (RuntimeError, ConnectionError) as error:
        reason = first_line(error)
        raise SubmissionFailed(f"job {submission.id} was not accepted by {submission.address}: {reason}") from error
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.FAILED and info.driver_exit_code:
        return int(info.driver_exit_code)
    raise SubmissionFailed(
        f"job {submission.id} is {info.status.value.lower()}: {info.message}; to see its output: ray job logs "
        f"--address {submission.address} {submission.id}"
    )


def _overrides_for_cluster(config: RunConfig, directory: Path, local: bool) -> list[str]:
    """Overrides that make paths valid on the cluster. Raises ConfigError for a path that cannot be."""
    more = []
    if "://" not in config.run_dir and not Path(config.run_dir).expanduser().is_absolute():
        if not local:
            raise ConfigError(
                f"run_dir={config.run_dir} is relative, and the working directory of a job is deleted with it; give a "
                "path on storage that every node can access, such as run_dir=/shared/runs/x or run_dir=s3://bucket/x"
            )
        more.append(f"run_dir={Path(config.run_dir).absolute()}")
    model = config.model.name
    if model.startswith((".", "~")) or (model.count("/") != 1 and not model.startswith("/") and Path(model).is_dir()):
        raise ConfigError(
            f"model.name={model} is a path on this machine only; put the model on storage that every node can access "
            "and give its absolute path, or give a hub name"
        )
    for name, task in config.task_configs.items():
        path = task.path
        if path is not None and not Path(path).is_absolute() and not _is_uploaded(directory, path):
            raise ConfigError(
                f"{config.task_key(name)}.path={path} is relative and is not part of what is uploaded; give an "
                "absolute path on storage that every node can access"
            )
    return more


def _is_uploaded(directory: Path, path: str) -> bool:
    """Whether a relative path is inside the working directory and not excluded from the upload."""
    file = (directory / path).resolve()
    if not file.exists() or not file.is_relative_to(directory):
        return False
    is_excluded = upload_filter(directory, EXCLUDES)
    inside = [part for part in (file, *file.parents) if part != directory and part.is_relative_to(directory)]
    return not any(is_excluded(part) for part in inside)


def _check_size(directory: Path) -> None:
    """Raises ConfigError if Ray would refuse the upload."""
    upload = measure_upload(directory)
    limit = upload_limit()
    if upload.bytes > limit:
        largest = ", ".join(f"{name} ({size >> 20} MiB)" for name, size in upload.largest)
        raise ConfigError(
            f"{directory} would be an upload of {upload.bytes >> 20} MiB and Ray takes {limit >> 20}; exclude files "
            f"that the job does not need, in .rayignore; the largest are {largest}"
        )


def _environment(forwarded: Sequence[str]) -> dict[str, str]:
    """The variables as a dict. Secrets are refused, because everybody with access to the dashboard can read them."""
    environment = {}
    for variable in forwarded:
        name, equals, value = variable.partition("=")
        if _SECRET.search(name):
            raise ConfigError(
                f"{name} looks like a secret, and everybody with access to the dashboard can read the environment of a "
                "job; give it to the nodes instead (docs/clusters.md)"
            )
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable here; write {name}=VALUE")
        environment[name] = value if equals else os.environ[name]
    return environment


def _is_local(address: str) -> bool:
    """Whether the cluster runs on this machine."""
    return urlsplit(address if "://" in address else f"//{address}").hostname in _LOOPBACK


def _slug(name: str) -> str:
    """The name with only characters that Ray allows in a submission id."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"
