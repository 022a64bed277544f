"""The `aft-ray` command: help, dry runs, the state of a run, and one sentence for every mistake."""

import subprocess
import sys

import pytest
import yaml
from commands import command
from tiny import tiny_config, tiny_tree

from aft_ray.config.loader import config_difference
from aft_ray.config.run import load_config, parse_config
from aft_ray.run.resume import adopt_config
from aft_ray.storage.groups.group_files import write_group_file
from aft_ray.storage.ledger import CheckpointRecord, FailedQuestion, Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks.dataset import load_tokenizer, questions_of_round, tokenize_split


@pytest.fixture
def file(tmp_path, tiny_model):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run", tiny_model)))
    return path


@pytest.fixture
def begun(tmp_path, tiny_model):
    """The run directory of a run whose driver died in the middle of round 1."""
    config = tiny_config(tmp_path / "run", tiny_model, rounds={"count": 2})
    run_dir = RunDir(config.run_dir)
    adopt_config(config, run_dir)
    ledger = Ledger(run_dir)
    groups = tokenize_split(config, "train", load_tokenizer(config)).groups[:10]
    ledger.commit(write_group_file(run_dir, groups))
    ledger.complete_sampling(0, 0, {})
    train(run_dir, ledger, 0)
    ledger.commit(write_group_file(run_dir, questions_of_round(config, groups, 1)[:4]))
    ledger.record_failed(FailedQuestion(1, groups[5].question.id, "no reason", 3))
    return run_dir


def train(run_dir, ledger, number):
    run_dir.write_json(f"{run_dir.checkpoint(number)}/state.json", {})
    run_dir.write_manifest(run_dir.checkpoint(number), run_dir.hash_files(run_dir.checkpoint(number)))
    ledger.record_checkpoint(CheckpointRecord(number, 1, run_dir.checkpoint(number), True))
    event = f'{{"event": "trained", "round": {number}, "groups": 10, "loss": 0.25, "train_s": 3.0}}'
    run_dir.append_line("metrics.jsonl", event)


def test_help_names_every_command_and_its_examples():
    said = command("--help")
    assert all(name in said for name in ("train", "evaluate", "status", "keys"))
    assert "--dry-run" in command("train", "--help")
    assert "aft-ray evaluate runs/gsm8k" in command("evaluate", "--help")


def test_keys_lists_every_key_with_default_and_meaning():
    said = command("keys")
    assert "  training.learning_rate (default 2e-05): peak" in said
    assert "  model.name (required): " in said


def test_a_dry_run_prints_the_resolved_config_and_the_placement(file, tmp_path):
    said = command("train", file, "sampling.samplers=3", "training.learning_rate=2e-5", "--dry-run")
    resolved, placement = said.split("# placement")
    assert config_difference(load_config(file), parse_config(yaml.safe_load(resolved))) == [
        "sampling.samplers: 1 -> 3",
        "training.learning_rate: 0.0005 -> 2e-05",
    ]
    assert "# 3 samplers x 1 CPU 0 GPU" in " ".join(placement.split())
    assert "# in all 6 CPU 0 GPU" in " ".join(placement.split())
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_deepspeeds_configuration_and_refuses_unknown_keys_of_it(file):
    said = command("train", file, "training.zero_stage=2", "training.deepspeed.prescale_gradients=true", "--dry-run")
    resolved, shown = said.split("# DeepSpeed's configuration\n")
    assert yaml.safe_load(resolved)["training"]["deepspeed"] == {"prescale_gradients": True}
    config = yaml.safe_load("\n".join(line.removeprefix("# ") for line in shown.splitlines()))
    assert (config["zero_optimization"]["stage"], config["prescale_gradients"]) == (2, True)
    mistaken = command("train", file, "training.deepspeed.prescale_gradient=true", "--dry-run", status=2)
    assert "does not know training.deepspeed.prescale_gradient; did you mean prescale_gradients?" in mistaken


def test_a_mistake_in_the_config_is_one_sentence(file, tmp_path):
    assert "did you mean training.learning_rate?" in command("train", file, "training.learning_rat=1", status=2)
    assert "sampling.k=0" in command("train", file, "sampling.k=0", status=2)
    assert "cannot read the config file" in command("train", tmp_path / "none.yaml", status=2)


def test_a_model_that_cannot_be_trained_is_one_sentence(file, tmp_path, tiny_model):
    nowhere = tmp_path / "nowhere"
    assert f"model.name={nowhere} is not a directory" in command("train", file, f"model.name={nowhere}", status=2)
    said = command("train", file, "model.max_length=4096", f"run_dir={tmp_path / 'other'}", status=2)
    assert "model.max_length (4096" in said
    assert "160 tokens" in said
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "no .safetensors file" in command(
        "train", file, f"model.name={pickled}", f"run_dir={tmp_path / 'third'}", status=2
    )


def test_a_wrong_command_line_is_refused(file):
    done = subprocess.run([sys.executable, "-m", "aft_ray.cli", "train"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Missing argument" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_run_directory_is_refused(tmp_path):
    assert "is not a run directory" in command("status", tmp_path, status=2)
    assert "--config must name the task" in command("evaluate", tmp_path, status=2)


def test_a_damaged_config_of_a_run_is_one_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: {x}/run")
    assert f"{tmp_path}/config.yaml is not valid YAML" in command("status", tmp_path, status=2)


def test_a_run_goes_on_only_with_the_config_it_was_started_with(file, begun):
    said = command("train", file, "rounds.count=2", "sampling.k=5", "seed=3", status=2)
    assert "started with another config (seed: 0 -> 3; sampling.k: 3 -> 5)" in said


def test_a_run_that_is_being_worked_on_is_refused(file, begun):
    with begun.lock():
        assert "is in use by process" in command("train", file, "rounds.count=2", status=1)
        assert "working: " in command("status", begun.uri())


def test_the_status_of_a_run_that_stopped_says_where_it_is_and_how_to_go_on(begun):
    said = command("status", begun.uri())
    assert "trained: 0 of rounds up to 2" in said
    assert "round 1: 4 groups sampled, 1 failed question" in said
    assert "no driver is running; run the same command again to continue" in said
    assert "0.2500" in said


def test_the_status_of_a_run_that_has_not_begun(tmp_path, tiny_model):
    config = tiny_config(tmp_path / "run", tiny_model)
    adopt_config(config, RunDir(config.run_dir))
    assert "trained: no round yet of rounds up to 1" in command("status", config.run_dir)
    assert "no trained round yet" in command("evaluate", config.run_dir, status=2)


def test_the_status_of_a_finished_run_names_the_model(begun, file):
    ledger = Ledger(begun)
    for number in (1, 2):
        train(begun, ledger, number)
    assert f"finished: 2 rounds; the model is in {begun.uri('rounds/0002/model')}" in command("status", begun.uri())
    assert "Nothing to do" in command("train", file, "rounds.count=2")
    assert "no version 7; it has published: 0, 1, 2" in command("evaluate", f"{begun.uri()}@7", status=2)
