"""However the weights travel, and wherever engines and workers sit: the very same run. And a meeting that fails."""

import os
import signal
import threading
import time
from dataclasses import replace
from io import StringIO

import pytest
import ray
import torch
from processes import descendants
from ray.exceptions import RayActorError
from rich.console import Console
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.coordination.coordinator import start_coordinator
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import orchestrator as rounds
from aft_ray.sampling.broadcast import meet
from aft_ray.sampling.sampler_pool import SamplerPool
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.weight_publisher import CoordinatorBroadcasts
from aft_ray.weights.broadcast.layout import Layout
from aft_ray.weights.publish import Broadcast
from aft_ray.weights.version_manifest import read_version_manifest

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]
ENGINE_PROCESS = "VLLM::Worker"


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run(directory, model, transport, **sampling) -> tuple[RunDir, str]:
    """A strictly alternating run of one round, in which two versions reach the engine, and what it said."""
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
        assert rounds.run(config, reporter)
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


def test_from_storage_to_engines_in_the_train_workers_place_nobody_works_out_of_turn(tiny_model, plain, tmp_path):
    shared, said = run(tmp_path, tiny_model, "checkpoint", colocate=True)
    assert_same_run(shared, plain, 0)
    assert "did not reach" not in said
    assert [event["rendezvous_s"] for event in assert_published(shared)] == [0, 0]
    order = [(event["event"], event["version"]) for event in events(shared, "published", "evaluated", "sampled")]
    assert order == [("published", 0), ("evaluated", 0), ("sampled", 0), ("published", 1), ("evaluated", 1)]
    assert [event["round"] for event in events(shared, "trained")] == [0, 1]
    # What vLLM says on the CPU, where it has nothing to do: it slept while round 1 was trained, then its parts woke.
    log = shared.read_bytes("logs/sampler-0.log").decode()
    assert log.count("sleep mode is not supported on CPU") == 1 + 2


def test_streamed_to_an_engine_of_two_processes_though_one_of_them_is_killed(tiny_model, plain, tmp_path):
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
    # Version 0 was read from the directory if the engine died before it had proven it.
    assert assert_published(two)[1]["rendezvous_s"] > 0
    assert events(two, "streamed")[-1]["version"] == 1
    deadline = time.monotonic() + 60
    while descendants(ENGINE_PROCESS):  # they end with the engine's actor
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_same_run(two, plain, 1e-6)  # two processes add up in another order than one


# ── meetings by themselves ───────────────────────────────────────────────────────────────────────────────────────────


def answers_still(actor) -> bool:
    try:
        ray.get(actor.status.remote(), timeout=30)
    except RayActorError:
        return False
    return True


class Killing:
    """A trainer's meetings, at which an engine's process is killed on its way."""

    def __init__(self, coordinator, victim) -> None:
        self.meetings, self.victim, self.ends = CoordinatorBroadcasts(coordinator, 300), victim, []

    def invitation(self, version):
        return self.meetings.invitation(version)

    def open_table(self, version, port):
        ray.kill(self.victim, no_restart=False)
        while answers_still(self.victim):
            time.sleep(0.1)
        self.meetings.open_table(version, port)

    def ended(self, version, how):
        self.ends.append(how)


def test_a_meeting_that_loses_an_engine_harms_neither_the_trainer_nor_the_others(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run", tiny_model, sampling={"samplers": 2}, weights={"transport": "nccl", "timeout_s": 8}
    )
    coordinator = start_coordinator()
    pool = SamplerPool.start(config, str(tiny_model), 1, None, None)
    try:
        pool.wait_ready(2)
        meetings = Killing(coordinator, pool.actors[1])
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = Broadcast(meetings, 0, torch.float32, 1 << 20, 8, gpu=False)
        manifest = trainer.describe(read_version_manifest(1, tiny_model), [], model)
        ray.get(coordinator.publish.remote(manifest))
        delivering = threading.Thread(target=trainer.deliver, args=(model, 1))
        delivering.start()
        began = time.monotonic()
        met = meet(coordinator, pool, manifest, 1)
        assert time.monotonic() - began < 60
        delivering.join(60)
        assert not delivering.is_alive()
        assert "phase 'rendezvous': sampler 1 did not come within 8 s" in str(meetings.ends[0])
        assert met.loaded == []
        assert met.missed[1].startswith("sampler 1")
        assert met.missed[0].startswith("sampler 0 did not get through phase 'rendezvous' of publishing version 1: ")
        assert met.missed[0].endswith("weights.timeout_s (8 s a phase) sets the deadline")
        # The directory serves whoever is there; the meeting is not held twice.
        assert meet(coordinator, pool, manifest, 1).missed == []
        assert {one.version for one in pool.load(manifest)} == {1}
        assert ray.get(pool.actors[0].status.remote()).version == 1
    finally:
        pool.close()


def test_a_version_that_nobody_asks_for_lets_the_trainer_go_on(tiny_model):
    """As when rounds need no samples: the conductor waits for a later version, and the trainer for nobody."""
    coordinator = start_coordinator()
    manifest = replace(read_version_manifest(1, tiny_model), broadcast=Layout.of(["a"], [(1,)], "float32", 1))
    ray.get(coordinator.publish.remote(manifest))
    waiting = coordinator.wait_invitation.remote(1, 60)
    later = coordinator.wait_version.remote(3, 60)
    assert ray.get(waiting, timeout=30) is None
    # The train workers start again: what they publish from disk is met by nobody.
    invited = coordinator.invite.remote(BroadcastGroup(2, (Receiver("sampler 0", 1),)), 60)
    assert ray.get(invited, timeout=30) is None
    offered = replace(manifest, version=3)
    ray.get(coordinator.publish.remote(offered))
    assert ray.get(later, timeout=30)[0].version == 3
    invited = coordinator.invite.remote(BroadcastGroup(3, (Receiver("sampler 0", 1),)), 60)
    assert ray.get(coordinator.wait_invitation.remote(3, 60), timeout=30).world_size == 2
    ray.get(coordinator.publish.remote(replace(offered, broadcast=None)))
    assert ray.get(invited, timeout=30) is None
