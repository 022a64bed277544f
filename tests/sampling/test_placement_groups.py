"""What Ray keeps for an engine, and what vLLM is told of its processes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from aft_ray.cluster.connect import sampler_bundles
from aft_ray.inference.engine import engine_arguments, engine_environment
from aft_ray.sampling.placement_groups import group_bundles, stages_are_whole
from aft_ray.sampling.sampler_pool import engine_spec


def sampling(**keys):
    return tiny_config(Path("/run"), Path("m"), sampling=keys).sampling


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1.0, 2.0, 8.0, 16.0]))
def test_a_group_keeps_what_the_plan_counts(tensor, pipeline, gpu, cpus):
    config = sampling(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        cpus_per_sampler=cpus,
        gpus_per_sampler=tensor * pipeline if gpu else 0,
    )
    bundles, planned = group_bundles(config), sampler_bundles(config)
    assert sum(bundle["CPU"] for bundle in bundles) == pytest.approx(sum(bundle.cpus for bundle in planned))
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == sum(bundle.gpus for bundle in planned)
    if gpu and pipeline > 1:  # vLLM's Ray executor takes bundles of one GPU
        assert [bundle["GPU"] for bundle in bundles] == [1] * (tensor * pipeline)
        assert [bundle.gpus for bundle in planned] == [tensor] * pipeline
    else:
        assert len(bundles) == len(planned) == 1


@pytest.mark.parametrize(
    ("keys", "executor", "in_this_process"),
    [
        ({}, "uni", True),
        ({"gpus_per_sampler": 1}, "uni", False),
        ({"tensor_parallel_size": 2, "cpus_per_sampler": 5}, "mp", True),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "cpus_per_sampler": 4}, "mp", True),
        ({"tensor_parallel_size": 4, "gpus_per_sampler": 4}, "mp", False),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "gpus_per_sampler": 8}, "ray", True),
    ],
)
def test_sizes_say_how_vllm_runs_its_processes(keys, executor, in_this_process):
    config = tiny_config(Path("/run"), Path("m"), sampling=keys)
    spec = engine_spec(config, "m", 1)
    arguments = engine_arguments(spec)
    assert arguments["distributed_executor_backend"] == spec.executor == executor
    assert arguments["tensor_parallel_size"] == config.sampling.tensor_parallel_size
    assert arguments["pipeline_parallel_size"] == config.sampling.pipeline_parallel_size
    assert (not spec.gpu or spec.executor == "ray") is in_this_process
    if not spec.gpu:  # its processes share its CPUs
        threads = int(engine_environment(spec)["OMP_NUM_THREADS"])
        assert threads == max(1, int(config.sampling.cpus_per_sampler) // config.sampling.processes_per_sampler)


@pytest.mark.parametrize(
    ("on_nodes", "tensor", "whole"),
    [([8, 8], 8, True), ([4, 8, 4], 4, True), ([5, 8, 3], 8, False), ([4, 4], 8, False)],
)
def test_the_processes_of_a_stage_share_a_node(on_nodes, tensor, whole):
    assert stages_are_whole(on_nodes, tensor) is whole
