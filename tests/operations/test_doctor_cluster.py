"""The doctor on a cluster of several nodes: healthy, with a node that has every fault, and with a node that dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from local_cluster import local_cluster

pytestmark = pytest.mark.timeout(900)
# Mounts an empty directory in place of the shared one, on one node only. This needs the right to mount.
UNSHARE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$HIDDEN" && exec "$@"', "sh"]


def can_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        ).returncode
        == 0
    )


@pytest.fixture(scope="module")
def cluster():
    with local_cluster(2) as cluster:
        cluster.add_node()
        yield cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_model) -> Path:
    """Shared storage with a model and the config of a run."""
    place = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny_model, place / "model")
    (place / "run.yaml").write_text(json.dumps({"run_dir": f"{place}/runs/x", "model": {"name": f"{place}/model"}}))
    return place


def doctor(cluster, *arguments) -> tuple[int, dict]:
    command = [sys.executable, "-m", "aft_ray.cli", "doctor", *map(str, arguments), "--address", cluster.gcs, "--json"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=400)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def said(record: dict, level: str) -> dict[str, list[tuple[str, str]]]:
    """Nodes and messages of the findings of a level, by check."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in record["findings"]:
        if finding["level"] == level:
            assert level == "ok" or finding["cure"].endswith(".")
            found.setdefault(finding["check"], []).append((finding["node"], finding["message"]))
    return found


def test_a_healthy_cluster_passes_and_nothing_is_left_on_it(cluster, shared):
    before = sorted(shared.rglob("*"))
    status, record = doctor(cluster, shared / "run.yaml")
    assert said(record, "fail") == {}
    assert status == 0
    nodes = [node["name"] for node in record["facts"]["nodes"]]
    assert len(nodes) == 2
    good = said(record, "ok")
    for check in ("versions", "gpus", "clock", "storage", "model", "shm", "ports"):
        assert [node for node, _ in good[check]] == nodes, check
    assert good["gloo"][0][1].startswith(tuple("0123456789"))
    assert "GB/s of bus bandwidth (64 MiB over 2 processes" in good["gloo"][0][1]
    assert sorted(shared.rglob("*")) == before


@pytest.mark.skipif(not can_mount(), reason="needs rights to mount")
def test_every_fault_of_a_node_is_found_and_named(cluster, shared, tmp_path):
    other = tmp_path / "site/ray-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 9.9.9\n")
    # Every Python process of the node sees a clock that is wrong by 300 s.
    (tmp_path / "site/sitecustomize.py").write_text(
        "import time\nright = time.time\ntime.time = lambda: right() + 300\n"
    )
    node = cluster.add_node(
        *UNSHARE,
        HIDDEN=str(shared),
        PYTHONPATH=f"{tmp_path}/site{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    try:
        status, record = doctor(cluster, shared / "run.yaml", "--working-dir", tmp_path)
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)
    assert status == 1
    bad = said(record, "fail")
    (faulty,) = {node for node, _ in bad["versions"]}
    assert bad["versions"] == [(faulty, "ray 9.9.9, here 2.60.0")]
    assert [node for node, _ in bad["model"]] == [faulty]
    assert bad["clock"][0][0] == faulty
    assert bad["clock"][0][1].startswith(("+300.", "+299."))
    # The two others can read each other's files but not those of the faulty node, which can read none.
    unseen = dict(bad["storage"])
    assert len(unseen) == 3
    assert all(faulty in message for node, message in unseen.items() if node != faulty)
    assert set(bad) == {"versions", "model", "clock", "storage"}


def test_a_node_that_dies_during_the_all_reduce_is_named(cluster):
    import ray

    from aft_ray.operations import doctor as module

    ray.init(address=cluster.gcs, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(module.probe_module)
    try:
        nodes = {module._node_name(node): node for node in ray.nodes() if node["Alive"]}
        whole = module.measure_all_reduce("gloo", nodes, 2, timeout_s=60)
        assert (whole.ranks, whole.errors, whole.absent) == (4, {}, ())
        assert whole.bus_bandwidth > 0
        before = {module._node_name(node) for node in ray.nodes()}
        process = cluster.add_node()
        nodes = {module._node_name(node): node for node in ray.nodes() if node["Alive"]}
        (newest,) = nodes.keys() - before
        killer = threading.Timer(20, lambda: os.killpg(process.pid, signal.SIGKILL))
        killer.start()
        started = time.monotonic()
        found = module.measure_all_reduce("gloo", nodes, 1, timeout_s=15, times=10_000)
        assert found.absent == [newest]
        assert time.monotonic() - started < 200
        killer.join()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module.probe_module)
        ray.shutdown()
