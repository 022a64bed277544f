"""The model directory that the trainer writes is the whole model in the format of Hugging Face."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from aft_ray.weights.export import layer_groups, named_tensors, write_model
from aft_ray.weights.publish import SharedStorage
from aft_ray.weights.version_manifest import Probe, read_version_manifest, write_probes

SUPPORT = Path(__file__).parents[1] / "support"
SMALL = 40_000  # bytes a shard, less than a layer of the tiny model


@pytest.fixture(params=["tied", "untied"])
def directory(request, tiny_model, untied_model):
    return tiny_model if request.param == "tied" else untied_model


@pytest.fixture
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def write(model, directory, shard_bytes, dtype=torch.float32):
    return write_model(model, directory, shard_bytes, SharedStorage().put_shard, 0, dtype)


def assert_same_model(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_groups_are_layers_and_hold_every_parameter_once(model):
    groups = layer_groups(model)
    names = [name for group in groups for name, _ in group]
    assert names == [name for name, _ in model.named_parameters()]
    assert [len(group) for group in groups].count(9) == 2  # the two layers
    for group in groups:
        assert len({name.split(".layers.")[1].split(".")[0] for name, _ in group if ".layers." in name}) <= 1


def test_weights_outside_parameters_are_refused_and_named(model):
    model.model.register_buffer("steering", torch.ones(3))
    with pytest.raises(ValueError, match=r"model\.steering"):
        layer_groups(model)


def test_tensors_are_copies_in_the_wanted_precision(model):
    tensors = dict(named_tensors(model, torch.bfloat16, keep=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert any(tensor.abs().sum() > 0 for tensor in tensors.values())
    assert list(named_tensors(model, torch.float32, keep=False)) == []


@pytest.mark.parametrize("shard_bytes", [SMALL, 1 << 30])
def test_what_is_written_loads_as_the_model(model, tmp_path, shard_bytes):
    written = write(model, tmp_path, shard_bytes)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True), model)
    assert (len(written.shards) == 1) is (shard_bytes > SMALL)
    assert written.bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert written.handles == []


def test_shards_keep_to_their_size_and_the_index_says_where_everything_is(model, tmp_path):
    written = write(model, tmp_path, SMALL)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.bytes
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == written.shards
    found = {}
    for name in written.shards:
        with safe_open(tmp_path / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SMALL
        found |= dict.fromkeys(tensors, name)
    assert found == index["weight_map"]
    assert found.keys() == dict(model.named_parameters()).keys()


def test_the_config_says_in_which_precision_the_weights_are(model, tmp_path):
    write(model, tmp_path, 1 << 30, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_version_manifest_is_read_from_a_model_directory(model, tmp_path):
    written = write(model, tmp_path, SMALL)
    probes = (Probe([1, 2], [3], -0.1 - 1e-17), Probe([4], [5, 6], -2.5))
    assert read_version_manifest(3, tmp_path).probes == ()
    write_probes(tmp_path, probes)
    manifest = read_version_manifest(3, tmp_path)
    assert (manifest.version, manifest.model, manifest.probes) == (3, str(tmp_path), probes)
    assert list(manifest.shards) == written.shards


def test_two_ranks_that_each_hold_half_of_every_weight_write_and_stream_the_whole_model(untied_model, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(SUPPORT.parents[1])}
    command = [sys.executable, str(SUPPORT / "zero3_main.py")]
    ranks = []
    for rank in range(2):
        with open(tmp_path / f"{rank}.log", "w") as log:
            arguments = [*command, str(rank), port, str(untied_model), str(tmp_path / "model")]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(timeout=300) == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert_same_model(written, AutoModelForCausalLM.from_pretrained(untied_model))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
