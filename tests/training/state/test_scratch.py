"""The scratch directory of a node is checked for room before a run trains."""

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import tiny_config
from training_helpers import write_tiny_llama

from aft_ray.config.run import LoraConfig
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.model.loading import LoadingError, load_model
from aft_ray.training.model.lora import add_adapters
from aft_ray.training.state import scratch

LORA = {"rank": 4, "alpha": 6, "targets": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """A process group of this process alone, and a scratch directory of its own."""
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_trained_parameters_are_those_of_the_model_or_of_the_adapters(model, tmp_path):
    loaded = load_model(model, "float32")
    assert scratch.trained_parameters(tiny_config(tmp_path, model)) == sum(p.numel() for p in loaded.parameters())
    add_adapters(loaded, LoraConfig(**LORA), str(model))
    adapters = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert scratch.trained_parameters(tiny_config(tmp_path, model, lora=LORA)) == adapters


def test_a_70b_model_needs_the_same_on_every_node_at_stage_3_and_more_on_the_first_at_stage_2(model, tmp_path):
    def of_node(stage, first):
        config = tiny_config(tmp_path, model, model={"dtype": "bfloat16"}, training={"zero_stage": stage})
        return sum(scratch.state_bytes(config, 68_976_648_192, rank, 24) for rank in range(first, first + 8)) / 1e9

    assert of_node(3, 0) == of_node(3, 16) == pytest.approx(12 * 68.98 / 3 * 1.02, rel=1e-3)
    assert of_node(2, 0) - of_node(2, 16) == pytest.approx(2 * 68.98 * 1.02, rel=1e-3)


@pytest.mark.usefixtures("one_rank")
def test_too_little_room_ends_the_run_in_one_sentence_before_it_trains(model, tmp_path, monkeypatch):
    config, run_dir = tiny_config(tmp_path / "run", model), RunDir(tmp_path / "run")
    scratch.check_scratch(config, run_dir)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 12_345) if Path(path).is_dir() else None)
    sentence = rf"training state .* needs 0.0 GB in {tmp_path}/scratch of .*, and 0.0 GB are free there; set TMPDIR on"
    with pytest.raises(LoadingError, match=sentence) as error:
        scratch.check_scratch(config, run_dir)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("one_rank")
def test_what_killed_workers_left_is_removed_and_other_runs_keep_theirs(model, tmp_path):
    run_dir, other = RunDir(tmp_path / "run"), RunDir(tmp_path / "other")
    for each in (run_dir, other):
        left = scratch.scratch_directory(each, "checkpoint") / "3" / "state"
        left.mkdir(parents=True)
        (left / "shard.pt").write_bytes(b"1")
    scratch.check_scratch(tiny_config(tmp_path / "run", model), run_dir)
    assert not scratch.scratch_directory(run_dir, "checkpoint").exists()
    assert scratch.scratch_directory(other, "checkpoint").exists()
