"""Engine arguments of a service are checked before any of its processes starts."""

import pytest

from aft_ray.config.run import parse_config
from aft_ray.config.section import ConfigError
from aft_ray.config.serve import parse_serve_config
from aft_ray.serving.app import application, llm_config
from aft_ray.serving.model import ServedModel
from aft_ray.weights.version_manifest import VersionManifest


def served(model) -> ServedModel:
    return ServedModel("tiny", str(model), parse_config({"run_dir": "x", "model": {"name": str(model)}}))


def test_arguments_reach_the_engines(tiny_model):
    given = {"kv_cache_dtype": "fp8", "hf_overrides": {"rope_theta": 5e5}}
    config = parse_serve_config({"model": str(tiny_model), "engine": {"gpus": 1, "args": given}})
    arguments = llm_config(config, served(tiny_model), (1,)).engine_kwargs
    assert given.items() <= arguments.items()
    # vLLM chooses for the hardware.
    assert "max_num_seqs" not in arguments


def test_an_unknown_argument_is_refused(tiny_model):
    config = parse_serve_config({"model": str(tiny_model), "engine": {"args": {"kv_cache_type": "fp8"}}})
    with pytest.raises(ConfigError, match=r"^engine\.args\.kv_cache_type is no engine argument .* kv_cache_dtype\?$"):
        application(config, (served(tiny_model), None))


def test_a_version_with_probes_is_not_served_with_rounded_weights(tiny_model):
    config = parse_serve_config({"model": "runs/x", "engine": {"gpus": 1, "args": {"quantization": "fp8"}}})
    manifest = VersionManifest(3, "runs/x/rounds/0003/model", (), ())
    with pytest.raises(ConfigError, match=r"serve the directory of the model itself, runs/x/rounds/0003/model$"):
        application(config, (served(tiny_model), manifest))
