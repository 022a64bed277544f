"""Samplers and train workers in turn on one place: what comes out is what a run with places of their own gives."""

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

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]


def run(directory, model, colocate):
    config = tiny_config(
        directory,
        model,
        rounds={"count": 2, "evaluate_every": 1, "questions_per_round": 16},
        sampling={"colocate": colocate},
        training={"zero_stage": 2},
    )
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        assert rounds.run(config, reporter)
    return RunDir(config.run_dir)


def test_a_colocated_run_equals_the_plain_one_and_nobody_works_out_of_turn(tiny_model, tmp_path):
    shared, plain = run(tmp_path / "shared", tiny_model, True), run(tmp_path / "plain", tiny_model, False)
    for number in (1, 2):
        sampled = [
            {g.question.id: [c.token_ids for c in g.candidates] for g in Ledger(run_dir).read_groups(number)}
            for run_dir in (shared, plain)
        ]
        assert sampled[0] == sampled[1]
        assert len(sampled[0]) == 16
    models = [
        AutoModelForCausalLM.from_pretrained(run_dir.local_path("rounds/0002/model")).state_dict()
        for run_dir in (shared, plain)
    ]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=0, atol=0, msg=name)
    order = [
        (event["event"], event.get("version", event.get("round")))
        for event in read_events(shared)
        if event["event"] in ("published", "evaluated", "sampled", "trained")
    ]
    assert order == [
        ("trained", 0), ("published", 0), ("evaluated", 0), ("sampled", 0),
        ("trained", 1), ("published", 1), ("evaluated", 1), ("sampled", 1),
        ("trained", 2), ("published", 2), ("evaluated", 2),
    ]  # fmt: skip
    # What vLLM says on the CPU, where it has nothing to do: it was put to sleep before each round's training.
    said = shared.read_bytes("logs/sampler-0.log").decode()
    assert said.count("sleep mode is not supported on CPU") == 2 + 2 * 2  # sleeps twice; two parts wake each time
