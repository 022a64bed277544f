"""The same run over every transport: the same groups, the same models; and a meeting that loses an engine."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from aft_ray import rounds
from aft_ray.ledger import Ledger
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run_dir import RunDir

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
