"""Mistakes in the arguments of `aft-ray serve` are reported before anything starts."""

import importlib
import socket
from datetime import date
from pathlib import Path

import pytest
import yaml
from instruct import instruct_model
from tiny import tiny_tree

from aft_ray.cli import main
from aft_ray.config.serve import load_serve_config, parse_serve_config
from aft_ray.serving.model import resolve

JOBS = Path(__file__).parents[2] / "jobs"


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def untrained_run(tmp_path, tiny_model):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tiny_tree(run_dir, tiny_model)))
    return str(run_dir)


def test_other_machines_are_served_only_with_keys_or_when_told_so(capsys, tiny_model, monkeypatch):
    monkeypatch.delenv("AFT_RAY_API_KEYS", raising=False)
    said = refused(capsys, str(tiny_model), "task.task=arithmetic", "--host", "0.0.0.0")
    assert "no keys" in said
    assert "access.keys_file" in said


def test_a_port_in_use_is_named(capsys, tiny_model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"port {port}" in refused(capsys, str(tiny_model), "task.task=arithmetic", "--port", port)


def test_each_mistake_about_the_model_is_one_sentence(capsys, tiny_model, untrained_run, tmp_path):
    assert "name the task" in refused(capsys, str(tiny_model))
    assert "is not a directory" in refused(capsys, str(tmp_path / "none"), "task.task=arithmetic")
    assert "needs a run directory" in refused(capsys, str(tiny_model), "--follow", "task.task=arithmetic")
    assert "no trained round yet" in refused(capsys, untrained_run)
    assert "has no version 7" in refused(capsys, f"{untrained_run}@7")
    assert "leave @7 out" in refused(capsys, f"{untrained_run}@7", "--follow")
    assert "leave task out" in refused(capsys, untrained_run, "task.task=gsm8k")
    assert "lower it to at most 160" in refused(capsys, str(tiny_model), "task.task=arithmetic")


def test_each_mistake_in_the_config_names_the_key(capsys, tiny_model, tmp_path):
    model = [str(tiny_model), "task.task=arithmetic"]
    assert "did you mean answering.strategy?" in refused(capsys, *model, "answering.strateg=vote")
    assert "answering.strategy='best'" in refused(capsys, *model, "answering.strategy=best")
    assert "answering.n (8) is more than limits.n (4)" in refused(capsys, *model, "limits.n=4")
    assert "cannot read the config file" in refused(capsys, *model, "--config", str(tmp_path / "none.yaml"))


def test_the_files_for_clusters_are_configs_of_a_service():
    (served,) = yaml.safe_load((JOBS / "serve_deploy.yaml").read_text())["applications"]
    module, _, name = served["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert parse_serve_config(served["args"]).follow
    assert load_serve_config("RUN", JOBS / "serve.yaml", []).model == "RUN"


def test_a_model_directory_is_served_as_its_task_says_and_without_its_own_code(tiny_model, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    config = load_serve_config(tiny_model.name, None, ["task.task=gsm8k", "engine.max_length=160", "name=mine"])
    served, manifest = resolve(config)
    assert (served.name, served.model, manifest) == ("mine", str(tiny_model.resolve()), None)
    assert not served.run.model.trust_remote_code
    assert list(served.run.task_configs) == ["gsm8k"]


def test_a_model_directory_is_asked_as_the_config_of_the_service_says(tmp_path, capsys, untrained_run):
    directory = str(instruct_model(tmp_path / "chat", "chatml"))
    task = ["task.task=arithmetic", "engine.max_length=160"]
    keys = ["chat_template_kwargs.enable_thinking=false", "system_prompt=Be brief.", "template_date=2020-02-29"]
    model = resolve(load_serve_config(directory, None, [*task, *keys]))[0].run.model
    assert (model.chat_template_kwargs, model.system_prompt) == ({"enable_thinking": False}, "Be brief.")
    assert model.template_date == date(2020, 2, 29)
    # Without a day, all processes of the service have that of its start.
    assert resolve(load_serve_config(directory, None, task))[0].run.model.template_date == date.today()
    capsys.readouterr()
    said = refused(capsys, directory, *task, "chat_template_kwargs.style=terse")
    assert "error: chat_template_kwargs has style" in said
    said = refused(capsys, directory, *task, "chat_template=never", "system_prompt=Be brief.")
    assert "error: system_prompt needs a chat template, and chat_template=never" in said
    assert "leave system_prompt out" in refused(capsys, untrained_run, "system_prompt=Be brief.")
