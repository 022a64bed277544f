"""Wrong weights never become a version: each tensor wrong in turn, in a real engine, and no right version refused.

Two proofs work together. Digests find whatever is not what the trainer sent, and the record of the reload finds what
arrived and was not loaded: both are exact in every number format. Probes find what was loaded into a wrong place.
"""

import asyncio
import random

import pytest
import torch
from tiny_families import CONTEXT, VOCABULARY, build, tensors_of, trainer_of, updated, write

from aft_ray.inference.engine import Engine
from aft_ray.inference.engine_spec import EngineSpec
from aft_ray.inference.request_parameters import Prompt, SamplingSpec
from aft_ray.inference.versioned_engine import VersionedEngine
from aft_ray.storage.records import Group, Question
from aft_ray.training.publication.probes import choose_probes, score_probes
from aft_ray.weights.version_manifest import VersionManifest, WeightUpdateFailed

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # the defaults of a run
# Many short answers, as multiple choice has them, and some long ones.
LENGTHS = [1, 1, 1, 2, 2, 3, 4, 5, 8, 16, 16, 32, 32, 64, 96, 128]


class Lab:
    """A running engine, the model that it was started with, and the model that a trainer has made of it."""

    def __init__(self, dtype: str, scratch) -> None:
        self.dtype, self.scratch = dtype, scratch
        self.before = build("qwen2", 1, getattr(torch, dtype))
        self.after = updated(self.before, 2, 0.03)
        start = write(scratch / "start", self.before)
        spec = EngineSpec(str(start), (1,), dtype, CONTEXT, 32, gpu=False, kv_cache_gib=0.25)
        self.engine = Engine(spec)
        self.versioned = VersionedEngine("sampler 7", self.engine, None, "weights.timeout_s")
        self.groups = choose_probes(list(map(self._sampled, range(len(LENGTHS)), LENGTHS)), 64, CONTEXT)
        self.probes = self.probes_of(self.after)
        self.version = 0

    def _sampled(self, seed: int, length: int) -> Group:
        prompt = [random.Random(seed).randrange(2, VOCABULARY) for _ in range(20)]
        (candidate,) = self.engine.sample(Prompt(prompt, seed), SamplingSpec(1, 1.0, 1.0, length)).result(60)
        return Group(1, 0, Question(f"q{seed}", "", "", "", ""), prompt, candidate.token_ids, [])

    def probes_of(self, model):
        return tuple(score_probes(trainer_of(model), self.groups))

    def update(self, tensors, announced, probes=None) -> str:
        """Publishes a version; returns why the engine refused it, nothing when it holds it now."""
        self.version += 1
        directory = write(self.scratch / "version", self.before, tensors, announced)
        manifest = VersionManifest(self.version, str(directory), ("model.safetensors",), probes or self.probes)
        try:
            asyncio.run(self.versioned.update(manifest, TOLERANCE[self.dtype], 60))
        except WeightUpdateFailed as error:
            assert self.versioned.version is None
            return str(error)
        assert self.versioned.version == self.version
        return ""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lab(request, tmp_path_factory):
    lab = Lab(request.param, tmp_path_factory.mktemp("lab"))
    yield lab
    lab.engine.close()


def neighbour(name, tensors):
    """Another tensor of the same shape, in the same layer where there is one; None: there is none."""
    same = [other for other in tensors if other != name and tensors[other].shape == tensors[name].shape]
    return min(same, key=lambda other: (other.split(".")[:3] != name.split(".")[:3], other), default=None)


def halves_swapped(tensor, dimension):
    """A weight whose two halves, of which each process of two would hold one, have changed places."""
    first, second = tensor.chunk(2, dimension)
    return torch.cat([second, first], dimension).contiguous()


def mutations(before, after):
    """Each way in which each tensor may be wrong: what it is called, the tensors, and the name of the wrong one."""
    for name, tensor in after.items():
        yield f"{name} stale", after | {name: before[name]}, name
        yield f"{name} scaled", after | {name: (tensor.float() * 1.01).to(tensor.dtype)}, name
        yield from misplaced(name, after)


def misplaced(name, after):
    if other := neighbour(name, after):
        yield f"{name} swapped with {other}", after | {name: after[other], other: after[name]}, name
    if after[name].ndim > 1:
        dimension = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        yield f"{name} with its shards swapped", after | {name: halves_swapped(after[name], dimension)}, name


def test_every_wrong_tensor_is_named_and_the_next_right_version_is_taken(lab):
    before, after = tensors_of(lab.before), tensors_of(lab.after)
    count = 0
    for what, tensors, wrong in mutations(before, after):
        refusal = lab.update(tensors, announced=after)
        assert refusal.startswith(f"sampler 7 got wrong weights of version {lab.version}: the tensor "), what
        assert wrong in refusal or neighbour(wrong, after) in refusal, what
        count += 1
    assert count > 90
    assert lab.update(after, announced=after) == ""


def test_a_tensor_that_arrives_and_is_not_loaded_is_found(lab, monkeypatch):
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    after = tensors_of(lab.after)
    load = Qwen2ForCausalLM.load_weights
    for name in after:

        def forgetful(self, weights, left_out=name):
            return load(self, ((one, tensor) for one, tensor in weights if one != left_out))

        monkeypatch.setattr(Qwen2ForCausalLM, "load_weights", forgetful)
        refusal = lab.update(after, announced=after)
        assert "weights of version" in refusal, name
        assert "the layer " in refusal, name
    monkeypatch.setattr(Qwen2ForCausalLM, "load_weights", load)
    assert lab.update(after, announced=after) == ""


def counting(after):
    """The weights that change the scores of these small models by more than rounding does: not those of queries and
    keys, which say where the attention goes, since a random model has nothing to look for."""
    return [
        name
        for name in after
        if name.endswith("weight") and ".layers.1." not in name and "q_proj" not in name and "k_proj" not in name
    ]


def test_probes_alone_find_weights_in_a_wrong_place(lab):
    """The digests are those of the wrong weights here, as if vLLM had taken a wrong shard or a wrong half."""
    after = tensors_of(lab.after)
    for name in counting(after):
        for what, tensors, _ in misplaced(name, after):
            assert "scores the probes of version" in lab.update(tensors, announced=tensors), what
    assert lab.update(after, announced=after) == ""


def test_probes_alone_find_stale_and_scaled_weights_in_float32(lab):
    """In bfloat16 a single stale tensor is within the rounding, and only digests find it."""
    before, after = tensors_of(lab.before), tensors_of(lab.after)
    found = [
        bool(lab.update(tensors, announced=tensors))
        for _, tensors, wrong in mutations(before, after)
        if wrong in counting(after)
    ]
    assert len(found) > 30
    assert all(found) is (lab.dtype == "float32")


def test_probes_alone_find_the_version_before(lab):
    before, after = tensors_of(lab.before), tensors_of(lab.after)
    larger = updated(lab.before, 3, 0.1)
    assert "scores the probes" in lab.update(before, announced=before, probes=lab.probes_of(larger))
    assert lab.update(after, announced=after) == ""


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_no_right_version_is_refused(lab, count):
    """Small steps, as training takes them. In bfloat16 the two sides round differently, for short answers too."""
    model = lab.before
    for step in range(count):
        model = updated(model, 100 + step, 0.01)
        tensors = tensors_of(model)
        assert lab.update(tensors, announced=tensors, probes=lab.probes_of(model)) == "", step


@pytest.mark.slow
def test_two_processes_of_an_engine_each_prove_their_weights(tmp_path):
    """With tensor parallelism each process takes its shards; a wrong tensor is found in both."""
    before, after = build("qwen2", 1), build("qwen2", 2)
    spec = EngineSpec(
        str(write(tmp_path / "a", before)), (1,), "float32", CONTEXT, 32, False, kv_cache_gib=0.25,
        tensor_parallel_size=2,
    )  # fmt: skip
    engine = Engine(spec)
    fresh = held(engine)
    versioned = VersionedEngine("sampler 7", engine, None, "weights.timeout_s")
    group = Group(1, 0, Question("q", "", "", "", ""), [7, 8, 9, 10], list(range(20, 60)), [])
    probes = tuple(score_probes(trainer_of(after), [group]))

    def update(directory):
        manifest = VersionManifest(1, str(directory), ("model.safetensors",), probes)
        return asyncio.run(versioned.update(manifest, 1e-4, 120))

    wrong = tensors_of(after)
    wrong["model.norm.weight"] = tensors_of(before)["model.norm.weight"]
    with pytest.raises(WeightUpdateFailed, match=r"the tensor model\.norm\.weight .* process 0 of 2"):
        update(write(tmp_path / "wrong", after, wrong, tensors_of(after)))
    name = "model.layers.1.mlp.gate_proj.weight"
    swapped = tensors_of(after) | {name: halves_swapped(tensors_of(after)[name], 0)}
    with pytest.raises(WeightUpdateFailed, match="scores the probes"):
        update(write(tmp_path / "swapped", after, swapped))
    assert update(write(tmp_path / "b", after)).version == 1
    assert held(engine) != fresh
    probes = tuple(score_probes(trainer_of(before), [group]))
    versioned.version = None
    assert update(tmp_path / "a").version == 1
    assert held(engine) == fresh  # bit for bit, in both processes
    engine.close()


def held(engine):
    """What each process of an engine says that it holds."""
    return engine._exclusive(lambda llm: llm.collective_rpc("held_digests")).result(60)
