"""Engine arguments of vLLM that a config passes through: what is taken, and what is refused with which sentence."""

import pytest
from tiny import tiny_config

from aft_ray.config.engine_arguments import CPU_ARGUMENTS, SAMPLER_ARGUMENTS, SERVICE_ARGUMENTS
from aft_ray.config.loader import dump_config, parse_yaml
from aft_ray.config.run import ConfigError, RunConfig, load_config, parse_config
from aft_ray.config.serve import parse_serve_config
from aft_ray.inference.engine_spec import engine_arguments
from aft_ray.inference.installed_arguments import arguments_in, check_engine_arguments, engine_argument_names
from aft_ray.run.preflight import check_run
from aft_ray.sampling.sampler_pool import sampler_engine_spec


def run(sampling, **sections) -> RunConfig:
    return parse_config({"run_dir": "x", "model": {"name": "some/model"}, "sampling": sampling, **sections})


def test_arguments_reach_the_engine_and_the_config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: x\nmodel: {name: some/model}\nsampling: {engine_args: {kv_cache_dtype: fp8}}\n")
    config = load_config(
        path,
        [
            "sampling.gpus_per_sampler=1",
            "sampling.engine_args.speculative_config.method=ngram",
            "sampling.engine_args.speculative_config.num_speculative_tokens=3",
        ],
    )
    given = {"kv_cache_dtype": "fp8", "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    assert config.sampling.engine_args == given
    assert parse_config(parse_yaml(dump_config(config), "the file")) == config
    arguments = engine_arguments(sampler_engine_spec(config, "/model", (1,)))
    assert {name: arguments[name] for name in given} == given


def test_an_argument_takes_precedence_over_what_the_engine_is_started_with_otherwise():
    config = run({"engine_args": {"enforce_eager": False, "max_num_batched_tokens": 512}})
    arguments = engine_arguments(sampler_engine_spec(config, "/model", (1,)))
    assert (arguments["enforce_eager"], arguments["max_num_batched_tokens"]) == (False, 512)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("model", "set model.name"),
        ("max_model_len", "set model.max_length"),
        ("tensor_parallel_size", "set sampling.tensor_parallel_size"),
        ("data_parallel_size", "set sampling.samplers"),
        ("max_lora_rank", "lora.rank"),
        ("worker_extension_cls", "the program loads the weights itself"),
        ("skip_tokenizer_init", "have no tokenizer"),
        ("logprobs_mode", "scores"),
        ("quantization", "rounded ones would score otherwise"),
        ("enable_chunked_prefill", "requests that have a seed"),
    ],
)
def test_what_the_run_sets_itself_is_refused_with_what_to_do_instead(name, way):
    with pytest.raises(ConfigError, match=rf"^sampling\.engine_args\.{name} cannot be passed through: .*{way}"):
        run({"engine_args": {name: 1}})


def test_engines_on_gpus_may_split_prompts_and_bound_their_cache():
    given = {"enable_chunked_prefill": True, "kv_cache_memory_bytes": 10**9}
    assert run({"gpus_per_sampler": 1, "engine_args": given}).sampling.engine_args == given


def test_everything_that_a_run_or_the_service_sets_is_an_argument_of_vllm():
    """A name that a release has dropped would be refused as owned, instead of as unknown."""
    assert {*SAMPLER_ARGUMENTS, *SERVICE_ARGUMENTS, *CPU_ARGUMENTS} <= engine_argument_names()
    config = run({"max_num_seqs": 8}, lora={"rank": 4}, weights={"transport": "lora"})
    own = engine_arguments(sampler_engine_spec(config, "/model", (1,)))
    may_be_replaced = {"enable_prefix_caching", "disable_log_stats", "enforce_eager", "max_num_batched_tokens"}
    assert own.keys() - may_be_replaced <= SAMPLER_ARGUMENTS.keys() | CPU_ARGUMENTS.keys()


def test_an_unknown_argument_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"^sampling\.engine_args\.kv_cache_type is no .*; did you mean kv_cache_dt"):
        check_engine_arguments({"kv_cache_type": "fp8"}, "sampling.engine_args")
    check_engine_arguments({"kv_cache_dtype": "fp8"}, "sampling.engine_args")


def test_a_run_with_an_unknown_argument_is_refused_before_anything_starts(tiny_model, tmp_path):
    config = tiny_config(tmp_path / "run", tiny_model, sampling={"engine_args": {"no_such_thing": 1}})
    with pytest.raises(ConfigError, match=r"^sampling\.engine_args\.no_such_thing is no engine argument"):
        check_run(config)
    assert not (tmp_path / "run").exists()


def test_the_names_are_those_of_vllms_class():
    from dataclasses import fields

    from vllm import EngineArgs

    assert engine_argument_names() == {field.name for field in fields(EngineArgs) if not field.name.startswith("_")}


def test_only_public_fields_of_the_class_count():
    source = "class Other:\n    x: int\nclass EngineArgs:\n    a: int = 1\n    _b: int = 2\n    c = 3\n"
    assert arguments_in(source) == {"a"}


def test_the_service_takes_quantization_and_refuses_what_it_sets():
    tree = {"model": "some/model", "engine": {"gpus": 1, "args": {"quantization": "fp8"}}}
    assert parse_serve_config(tree).engine.args == {"quantization": "fp8"}
    with pytest.raises(ConfigError, match=r"^engine\.args\.served_model_name cannot be passed through: set name"):
        parse_serve_config({"model": "some/model", "engine": {"args": {"served_model_name": "x"}}})


@pytest.mark.parametrize(
    ("sampling", "share"),
    [
        ({"gpus_per_sampler": 1}, 0.9),
        ({"gpus_per_sampler": 0.5}, 0.45),
        ({"gpus_per_sampler": 0.5, "gpu_memory_utilization": 0.8}, 0.4),
        ({"gpus_per_sampler": 8, "tensor_parallel_size": 8}, 0.9),
    ],
)
def test_an_engine_uses_its_part_of_a_gpu(sampling, share):
    assert run(sampling).sampling.gpu_memory_share == pytest.approx(share)


def test_an_engine_beside_train_workers_leaves_memory_to_them():
    sharing = {"gpus_per_sampler": 1, "colocate": True}
    others = {"rounds": {"max_staleness": 0}, "training": {"gpus_per_worker": 1, "zero_stage": 2}}
    assert run(sharing, **others).sampling.gpu_memory_share == 0.8
    assert run(sharing | {"gpu_memory_utilization": 0.6}, **others).sampling.gpu_memory_share == 0.6
