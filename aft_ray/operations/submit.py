"""`aft-ray submit`: a training run as a job of a cluster, by the very `ray job submit` that it prints.

Invariant: what is printed is what is run. A config that cannot work there is refused before anything is sent.
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

from aft_ray.config.run import ConfigError, RunConfig, load_config
from aft_ray.operations.upload import EXCLUDES, checkout, measure_upload, upload_limit
from aft_ray.storage.run_dir import RunDir

# What every process of the job needs, as `cluster.connected` sets it for a Ray that is started here.
JOB_ENVIRONMENT = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONUNBUFFERED": "1"}
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_HERE = {"127.0.0.1", "localhost", "::1"}


class SubmissionFailed(RuntimeError):
    """A job that was not taken, or that ended without success. The message says how to look at it."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job before it is sent. copied: a config from elsewhere, and the name it gets in the working directory."""

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
        """All of it as one line for a shell."""
        line = shlex.join(self.command())
        if self.copied is None:
            return line
        source, target = self.copied
        return f"{shlex.join(['cp', str(source), str(target)])} && {line}"


def plan(
    config: Path,
    overrides: Sequence[str],
    address: str | None,
    working_dir: Path | None,
    forwarded: Sequence[str],
    wait: bool,
) -> Submission:
    """Checks a run's config for a cluster and makes a job of it. Raises ConfigError, one sentence."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError(
            "no cluster is named: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
        )
    parsed = load_config(config, list(overrides))
    directory = (working_dir or checkout() or Path.cwd()).resolve()
    if not (directory / "aft_ray" / "cli.py").is_file():
        raise ConfigError(f"{directory} is no checkout of aft_ray; name one with --working-dir")
    more = _for_the_cluster(parsed, directory, _is_here(address))
    _check_size(directory)
    id = f"{_slug(RunDir(parsed.run_dir).name)}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    source = config.resolve()
    copied = None
    if source.is_relative_to(directory):
        named = source.relative_to(directory)
    else:
        named = Path(f"submitted-{id}.yaml")
        copied = (source, directory / named)
    entrypoint = ("python", "-m", "aft_ray.cli", "train", str(named), *overrides, *more)
    return Submission(address, id, directory, entrypoint, JOB_ENVIRONMENT | _environment(forwarded), copied, wait)


def run(submission: Submission, say: Callable[[str], None]) -> int:
    """Sends the job and, when it is to be waited for, follows it. Returns the job's exit status.

    Raises SubmissionFailed when the cluster does not take it. Interrupted, it leaves the job running and says so.
    """
    if submission.copied is not None:
        shutil.copyfile(*submission.copied)
    program = Path(sys.executable).with_name("ray")
    command = [str(program) if program.exists() else "ray", *submission.command()[1:]]
    try:
        status = subprocess.run(command).returncode
    except KeyboardInterrupt:
        where = f"--address {submission.address} {submission.id}"
        say(f"\nno longer following; the job goes on. See it: ray job logs -f {where}; end it: ray job stop {where}")
        raise
    finally:
        if submission.copied is not None:
            submission.copied[1].unlink(missing_ok=True)
    return _job_status(submission) if submission.wait else status


def _job_status(submission: Submission) -> int:
    """The exit status of an ended job's command; 1 when it has none."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        info = JobSubmissionClient(submission.address).get_job_info(submission.id)
    except (RuntimeError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SubmissionFailed(f"job {submission.id} was not taken by {submission.address}: {reason}") from error
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.FAILED and info.driver_exit_code:
        return int(info.driver_exit_code)
    raise SubmissionFailed(
        f"job {submission.id} is {info.status.value.lower()}: {info.message}; its output: ray job logs --address "
        f"{submission.address} {submission.id}"
    )


def _for_the_cluster(config: RunConfig, directory: Path, here: bool) -> list[str]:
    """Overrides that make paths mean the same there; raises ConfigError for those that cannot."""
    more = []
    if "://" not in config.run_dir and not Path(config.run_dir).expanduser().is_absolute():
        if not here:
            raise ConfigError(
                f"run_dir={config.run_dir} is relative, and a job runs in a directory that goes with it; name storage "
                "that every node sees, such as run_dir=/shared/runs/x or run_dir=s3://bucket/x"
            )
        more.append(f"run_dir={Path(config.run_dir).absolute()}")
    name = config.model.name
    if name.startswith((".", "~")) or (name.count("/") != 1 and not name.startswith("/") and Path(name).is_dir()):
        raise ConfigError(
            f"model.name={name} is a path on this machine only; put the model on storage that every node sees and "
            "give its absolute path, or a hub name"
        )
    for key, task in ((config.task_key(name), entry) for name, entry in config.task_configs.items()):
        path = task.path
        if path is not None and not Path(path).is_absolute() and not _travels(directory, path):
            raise ConfigError(
                f"{key}.path={path} is relative and is not part of what is uploaded; give an absolute path on storage "
                "that every node sees"
            )
    return more


def _travels(directory: Path, path: str) -> bool:
    """Whether a relative path is below the working directory and nothing keeps it out of the upload."""
    place = (directory / path).resolve()
    if not place.exists() or not place.is_relative_to(directory):
        return False
    from ray._private.runtime_env import packaging

    matches = packaging._get_excludes(directory, list(EXCLUDES))
    return not any(
        matches(one) for one in (place, *place.parents) if one != directory and one.is_relative_to(directory)
    )


def _check_size(directory: Path) -> None:
    upload = measure_upload(directory)
    limit = upload_limit()
    if upload.bytes > limit:
        largest = ", ".join(f"{name} ({size >> 20} MiB)" for name, size in upload.largest)
        raise ConfigError(
            f"{directory} would be an upload of {upload.bytes >> 20} MiB and Ray takes {limit >> 20}; keep out what "
            f"the job does not need, in .rayignore: the largest are {largest}"
        )


def _environment(forwarded: Sequence[str]) -> dict[str, str]:
    """NAME or NAME=VALUE as a dict. Secrets are refused: a job's environment can be read by all who see the cluster."""
    environment = {}
    for one in forwarded:
        name, equals, value = one.partition("=")
        if _SECRET.search(name):
            raise ConfigError(
                f"{name} looks like a secret, and everybody who sees the cluster can read a job's environment; give it "
                "to the nodes instead (docs/clusters.md)"
            )
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable here; write {name}=VALUE")
        environment[name] = value if equals else os.environ[name]
    return environment


def _is_here(address: str) -> bool:
    return urlsplit(address if "://" in address else f"//{address}").hostname in _HERE


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"
