"""A run whose directory is on an S3 server: trained, killed, resumed, inspected, evaluated and served, over HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pyarrow.parquet as pq
import pytest
import yaml
from object_store import CREDENTIALS, s3_server
from processes import free_ports
from tiny import tiny_tree

from aft_ray.observe.summary import read_events
from aft_ray.storage import lease
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import METRICS, RunDir, RunDirError, local_model
from aft_ray.weights.adapter import ADAPTER_FILE
from aft_ray.weights.receive_plan import FromAdapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    place = tmp_path_factory.mktemp("s3")
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    with s3_server(str(place / "server.log")) as options:
        yield options
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_S", 0.5)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)


def bucket(options, name) -> RunDir:
    return RunDir(f"s3://bucket/{name}?{options}")


# ── the run directory by itself ──────────────────────────────────────────────────────────────────────────────────────


def test_a_uri_keeps_its_options_behind_its_path(options):
    run_dir = bucket(options, "runs/one")
    assert run_dir.name == "one"
    assert run_dir.uri("a/b") == f"s3://bucket/runs/one/a/b?{options}"
    run_dir.write_bytes("a/b", b"1")
    assert RunDir(run_dir.uri("a")).read_bytes("b") == b"1"
    assert run_dir.listdir() == ["a"]


def test_credentials_in_a_uri_are_refused_without_being_repeated():
    for uri in ("s3://name:hunter2@bucket/run", "s3://bucket/run?access_key=name&secret_key=hunter2"):
        with pytest.raises(RunDirError, match="AWS_SECRET_ACCESS_KEY") as refused:
            RunDir(uri)
        assert "hunter2" not in str(refused.value)


def test_a_bucket_that_is_not_there_is_one_sentence(options):
    with pytest.raises(RunDirError, match=r"cannot use s3://nowhere/x\?.*: .*does not exist.*credentials"):
        RunDir(f"s3://nowhere?{options}").write_bytes("x", b"1")


def test_lines_do_not_rewrite_all_that_came_before(options):
    run_dir, line = bucket(options, "lines"), "x" * 9999
    for _ in range(20):
        run_dir.append_line(METRICS, line)
    sizes = [len(run_dir.read_bytes(f"{METRICS}/{part}")) for part in run_dir.listdir(METRICS)]
    assert len(sizes) == 3
    assert sum(sizes) == 200_000
    assert run_dir.read_lines(METRICS) == [line] * 20


def test_a_model_is_fetched_wherever_its_uri_is_named(options, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "built").mkdir()
    (tmp_path / "built/weights").write_bytes(b"w" * 20_000_000)
    run_dir = bucket(options, "model")
    run_dir.store_directory(tmp_path / "built", "rounds/0001/model")
    fetched = local_model(run_dir.uri("rounds/0001/model"))
    assert fetched.startswith(str(tmp_path / "node"))
    with open(f"{fetched}/weights", "rb") as file:
        assert file.read() == b"w" * 20_000_000
    assert local_model("org/name") == "org/name"


def test_an_adapter_is_fetched_for_the_engine_that_loads_it(options, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / ADAPTER_FILE).write_bytes(b"a" * 1000)
    run_dir = bucket(options, "adapter")
    run_dir.store_directory(tmp_path / "adapter", run_dir.adapter(1))
    (call,) = FromAdapter(run_dir.uri(run_dir.adapter(1)), 2).calls(10)
    number, directory = call.args
    assert number == 2
    assert directory.startswith(str(tmp_path / "node"))
    assert Path(directory, ADAPTER_FILE).read_bytes() == b"a" * 1000


def test_a_second_driver_is_refused_and_the_first_keeps_its_lease(options, quick, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_S", 2.0)  # a renewal takes a while on a busy machine
    run_dir = bucket(options, "lease")
    with run_dir.lock():
        with pytest.raises(RunDirError, match=rf"lease\?.* is in use by process {os.getpid()} on"), run_dir.lock():
            pass
        assert run_dir.in_use_by() == f"process {os.getpid()} on {os.uname().nodename}"
    assert run_dir.in_use_by() is None
    with run_dir.lock():
        pass


def test_a_lease_of_a_dead_driver_is_taken_over_and_a_driver_that_lost_it_learns_so(options, quick):
    run_dir = bucket(options, "lost")
    lost, said = [], []
    with run_dir.lock() as hold:
        hold.on_lost = lost.append
        run_dir.write_json(lease.LEASE, {"mark": "other", "beat": "0", "who": "process 1 on elsewhere"})
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "process 1 on elsewhere has taken" in lost[0]
    assert run_dir.exists(lease.LEASE)  # the other driver has it
    with run_dir.lock(said.append):
        pass
    assert "left in use by process 1 on elsewhere" in said[0]


# ── a whole run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def aft_ray(*arguments) -> list[str]:
    return [sys.executable, "-m", "aft_ray.cli", *arguments]


def finish(command: list[str], cwd) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(options, tiny_model, tmp_path_factory) -> tuple[RunDir, str]:
    """A run that was killed in the middle of sampling and started again, and the output of the second driver."""
    place = tmp_path_factory.mktemp("run")
    run_dir = bucket(options, "runs/whole")
    tree = tiny_tree(place, tiny_model, data={"train_limit": 40, "test_limit": 4}, sampling={"groups_per_file": 8})
    tree["run_dir"] = run_dir.uri()
    (place / "run.yaml").write_text(yaml.safe_dump(tree))
    command = aft_ray("train", "run.yaml")
    with open(place / "first.log", "w") as log:
        first = subprocess.Popen(command, cwd=place, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not run_dir.listdir(run_dir.groups(1)):
        assert first.poll() is None and time.monotonic() < deadline, (place / "first.log").read_text()  # noqa: PT018
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert run_dir.in_use_by() is not None
    return run_dir, finish(command, place)


def test_a_killed_run_goes_on_and_labels_every_question_once(run):
    run_dir, said = run
    assert "watching for 30 s whether it still works" in said
    assert f"the model: {run_dir.uri('rounds/0001/model')}" in said
    ledger = Ledger(run_dir)
    assert ledger.trained_rounds() == [0, 1]
    groups = ledger.read_groups(1)
    assert len({group.question.id for group in groups}) == len(groups) == 40
    for path in (run_dir.model(0), run_dir.model(1), run_dir.checkpoint(1)):
        assert run_dir.verify_manifest(path) == []
    assert run_dir.in_use_by() is None


def test_the_files_that_people_read_of_a_run_exist(run):
    run_dir, _ = run
    names = [event["event"] for event in read_events(run_dir)]
    assert names.count("started") == 2
    assert names.count("trained") == 2
    assert len(run_dir.listdir(METRICS)) == 2  # one part for each driver
    table = pq.read_table(run_dir.full_path(run_dir.groups(1)), filesystem=run_dir.filesystem)
    assert len(table) == 40
    assert any(name.startswith("driver-") for name in run_dir.listdir("logs"))


def test_its_status_is_shown(run, tmp_path):
    run_dir, _ = run
    assert f"the model is in {run_dir.uri('rounds/0001/model')}" in finish(aft_ray("status", run_dir.uri()), tmp_path)


def test_an_evaluation_is_kept_in_it(run, tmp_path):
    run_dir, _ = run
    said = finish(aft_ray("evaluate", run_dir.uri(), "evaluation.k=2"), tmp_path)
    assert "whole@1" in said
    record = run_dir.read_json("evaluations/test-1.json")
    assert record["model"] == run_dir.uri("rounds/0001/model")
    assert "generations-test-1.jsonl" in run_dir.listdir("evaluations")
    assert list(tmp_path.iterdir()) == []


def test_it_is_served_and_followed(run, tmp_path):
    run_dir, _ = run
    (port,) = free_ports(1)
    command = aft_ray("serve", run_dir.uri(), "--follow", "--port", str(port), "answering.n=2")
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, "engine.kv_cache_gib=0.25"], cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 400
        while "Ctrl-C stops it" not in (tmp_path / "log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()  # noqa: PT018
            time.sleep(0.5)
        body = json.dumps({"question": "Tom has 3 apples. how many apples does Tom have?", "max_tokens": 8}).encode()
        request = Request(f"http://127.0.0.1:{port}/v1/reason", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            answered = json.load(answer)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)
    assert (answered["model"], answered["version"]) == ("whole", 1)
