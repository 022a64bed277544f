"""What an infra team does: `ray start`, then `ray job submit` of training and of evaluation, for real."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml
from processes import carriers, free_ports, wait_for
from tiny import tiny_tree

pytestmark = pytest.mark.timeout(2400)
ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture(scope="module")
def cluster():
    """The address for job submission of a Ray cluster of this test's own, and the environment to use it in."""
    mark = f"AFT_RAY_TEST_{uuid.uuid4().hex}"
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    environment |= {
        mark: "1",
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    gcs, dashboard, agent, client, metrics, runtime = free_ports(6)
    start = [
        "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}", "--node-ip-address=127.0.0.1",
        "--num-cpus=8", f"--object-store-memory={256 << 20}", "--disable-usage-stats", f"--temp-dir={temporary}",
    ]  # fmt: skip
    with open(f"{temporary}/start.log", "w") as log:
        head = subprocess.Popen(RAY + start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: takes_jobs(url), 400, "the job server", head, Path(temporary) / "start.log")
        yield url, environment
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            for process in carriers(mark):
                try:
                    os.kill(process, stop)
                except ProcessLookupError:
                    continue
            time.sleep(2)
        head.wait(30)
        assert carriers(mark) == []
        shutil.rmtree(temporary, ignore_errors=True)


def takes_jobs(url: str) -> bool:
    try:
        with urlopen(f"{url}/api/jobs/", timeout=5) as answer:
            assert json.load(answer) == []
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """What is uploaded: the package and its jobs, nothing else."""
    directory = tmp_path_factory.mktemp("job") / "work"
    for name in ("aft_ray", "jobs"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def submit(cluster, package, *entrypoint) -> tuple[int, str]:
    address, environment = cluster
    command = [*RAY, "job", "submit", f"--address={address}", f"--working-dir={package}", "--", "python", *entrypoint]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(cluster, package, tiny_model, tmp_path_factory) -> tuple[Path, str]:
    """The run directory of a run that was submitted as a job, and the job's log."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    tree = tiny_tree(run_dir, tiny_model, data={"train_limit": 16, "test_limit": 4})
    (package / "tiny.yaml").write_text(yaml.safe_dump(tree))
    status, log = submit(cluster, package, "jobs/train.py", "tiny.yaml", "sampling.k=2")
    assert status == 0, log
    return run_dir, log


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


def test_a_submitted_mistake_fails_with_its_sentence(cluster, package, trained):
    status, log = submit(cluster, package, "jobs/train.py", "tiny.yaml", "sampling.k=0")
    assert status != 0
    assert "error: sampling.k=0" in log
    assert "Traceback" not in log


def test_a_serve_config_file_deploys_the_run(cluster, trained, tmp_path):
    """The file for clusters, with what is particular to a cluster put in."""
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
