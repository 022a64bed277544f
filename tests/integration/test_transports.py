"""Every weight transport and placement leads to the same run; a broadcast that fails harms no other engine."""

import os
import queue
import signal
import threading
import time
from dataclasses import dataclass, field
from io import StringIO

import pytest
import ray
import torch
from processes import descendants
from publications import deliver
from ray.exceptions import RayActorError
from rich.console import Console
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from aft_ray.coordination.coordinator import start_coordinator
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.sampling.broadcast import broadcast_version
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.publication.weight_publisher import CoordinatorControl
from aft_ray.weights.broadcast.sender import Broadcast
from aft_ray.weights.version_manifest import read_version_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]
ENGINE_PROCESS = "VLLM::Worker"


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run(directory, model, transport, **sampling) -> tuple[RunDir, str]:
    """A strictly alternating run of one round, in which two versions reach the engine, and its console output."""
    config = tiny_config(
        directory / "run",
        model,
        rounds={"evaluate_every": 1},
        sampling={"cpus_per_sampler": 2, **sampling},
        training={"zero_stage": 2},
        weights={"transport": transport, "bucket_mib": 1, "timeout_s": 60},
    )
    said = StringIO()
    with Reporter(RunDir(config.run_dir), Console(file=said, width=400)) as reporter:
        assert launch.run(config, reporter)
    return RunDir(config.run_dir), said.getvalue()


@pytest.fixture(scope="module")
def plain(ray_here, tiny_model, tmp_path_factory) -> RunDir:
    return run(tmp_path_factory.mktemp("plain"), tiny_model, "object_store")[0]


def events(run_dir, *names):
    return [event for event in read_events(run_dir) if event["event"] in names]


def weights(run_dir, number):
    return AutoModelForCausalLM.from_pretrained(run_dir.local_path(run_dir.model(number))).state_dict()


def assert_same_run(run_dir, plain, tolerance):
    candidates = [
        {group.question.id: [c.token_ids for c in group.candidates] for group in Ledger(one).read_groups(1)}
        for one in (run_dir, plain)
    ]
    assert candidates[0] == candidates[1]
    assert len(candidates[0]) == 40
    for number in (0, 1):
        ours, plains = weights(run_dir, number), weights(plain, number)
        assert ours.keys() == plains.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], plains[name], rtol=0, atol=tolerance, msg=name)


def assert_published(run_dir):
    published = events(run_dir, "published")
    assert [event["version"] for event in published] == [0, 1]
    size = sum(tensor.nbytes for name, tensor in weights(run_dir, 0).items() if "lm_head" not in name)
    assert all(event["bytes"] == size and event["probe_difference"] < 1e-4 for event in published)
    return published


def test_from_storage_to_engines_on_the_train_workers_gpus_one_side_works_at_a_time(tiny_model, plain, tmp_path):
    shared, said = run(tmp_path, tiny_model, "checkpoint", colocate=True)
    assert_same_run(shared, plain, 0)
    assert "did not reach" not in said
    assert [event["rendezvous_s"] for event in assert_published(shared)] == [0, 0]
    order = [(event["event"], event["version"]) for event in events(shared, "published", "evaluated", "sampled")]
    assert order == [("published", 0), ("evaluated", 0), ("sampled", 0), ("published", 1), ("evaluated", 1)]
    assert [event["round"] for event in events(shared, "trained")] == [0, 1]
    # vLLM logs this on the CPU for each call: two to sleep, while round 1 was trained and after its version was
    # evaluated, and two to wake its parts in between.
    log = shared.read_bytes("logs/sampler-0.log").decode()
    assert log.count("sleep mode is not supported on CPU") == 2 + 2


def test_a_broadcast_to_an_engine_of_two_processes_though_one_of_them_is_killed(tiny_model, plain, tmp_path):
    killed, ended = [], threading.Event()

    def kill() -> None:
        """Kills a process of the engine, which has two, once it answers."""
        while not killed and not ended.wait(0.1):
            if events(RunDir(str(tmp_path / "run")), "sampler_joined"):
                killed.extend(descendants(ENGINE_PROCESS))
                for process in killed[1:]:
                    os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        two, _ = run(tmp_path, tiny_model, "nccl", tensor_parallel_size=2)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 2
    (lost,) = events(two, "sampler_lost")
    assert "its process or node ended" in lost["reason"]
    assert len(events(two, "sampler_joined")) == 2
    # Version 0 was read from the directory if the engine died before its probes were verified.
    assert assert_published(two)[1]["rendezvous_s"] > 0
    assert events(two, "streamed")[-1]["version"] == 1
    deadline = time.monotonic() + 60
    while descendants(ENGINE_PROCESS):  # they end with the engine's actor
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_same_run(two, plain, 1e-6)  # two processes add up in another order than one


# ── broadcasts by themselves ──────────────────────────────────────────────────────────────────────────────────────────


def answers_still(actor) -> bool:
    try:
        ray.get(actor.status.remote(), timeout=30)
    except RayActorError:
        return False
    return True


class KillsBeforeAnnouncing:
    """A coordinator that ends a sampler's process before it passes on the announcement of a broadcast."""

    def __init__(self, coordinator, victim) -> None:
        self.check, self.announce_broadcast = coordinator.check, self
        self.coordinator, self.victim = coordinator, victim

    def remote(self, group, timeout_s):
        ray.kill(self.victim, no_restart=False)
        while answers_still(self.victim):
            time.sleep(0.1)
        return self.coordinator.announce_broadcast.remote(group, timeout_s)


@dataclass(frozen=True)
class RecordingControl(CoordinatorControl):
    """The control of a run, which keeps the results instead of posting them."""

    results: list = field(default_factory=list)

    def report(self, version, result):
        self.results.append(result)


def test_a_broadcast_that_loses_an_engine_harms_neither_the_trainer_nor_the_others(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run", tiny_model, sampling={"samplers": 2}, weights={"transport": "nccl", "timeout_s": 8}
    )
    coordinator = start_coordinator()
    pool = SamplerPool.start(config, str(tiny_model), (1,), None, None)
    try:
        pool.wait_ready(2)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        control = RecordingControl(coordinator, 300, 0, 1, 300)
        trainer, probes = Broadcast(control, 1 << 20, 8, gpu=False), read_version_manifest(1, tiny_model).probes
        offered: queue.Queue = queue.Queue()

        def offer(manifest) -> None:
            ray.get(coordinator.publish.remote(manifest))
            offered.put(manifest)

        transferring = threading.Thread(
            target=deliver, args=(trainer, model, tmp_path / "model", 1, probes), kwargs={"offered": offer}
        )
        transferring.start()
        manifest = offered.get(timeout=60)
        began = time.monotonic()
        result = broadcast_version(KillsBeforeAnnouncing(coordinator, pool.actors[1]), pool, manifest, 1)
        assert time.monotonic() - began < 60
        transferring.join(60)
        assert not transferring.is_alive()
        assert "phase 'rendezvous': sampler 1 did not join within 8 s" in str(control.results[0])
        assert result.loaded == []
        assert result.missed[1].startswith("sampler 1")
        assert result.missed[0].startswith("sampler 0 did not get through phase 'rendezvous' of publishing version 1: ")
        assert result.missed[0].endswith("weights.timeout_s (8 s a phase) sets the deadline")
        # Every sampler that answers reads the directory; there is no second broadcast of a version.
        again = broadcast_version(coordinator, pool, manifest, 1)
        assert again.missed == ["the train workers do not offer the broadcast of version 1 any more"]
        assert {one.version for one in pool.load(manifest)} == {1}
        assert ray.get(pool.actors[0].status.remote()).version == 1
    finally:
        pool.close()
