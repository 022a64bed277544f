"""A whole run of an instruct model, whose template asks for the date and ends a turn with a token of its own."""

import json
from collections import Counter
from io import StringIO

import pytest
from instruct import FAMILIES, instruct_model
from rich.console import Console
from tiny import tiny_config
from transformers import AutoTokenizer

from aft_ray.config.run import ConfigError
from aft_ray.config.serve import load_serve_config
from aft_ray.evaluation.targets import plan_evaluation
from aft_ray.observe.reporter import Reporter
from aft_ray.run import launch
from aft_ray.serving.model import resolve
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.tasks import build_tasks
from aft_ray.tasks.rendering import Renderer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(900)]

END = FAMILIES["llama3"].end


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    return instruct_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", max_length=256)


def config_of(directory, model, **keys):
    keys = {"max_length": 256, "system_prompt": "Be brief.", **keys}
    sections = {"vft": {"epochs": 4, "learning_rate": 5e-3}, "sampling": {"max_tokens": 48}}
    return tiny_config(directory, model, model=keys, **sections)


def run(config) -> bool:
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        return launch.run(config, reporter)


@pytest.fixture(scope="module")
def finished(instruct, tmp_path_factory):
    """The config of a finished run that was begun on another day."""
    config = config_of(tmp_path_factory.mktemp("runs") / "run", instruct, template_date="2019-07-08")
    assert run(config)
    return config


def test_the_end_of_the_turn_is_asked_learned_and_published(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished.model.name)
    end, eos = tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id
    groups = Ledger(RunDir(finished.run_dir)).read_groups(1)
    last = Counter()
    for group in groups:
        assert group.reference_token_ids[-1] == end
        for candidate in group.candidates:
            last[candidate.token_ids[-1] if candidate.finish_reason == "stop" else None] += 1
            assert not {end, eos} & set(candidate.token_ids[:-1])
            assert END not in candidate.text
    assert last[end] > last[eos]  # the references of round 0 taught it
    published = RunDir(finished.run_dir).local_path("rounds/0001/model")
    assert json.loads((published / "generation_config.json").read_text())["eos_token_id"] == sorted([eos, end])


def test_a_later_resume_evaluation_and_service_ask_as_the_run_did(finished, instruct):
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    group = Ledger(RunDir(finished.run_dir)).read_groups(1)[0]
    assert "2019" in tokenizer.decode(group.prompt_token_ids)
    (task,) = build_tasks(finished).values()
    (target,) = plan_evaluation([finished.run_dir], None).targets
    for model in (target.model, resolve(load_serve_config(finished.run_dir, None, []))[0].run.model):
        renderer = Renderer(finished.model_copy(update={"model": model}), tokenizer)
        assert renderer.question(task, group.question) == (group.prompt_token_ids, group.reference_token_ids)
    assert run(config_of(finished.run_dir, instruct)) is False
    with pytest.raises(ConfigError, match=r"model.template_date: 2019-07-08 -> 2019-07-09"):
        run(config_of(finished.run_dir, instruct, template_date="2019-07-09"))
