"""What a run that is started again takes over from its run directory."""

from datetime import date
from io import StringIO

import pytest
import yaml
from rich.console import Console
from tiny import tiny_config

from aft_ray.config.run import ConfigError
from aft_ray.observe.reporter import Reporter
from aft_ray.run.launch import run
from aft_ray.run.resume import adopt_config
from aft_ray.storage.run_dir import CONFIG, RunDir
from aft_ray.storage.versions import read_config


def begin(tmp_path, tiny_model, **model) -> RunDir:
    config = tiny_config(tmp_path / "run", tiny_model, model=model)
    run_dir = RunDir(config.run_dir)
    adopt_config(config, run_dir)
    return run_dir


def test_the_day_on_which_a_run_begins_is_written_into_its_config(tiny_model, tmp_path):
    run_dir = begin(tmp_path, tiny_model)
    assert read_config(run_dir).model.template_date == date.today()


def test_a_run_that_is_resumed_later_has_the_day_on_which_it_began(tiny_model, tmp_path):
    run_dir = begin(tmp_path, tiny_model, template_date="2020-02-29")
    again, changed = adopt_config(tiny_config(tmp_path / "run", tiny_model), run_dir)
    assert again.model.template_date == date(2020, 2, 29)
    assert again == read_config(run_dir)
    assert changed == []


def test_another_day_is_refused(tiny_model, tmp_path):
    run_dir = begin(tmp_path, tiny_model, template_date="2020-02-29")
    other = tiny_config(tmp_path / "run", tiny_model, model={"template_date": "2020-03-01"})
    with pytest.raises(ConfigError, match=r"another config \(model.template_date: 2020-02-29 -> 2020-03-01\)"):
        adopt_config(other, run_dir)


def test_8_bit_states_stay_with_the_number_of_workers_that_made_them(tiny_model, tmp_path):
    training = {"optimizer": "adamw_8bit", "workers": 2}
    config = tiny_config(tmp_path / "run", tiny_model, training=training)
    adopt_config(config, RunDir(config.run_dir))
    other = tiny_config(tmp_path / "run", tiny_model, training=training | {"workers": 4})
    with pytest.raises(ConfigError, match=r"resume with training\.workers=2"):
        adopt_config(other, RunDir(config.run_dir))


@pytest.mark.parametrize("given", [None, "2020-02-29"])
def test_a_run_whose_config_has_no_day_gets_one_that_it_keeps(tiny_model, tmp_path, given):
    run_dir = begin(tmp_path, tiny_model)
    tree = yaml.safe_load(run_dir.read_bytes(CONFIG))
    del tree["model"]["template_date"], tree["model"]["system_prompt"], tree["model"]["chat_template_kwargs"]
    run_dir.write_bytes(CONFIG, yaml.safe_dump(tree).encode())
    config, changed = adopt_config(tiny_config(tmp_path / "run", tiny_model, model={"template_date": given}), run_dir)
    assert config.model.template_date == (date.fromisoformat(given) if given else date.today())
    assert changed == []
    assert read_config(run_dir) == config


def test_a_config_that_is_refused_does_not_become_that_of_the_run(tiny_model, tmp_path):
    wrong = tiny_config(tmp_path / "run", tiny_model, model={"system_prompt": "Be brief."})
    run_dir = RunDir(wrong.run_dir)
    with (
        Reporter(run_dir, Console(file=StringIO())) as reporter,
        pytest.raises(ConfigError, match="system_prompt is for a chat template"),
    ):
        run(wrong, reporter)
    assert not run_dir.exists(CONFIG)


def test_a_template_is_given_the_same_values_for_a_whole_run(tiny_model, tmp_path):
    run_dir = begin(tmp_path, tiny_model, system_prompt="Be brief.")
    with pytest.raises(ConfigError, match=r"another config \(model.system_prompt: Be brief. -> None\)"):
        adopt_config(tiny_config(tmp_path / "run", tiny_model), run_dir)
