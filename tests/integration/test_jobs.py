"""Jobs on a cluster that `ray start` started, submitted with `aft-ray submit` and with `ray job submit`."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml
from local_cluster import RAY, local_cluster
from processes import free_ports, wait_for
from tiny import tiny_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """The job submission address of a Ray cluster for these tests, and the environment for processes that use it."""
    with local_cluster(8) as started:
        log = Path(started.temporary, "start.log")
        wait_for(lambda: takes_jobs(started.dashboard), 400, "the job server", started.head, log)
        yield started.dashboard, started.environment


def takes_jobs(url: str) -> bool:
    try:
        with urlopen(f"{url}/api/jobs/", timeout=5) as answer:
            assert json.load(answer) == []
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A directory to upload, with the package and its jobs and nothing else."""
    directory = tmp_path_factory.mktemp("job") / "work"
    for name in ("aft_ray", "jobs"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def submit(cluster, package, *entrypoint) -> tuple[int, str]:
    address, environment = cluster
    command = [*RAY, "job", "submit", f"--address={address}", f"--working-dir={package}", "--", "python", *entrypoint]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def aft_ray_submit(cluster, package, *arguments) -> tuple[int, str]:
    """The exit status of `aft-ray submit`, and its output, which includes that of Ray and of the job."""
    address, environment = cluster
    command = [sys.executable, "-m", "aft_ray.cli", "submit", *map(str, arguments), "--working-dir", str(package)]
    environment = environment | {"RAY_API_SERVER_ADDRESS": address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory) -> Path:
    """A config outside of the uploaded directory."""
    place = tmp_path_factory.mktemp("run")
    tree = tiny_tree(place / "run", tiny_model, data={"train_limit": 16, "test_limit": 4})
    (place / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def trained(cluster, package, file) -> tuple[Path, str]:
    """The run directory of a run that was submitted as a job, and the job's log."""
    status, log = aft_ray_submit(cluster, package, file, "sampling.k=2")
    assert status == 0, log
    assert sorted(path.name for path in package.iterdir()) == ["aft_ray", "jobs"]  # the copy of the config is gone
    return file.parent / "run", log


def test_a_submitted_training_succeeds_and_its_log_is_ours(trained):
    run_dir, log = trained
    assert "succeeded" in log
    assert f"16 training questions, 0 for validation; run directory {run_dir}" in log
    assert "round 1: sampled 16 groups with version 0" in log
    assert "round 1: trained 1 steps" in log
    assert f"the model: {run_dir}/rounds/0001/model" in log
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["sampling"]["k"] == 2


def test_a_submitted_evaluation_writes_the_result_into_the_run(cluster, package, trained):
    run_dir, _ = trained
    status, log = submit(cluster, package, "jobs/evaluate.py", str(run_dir), "evaluation.k=2")
    assert status == 0, log
    assert "succeeded" in log
    record = json.loads((run_dir / "evaluations" / "test-1.json").read_text())
    assert record["model"] == str(run_dir / "rounds/0001/model")
    assert (record["split"], record["parked"]) == ("test", 0)


def test_a_submitted_mistake_fails_with_its_sentence(cluster, package, file):
    shutil.copy(file, package / "mistake.yaml")
    status, log = submit(cluster, package, "jobs/train.py", "mistake.yaml", "sampling.k=0")
    (package / "mistake.yaml").unlink()
    assert status != 0
    assert "error: sampling.k=0" in log
    assert "Traceback" not in log


def test_a_job_that_fails_there_gives_its_exit_status(cluster, package, file):
    status, log = aft_ray_submit(cluster, package, file, "model.name=/nowhere/model", f"run_dir={file.parent}/other")
    assert status == 2
    assert "error: model.name=/nowhere/model" in log


def test_the_printed_command_is_what_runs(cluster, package, file):
    _, environment = cluster
    arguments = (file, "model.name=/nowhere/model", f"run_dir={file.parent}/other", "--dry-run")
    status, line = aft_ray_submit(cluster, package, *arguments)
    assert status == 0
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "error: model.name=/nowhere/model" in done.stdout + done.stderr
    for copy in package.glob("submitted-*.yaml"):
        copy.unlink()


def test_a_serve_config_file_deploys_the_run(cluster, trained, tmp_path):
    """The config file for clusters, filled in for this cluster."""
    address, environment = cluster
    run_dir, _ = trained
    (port,) = free_ports(1)
    file = yaml.safe_load((ROOT / "jobs/serve_deploy.yaml").read_text())
    file["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = file["applications"]
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    engine = {"replicas": 1, "kv_cache_gib": 0.25}
    application["args"] |= {"model": str(run_dir), "access": {"keys_file": str(keys)}, "engine": engine}
    application["args"] |= {"reasoner": {"replicas": 1}, "answering": {"n": 2, "max_tokens": 16}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(file))
    serve = [sys.executable, "-m", "ray.serve.scripts"]
    done = subprocess.run(
        [*serve, "deploy", str(tmp_path / "serve.yaml"), "--address", address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.dumps({"question": "Tom has 3 apples. how many apples does Tom have?"}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer one"}
    request = Request(f"http://127.0.0.1:{port}/v1/reason", body, headers)
    answered, deadline = None, time.monotonic() + 300
    while answered is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urlopen(request, timeout=60) as answer:
            answered = json.load(answer)
        time.sleep(1)
    assert answered is not None, "the application did not answer"
    assert (answered["model"], answered["version"]) == ("run", 1)
    assert len(answered["candidates"]) == 2
    down = subprocess.run([*serve, "shutdown", "-y", "--address", address], env=environment, timeout=120)
    assert down.returncode == 0
