"""Runs that train adapters: however they are published, samplers answer as base and adapter together do."""

import json
from io import StringIO

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from aft_ray.config.run import ConfigError
from aft_ray.observe.reporter import Reporter
from aft_ray.observe.summary import read_events
from aft_ray.run import launch
from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.weights.version_manifest import read_version_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1200)]

# The steps are large, because otherwise the effect of a tiny adapter would be too small to measure.
LORA = {"rank": 4, "alpha": 16, "targets": ["q_proj", "v_proj", "down_proj"]}
RATES = {"vft": {"epochs": 2, "learning_rate": 2e-2}, "training": {"learning_rate": 5e-3, "zero_stage": 3}}


def run(config) -> bool:
    with Reporter(RunDir(config.run_dir), Console(file=StringIO())) as reporter:
        return launch.run(config, reporter)


@pytest.fixture(scope="module", params=["object_store", "lora"])
def finished(request, ray_here, untied_model, tmp_path_factory):
    config = tiny_config(
        tmp_path_factory.mktemp(request.param) / "run",
        untied_model,
        **RATES,
        lora=LORA,
        weights={"transport": request.param},
        data={"train_limit": 24},
    )
    assert run(config)
    return config


@pytest.fixture(scope="module")
def seen():
    """The groups and adapters of the runs so far, by transport."""
    return {}


def test_every_transport_gives_the_same_groups_and_adapters(finished, seen):
    run_dir = RunDir(finished.run_dir)
    groups = [
        (group.question.id, [candidate.token_ids for candidate in group.candidates])
        for group in Ledger(run_dir).read_groups(1)
    ]
    adapters = [load_file(run_dir.local_path(f"{run_dir.adapter(n)}/adapter_model.safetensors")) for n in (0, 1)]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    seen[finished.weights.transport] = groups, adapters
    first_groups, first_adapters = seen["object_store"]
    assert groups == first_groups
    for one, other in zip(adapters, first_adapters, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_engines_score_each_version_as_the_trainer_does(finished):
    published = [event for event in read_events(RunDir(finished.run_dir)) if event["event"] == "published"]
    assert [event["version"] for event in published] == [0, 1]
    assert all(0 <= event["probe_difference"] < 1e-4 for event in published)


@pytest.mark.parametrize("version", [0, 1])
def test_what_is_written_is_base_and_adapter(finished, untied_model, version):
    run_dir = RunDir(finished.run_dir)
    merged = AutoModelForCausalLM.from_pretrained(run_dir.local_path(run_dir.model(version)))
    base = AutoModelForCausalLM.from_pretrained(untied_model)
    tokens = torch.arange(1, 27).reshape(2, 13)
    with torch.no_grad():
        without = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, run_dir.local_path(run_dir.adapter(version))).eval()
        logits = adapted(tokens).logits
        assert torch.allclose(merged(tokens).logits, logits, atol=1e-4)
        assert (logits - without).abs().max() > 0.05
        for probe in read_version_manifest(version, run_dir.local_path(run_dir.model(version))).probes:
            ids = torch.tensor([probe.prompt_token_ids + probe.response_token_ids])
            logprobs = adapted(ids).logits[0].log_softmax(-1)
            at = range(len(probe.prompt_token_ids) - 1, ids.shape[1] - 1)
            mean = sum(logprobs[i, ids[0, i + 1]].item() for i in at) / len(at)
            assert mean == pytest.approx(probe.score, abs=1e-4)


def test_the_adapter_names_its_base_and_is_small(finished, untied_model):
    run_dir = RunDir(finished.run_dir)
    config = json.loads(run_dir.read_bytes(f"{run_dir.adapter(1)}/adapter_config.json"))
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(untied_model), 4, 16)
    assert set(config["target_modules"]) == set(LORA["targets"])
    sizes = {
        name: sum(path.stat().st_size for path in run_dir.local_path(f"rounds/0001/{name}").rglob("*.*"))
        for name in ("adapter", "model")
    }
    assert sizes["adapter"] < sizes["model"] / 5
    assert run_dir.verify_manifest(run_dir.adapter(1)) == []


def test_a_target_that_no_layer_is_called_is_refused_before_anything_starts(untied_model, tmp_path):
    config = tiny_config(tmp_path / "run", untied_model, lora={"targets": ["q_proj", "query"]})
    with pytest.raises(ConfigError, match=r"'query', and no linear layer of Llama.* q_proj, k_proj") as error:
        run(config)
    assert "\n" not in str(error.value)


def test_an_adapter_of_the_output_layer_is_not_published_alone(untied_model, tmp_path):
    config = tiny_config(tmp_path / "run", untied_model, lora={"targets": ["lm_head"]}, weights={"transport": "lora"})
    with pytest.raises(ConfigError, match=r"lora\.targets names the output layer lm_head, and vLLM"):
        run(config)


def test_an_adapter_of_a_tied_head_is_refused(tiny_model, tmp_path):
    config = tiny_config(tmp_path / "run", tiny_model, lora={"targets": ["lm_head"]})
    with pytest.raises(ConfigError, match="lm_head, whose weight is also the embedding"):
        run(config)
