"""The same run over every transport: the same groups, the same models; and a meeting that loses an engine."""

import threading
import time
from dataclasses import replace
from io import StringIO

import pytest
import ray
import torch
from ray.exceptions import RayActorError
from rich.console import Console
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from aft_ray import rounds
from aft_ray.board import start_board
from aft_ray.ledger import Ledger
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run_dir import RunDir
from aft_ray.sampling.meeting import meet
from aft_ray.sampling.pool import SamplerPool
from aft_ray.training.publisher import BoardMeetings
from aft_ray.weights.layout import Layout
from aft_ray.weights.meeting import Guest, Invitation
from aft_ray.weights.publication import read_publication
from aft_ray.weights.transport import Broadcast

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]


def run(model, directory, transport, **sections):
    """A strictly alternating run of one round, in which two versions reach the engine. Returns config and output."""
    config = tiny_config(
        directory / transport,
        model,
        data={"train_limit": 24},
        rounds={"max_staleness": 0},
        weights={"transport": transport, "bucket_mib": 1, "timeout_s": 60},
        **sections,
    )
    output = StringIO()
    with Reporter(RunDir(config.run_dir), Console(file=output, width=400)) as reporter:
        assert rounds.run(config, reporter)
    return config, output.getvalue()


def events(config, name):
    return [event for event in read_events(RunDir(config.run_dir)) if event["event"] == name]


def answers(config):
    groups = Ledger(RunDir(config.run_dir)).read_groups(1)
    return {group.question.id: [candidate.token_ids for candidate in group.candidates] for group in groups}


def weights(config, number):
    directory = RunDir(config.run_dir).local_path(f"rounds/{number:04d}/model")
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


@pytest.fixture(scope="module")
def plain(ray_here, tiny_model, tmp_path_factory):
    return run(tiny_model, tmp_path_factory.mktemp("plain"), "object_store")[0]


@pytest.mark.parametrize("transport", ["checkpoint", "nccl"])
def test_a_run_is_the_same_over_every_transport(plain, tiny_model, tmp_path, transport):
    config, said = run(tiny_model, tmp_path, transport)
    assert answers(config) == answers(plain)
    for number in (0, 1):
        ours, plains = weights(config, number), weights(plain, number)
        assert ours.keys() == plains.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], plains[name], rtol=1e-5, atol=1e-6)
    assert [event["version"] for event in events(config, "published")] == [0, 1]
    streamed = events(config, "streamed")
    assert [event["version"] for event in streamed] == ([0, 1] if transport == "nccl" else [])
    for event in events(config, "published"):
        assert event["bytes"] == sum(
            tensor.nbytes for name, tensor in weights(config, 0).items() if "lm_head" not in name
        )
        assert event["probe_difference"] < config.score_tolerance
        assert (event["rendezvous_s"] > 0) is (transport == "nccl")
    assert "did not reach" not in said


def answers_still(actor) -> bool:
    try:
        ray.get(actor.status.remote(), timeout=30)
    except RayActorError:
        return False
    return True


class Killing:
    """A trainer's meetings, at which an engine's process is killed on its way."""

    def __init__(self, board, victim) -> None:
        self.meetings, self.victim, self.ends = BoardMeetings(board, 300), victim, []

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
    board = start_board()
    pool = SamplerPool.start(config, str(tiny_model), 1, None, None)
    try:
        pool.wait_ready(2)
        meetings = Killing(board, pool.actors[1])
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = Broadcast(meetings, 0, torch.float32, 1 << 20, 8, gpu=False)
        publication = trainer.describe(read_publication(1, tiny_model), [], model)
        ray.get(board.publish.remote(publication))
        delivering = threading.Thread(target=trainer.deliver, args=(model, 1))
        delivering.start()
        began = time.monotonic()
        met = meet(board, pool, publication, 1)
        assert time.monotonic() - began < 60
        delivering.join(60)
        assert not delivering.is_alive()
        assert "phase 'rendezvous': sampler 1 did not come within 8 s" in str(meetings.ends[0])
        assert met.loaded == []
        assert met.missed[1].startswith("sampler 1")
        assert met.missed[0].startswith("sampler 0 did not get through phase 'rendezvous' of publishing version 1: ")
        assert met.missed[0].endswith("weights.timeout_s (8 s a phase) sets the deadline")
        # The directory serves whoever is there; the meeting is not held twice.
        assert meet(board, pool, publication, 1).missed == []
        assert {one.version for one in pool.load(publication)} == {1}
        assert ray.get(pool.actors[0].status.remote())["version"] == 1
    finally:
        pool.close()


def test_a_version_that_nobody_asks_for_lets_the_trainer_go_on(tiny_model):
    """As when rounds need no samples: the conductor waits for a later version, and the trainer for nobody."""
    board = start_board()
    publication = replace(read_publication(1, tiny_model), meeting=Layout.of(["a"], [(1,)], "float32", 1))
    ray.get(board.publish.remote(publication))
    waiting = board.wait_invitation.remote(1, 60)
    later = board.wait_publication.remote(3, 60)
    assert ray.get(waiting, timeout=30) is None
    # The train workers start again: what they publish from disk is met by nobody.
    invited = board.invite.remote(Invitation(2, (Guest("sampler 0", 1),)), 60)
    assert ray.get(invited, timeout=30) is None
    offered = replace(publication, version=3)
    ray.get(board.publish.remote(offered))
    assert ray.get(later, timeout=30)[0].version == 3
    invited = board.invite.remote(Invitation(3, (Guest("sampler 0", 1),)), 60)
    assert ray.get(board.wait_invitation.remote(3, 60), timeout=30).world_size == 2
    ray.get(board.publish.remote(replace(offered, meeting=None)))
    assert ray.get(invited, timeout=30) is None
