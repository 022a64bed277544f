"""`aft-ray submit` without a cluster: what it refuses, and the command that it prints."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from aft_ray.config.run import ConfigError
from aft_ray.operations.submit import plan_submission
from aft_ray.operations.upload import measure_upload, upload_limit

ROOT = Path(__file__).parents[2]
ADDRESS = "http://head.example:8265"


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "my run.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "/shared/runs/Gsm 8k", "model": {"name": "/shared/model"}}))
    return path


@pytest.fixture
def project(tmp_path) -> Path:
    """A small checkout."""
    directory = tmp_path / "project"
    for name in ("aft_ray/cli.py", "jobs/run.yaml", "runs/big", "data/small.jsonl", "questions/train.jsonl"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("run_dir: /shared/x\nmodel: {name: org/name}\n")
    return directory


def planned(file, *overrides, address=ADDRESS, working_dir=ROOT, env=(), wait=True):
    return plan_submission(file, list(overrides), address, working_dir, list(env), wait)


def test_the_command_is_one_that_a_shell_reads_back(file):
    submission = planned(file, "data.task=gsm8k", "model.name=org/na me", env=["NCCL_DEBUG=INFO"], wait=False)
    copy, _, submit = submission.shell().partition(" && ")
    assert shlex.split(submit) == submission.command()
    name = f"submitted-{submission.id}.yaml"
    assert shlex.split(copy) == ["cp", str(file), str(ROOT / name)]
    options, _, entrypoint = submit.partition(" -- ")
    assert shlex.split(entrypoint) == ["python", "-m", "aft_ray.cli", "train", name, *(
        "data.task=gsm8k", "model.name=org/na me"
    )]  # fmt: skip
    words = shlex.split(options)
    assert words[words.index("--address") + 1] == ADDRESS
    assert words[words.index("--submission-id") + 1].startswith("Gsm-8k-20")
    assert words[-1] == "--no-wait"
    runtime = json.loads(words[words.index("--runtime-env-json") + 1])
    assert runtime["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert runtime["env_vars"]["RAY_TRAIN_V2_ENABLED"] == "1"
    assert {".git", ".venv", "/runs"} <= set(runtime["excludes"])


def test_a_config_inside_the_checkout_is_not_copied(project):
    submission = planned(project / "jobs/run.yaml", working_dir=project)
    assert submission.copied is None
    assert submission.entrypoint[-1] == "jobs/run.yaml"
    assert submission.shell().startswith("ray job submit --address")


def test_the_address_comes_from_the_environment_in_rays_order(file, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no cluster is named"):
        planned(file, address=None)
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265")
    assert planned(file, address=None).address == "http://second:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:8265")
    assert planned(file, address=None).address == "http://first:8265"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run_dir=runs/x", "run_dir=runs/x is relative.*s3://"),
        ("model.name=./model", "model.name=./model is a path on this machine only"),
        ("model.name=~/model", "is a path on this machine only"),
        ("data.path=elsewhere/gsm8k", "data.path=elsewhere/gsm8k is relative"),
        ("sampling.k=0", "sampling.k=0"),
        ("training.lr=1", "unknown key training.lr"),
    ],
)
def test_what_cannot_work_on_a_cluster_is_refused_before_anything_is_uploaded(file, override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        planned(file, override)


def test_a_run_directory_on_an_object_store_is_fine_and_names_the_job(file):
    assert planned(file, "run_dir=s3://bucket/a/b?region=eu-west-1").id.startswith("b-20")


def test_on_this_machine_a_relative_run_directory_is_made_absolute(file):
    submission = planned(file, "run_dir=runs/x", address="http://127.0.0.1:8265")
    assert submission.entrypoint[-1] == f"run_dir={Path('runs/x').absolute()}"


def test_data_that_is_uploaded_may_have_a_relative_path(project):
    file = project / "jobs/run.yaml"
    planned(file, "data.path=questions/train.jsonl", working_dir=project)
    for excluded in ("data/small.jsonl", "../outside"):
        with pytest.raises(ConfigError, match="not part of what is uploaded"):
            planned(file, f"data.path={excluded}", working_dir=project)


def test_secrets_are_refused(file, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY=x", "MY_PASSWORD=x"):
        with pytest.raises(ConfigError, match="looks like a secret"):
            planned(file, env=[name])
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(ConfigError, match="there is no such variable here"):
        planned(file, env=["NOT_SET_HERE"])


def test_an_upload_that_ray_would_refuse_names_its_largest_files(project):
    with open(project / "weights.bin", "wb") as file:
        file.truncate(upload_limit() + 1)
    with pytest.raises(ConfigError, match=r"upload of \d+ MiB and Ray takes 100.*weights.bin \(100 MiB\)"):
        planned(project / "jobs/run.yaml", working_dir=project)
    (project / ".rayignore").write_text("*.bin\n")
    planned(project / "jobs/run.yaml", working_dir=project)


def test_a_directory_that_is_no_checkout_is_refused(file, tmp_path):
    with pytest.raises(ConfigError, match="is no checkout of aft_ray"):
        planned(file, working_dir=tmp_path)


def test_the_measured_files_are_those_that_ray_packs(project, tmp_path):
    from zipfile import ZipFile

    from ray._private.runtime_env import packaging

    from aft_ray.operations.upload import EXCLUDES

    (project / ".gitignore").write_text("*.log\n")
    (project / "x.log").write_text("x")
    package = str(tmp_path / "package.zip")
    packaging._zip_files(str(project), list(EXCLUDES), package, True)
    packed = [info for info in ZipFile(package).infolist() if not info.is_dir()]
    measured = measure_upload(project)
    assert (measured.files, measured.bytes) == (len(packed), sum(info.file_size for info in packed))
    assert {info.filename for info in packed} == {
        ".gitignore", "aft_ray/cli.py", "jobs/run.yaml", "questions/train.jsonl"
    }  # fmt: skip
