"""Keys that had another name in an earlier release are understood, and their new name is said once."""

import logging
import subprocess
import sys
from typing import ClassVar

import pytest
import yaml
from pydantic import Field

from aft_ray.config import loader
from aft_ray.config.keys import current_name, rename_keys
from aft_ray.config.loader import config_difference, dump_config, parse_section
from aft_ray.config.run import ConfigError, load_config, parse_config
from aft_ray.config.section import Section
from aft_ray.storage.run_dir import CONFIG, RunDir
from aft_ray.storage.versions import read_config

RUN = {"run_dir": "runs/x", "model": {"name": "some/model"}}


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(loader, "_reported", set())


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "sampling": {"max_parked": 0.2}}))
    return path


def test_an_old_name_in_a_file_is_understood_and_the_new_one_is_said_once(old_file, caplog):
    with caplog.at_level(logging.WARNING):
        assert load_config(old_file).sampling.max_failed == 0.2
        load_config(old_file)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("sampling.max_parked is now called sampling.max_failed")
    assert "max_parked" not in dump_config(load_config(old_file))


def test_an_old_name_on_the_command_line_replaces_the_value_of_the_file(tmp_path, old_file):
    new_file = tmp_path / "new.yaml"
    new_file.write_text(yaml.safe_dump({**RUN, "sampling": {"max_failed": 0.2}}))
    for file in (old_file, new_file):
        for override in ("sampling.max_parked=0.3", "sampling.max_failed=0.3"):
            assert load_config(file, [override]).sampling.max_failed == 0.3


def test_a_run_directory_of_an_earlier_release_has_the_same_config(tmp_path):
    config = parse_config({**RUN, "sampling": {"max_failed": 0.2}})
    run_dir = RunDir(tmp_path)
    run_dir.write_bytes(CONFIG, dump_config(config).replace("max_failed", "max_parked").encode())
    assert config_difference(read_config(run_dir), config) == []
    assert read_config(run_dir, ["sampling.max_failed=0.4"]).sampling.max_failed == 0.4


def test_an_old_and_a_new_name_together_are_refused(tmp_path):
    said = (
        "sampling.max_parked and sampling.max_failed are both given; sampling.max_parked is the former name of "
        "sampling.max_failed, so remove it"
    )
    with pytest.raises(ConfigError) as error:
        parse_config({**RUN, "sampling": {"max_parked": 0.1, "max_failed": 0.2}})
    assert str(error.value) == said
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    for overrides in (
        ["sampling.max_parked=0", "sampling.max_failed=0"],
        ["sampling.max_failed=0", "sampling.max_parked=0"],
    ):
        with pytest.raises(ConfigError) as error:
            load_config(path, overrides)
        assert str(error.value) == said


def test_a_process_without_a_logging_configuration_says_the_new_name_in_one_line(old_file):
    code = f"from aft_ray.config.run import load_config; load_config({str(old_file)!r}); load_config({str(old_file)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "sampling.max_parked is now called sampling.max_failed; the old name is still understood in this release"
    ]


class Leaf(Section):
    renamed_keys: ClassVar[dict[str, str]] = {"old": "new"}
    new: int = 0


class Tree(Section):
    renamed_keys: ClassVar[dict[str, str]] = {"twig": "leaf"}
    leaf: Leaf = Leaf()
    named: dict[str, Leaf] = Field({})


def test_sections_and_keys_below_names_can_be_renamed():
    tree = {"twig": {"old": 1}, "named": {"a": {"old": 2}, "b": None}}
    assert rename_keys(Tree, tree) == (
        {"leaf": {"new": 1}, "named": {"a": {"new": 2}, "b": None}},
        {"twig": "leaf", "leaf.old": "leaf.new", "named.a.old": "named.a.new"},
    )
    assert current_name(Tree, "twig.old") == "leaf.new"
    assert current_name(Tree, "named.a.old") == "named.a.new"
    assert current_name(Tree, "named.a") == "named.a"
    assert current_name(Tree, "unknown.old") == "unknown.old"
    assert parse_section(Tree, {"named": {"a": {"old": 2}}}, ["twig.old=1"]) == Tree(
        leaf=Leaf(new=1), named={"a": Leaf(new=2)}
    )
