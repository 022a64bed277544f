"""The model directory that the trainer writes is the whole model in the format of Hugging Face."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from aft_ray.weights.digests import read_digests, tensor_digest
from aft_ray.weights.export import LayerPass, describe_model, layer_groups, live_parameters, write_model
from aft_ray.weights.shard_plan import ShardPlan, plan_shards
from aft_ray.weights.version_manifest import Probe, read_version_manifest, write_probes

SUPPORT = Path(__file__).parents[1] / "support"
SMALL = 40_000  # bytes a shard, less than a layer of the tiny model


@pytest.fixture(params=["tied", "untied"])
def directory(request, tiny_model, untied_model):
    return tiny_model if request.param == "tied" else untied_model


@pytest.fixture
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def write(model, directory, shard_bytes, dtype=torch.float32) -> ShardPlan:
    layers = LayerPass(model, dtype, shard_bytes)
    write_model(layers, directory)
    return layers.plan


def tensors_in(directory) -> dict[str, torch.Tensor]:
    found = {}
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


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


def test_what_is_written_is_what_the_weights_were_in_the_pass_in_the_wanted_precision(model, tmp_path):
    layers, before = LayerPass(model, torch.bfloat16, SMALL), dict(model.state_dict())
    before = {name: tensor.to(torch.bfloat16) for name, tensor in before.items()}
    layers.run()
    with torch.no_grad():  # the next round trains
        for parameter in model.parameters():
            parameter.zero_()
    layers.run = lambda: None
    write_model(layers, tmp_path)
    for name, tensor in tensors_in(tmp_path).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_a_rank_gets_the_tensors_of_the_layers_that_it_wants(model):
    groups = layer_groups(model)
    assert [name for name, _ in live_parameters(model)] == [name for group in groups for name, _ in group]
    assert [name for name, _ in live_parameters(model, {1})] == [name for name, _ in groups[1]]
    assert list(live_parameters(model, set())) == []


def test_a_shard_has_the_digests_of_its_tensors_and_refuses_to_be_written_without_one(model, tmp_path):
    write(model, tmp_path, SMALL, torch.bfloat16)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert read_digests(file.metadata()) == {name: tensor_digest(one) for name, one in tensors.items()}
            assert file.metadata()["format"] == "pt"
    layers = LayerPass(model, torch.float32, SMALL)
    with pytest.raises(ValueError, match=r"model-00001.safetensors lacks model\."):
        layers.files[0].finish()
    (name,) = list(layers.plan.shards[0].tensors)[:1]
    with pytest.raises(ValueError, match=r"has the shape \(1,\), and \("):
        layers.files[0].fill(name, torch.ones(1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 16, 100])
def test_ranks_share_the_layers_evenly_by_bytes_and_each_layer_has_one_owner(ranks):
    """The shapes of a model of 70B parameters: an embedding, 80 layers, a norm and an output layer."""
    layer = {"attention": (8192, 4 * 8192 - 12288), "mlp": (3 * 28672, 8192), "norms": (2, 8192)}
    layers = [{"embedding": (32000, 8192)}, *({f"{n}.{k}": v for k, v in layer.items()} for n in range(80))]
    layers += [{"norm": (8192,)}, {"head": (32000, 8192)}]
    plan = plan_shards(layers, "bfloat16", ranks, 1 << 30)
    assert plan == plan_shards(layers, "bfloat16", ranks, 1 << 30)
    written = [name for shard in plan.shards for name in shard.tensors]
    assert sorted(written) == sorted(name for one in layers for name in one)
    of_rank = [
        sum(2 * math.prod(s) for one in plan.of_rank(rank) for s in one.tensors.values()) for rank in range(ranks)
    ]
    largest = sum(2 * math.prod(shape) for shape in layer.values())
    assert sum(of_rank) == plan.bytes > 130e9
    assert max(of_rank) <= plan.bytes / ranks + largest
    for number, one in enumerate(layers):
        owners = {shard.owner for shard in plan.shards if not shard.tensors.keys().isdisjoint(one)}
        assert owners == {plan.owners[number]}
    # Files are loaded in the model's order, and none with more than one tensor is above the limit.
    firsts = [next(n for n, one in enumerate(layers) if next(iter(shard.tensors)) in one) for shard in plan.shards]
    assert firsts == sorted(firsts)
    for shard in plan.shards:
        assert len(shard.tensors) == 1 or sum(2 * math.prod(s) for s in shard.tensors.values()) <= 1 << 30


@pytest.mark.parametrize("shard_bytes", [SMALL, 1 << 30])
def test_what_is_written_loads_as_the_model(model, tmp_path, shard_bytes):
    plan = write(model, tmp_path, shard_bytes)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True), model)
    assert (len(plan.shards) == 1) is (shard_bytes > SMALL)
    assert plan.bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_shards_keep_to_their_size_and_the_index_says_where_everything_is(model, tmp_path):
    plan = write(model, tmp_path, SMALL)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.bytes
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == list(plan.names)
    found = {}
    for name in plan.names:
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


@pytest.mark.parametrize(("end_ids", "written"), [((1, 7), [1, 7]), ((), 1)])
def test_the_generation_config_names_the_tokens_that_end_a_response(model, tmp_path, end_ids, written):
    describe_model(model, tmp_path, LayerPass(model, torch.float32, SMALL).plan, end_ids)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == written
    assert model.generation_config.eos_token_id == 1


def test_a_version_manifest_is_read_from_a_model_directory(model, tmp_path):
    plan = write(model, tmp_path, SMALL)
    probes = (Probe([1, 2], [3], -0.1 - 1e-17), Probe([4], [5, 6], -2.5))
    assert read_version_manifest(3, tmp_path).probes == ()
    write_probes(tmp_path, probes)
    manifest = read_version_manifest(3, tmp_path)
    assert (manifest.version, manifest.model, manifest.probes) == (3, str(tmp_path), probes)
    assert manifest.shards == plan.names


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_write_disjoint_halves_of_the_whole_model_while_they_stream_it(untied_model, tmp_path, stage):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(SUPPORT.parents[1])}
    command = [sys.executable, str(SUPPORT / "publishing_main.py")]
    ranks = []
    for rank in range(2):
        with open(tmp_path / f"{rank}.log", "w") as log:
            arguments = [*command, str(rank), port, str(untied_model), str(tmp_path / "model"), str(stage)]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(ranks):
            assert process.wait(timeout=300) == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    whole = AutoModelForCausalLM.from_pretrained(untied_model)
    for version in (1, 2):  # in the pass of a broadcast, and of one that no engine joins
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / str(version), use_safetensors=True)
        assert_same_model(written, whole)
    files = [json.loads((tmp_path / "model" / f"files-{rank}.json").read_text()) for rank in range(2)]
    assert files[0].keys().isdisjoint(files[1])
    names = {path.name for path in (tmp_path / "model" / "1").glob("*.safetensors")}
    assert files[0].keys() | files[1].keys() == names
    assert len(names) > 3
    sizes = [sum(of_rank.values()) for of_rank in files]
    layer = sum(parameter.nbytes for parameter in whole.model.layers[0].parameters())
    assert abs(sizes[0] - sizes[1]) <= layer
