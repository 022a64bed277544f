"""The engine of a run's samplers: which executor vLLM uses, and how many threads its processes have."""

from pathlib import Path

import pytest
from tiny import tiny_config

from aft_ray.inference.engine_spec import engine_arguments, engine_environment
from aft_ray.sampling.sampler_pool import sampler_engine_spec


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
def test_the_parallel_sizes_choose_vllms_executor(keys, executor, in_this_process):
    config = tiny_config(Path("/run"), Path("m"), sampling=keys)
    spec = sampler_engine_spec(config, "m", (1,))
    arguments = engine_arguments(spec)
    assert arguments["distributed_executor_backend"] == spec.executor == executor
    assert arguments["tensor_parallel_size"] == config.sampling.tensor_parallel_size
    assert arguments["pipeline_parallel_size"] == config.sampling.pipeline_parallel_size
    assert (not spec.gpu or spec.executor == "ray") is in_this_process
    if not spec.gpu:  # the processes share the CPUs of the sampler
        threads = int(engine_environment(spec)["OMP_NUM_THREADS"])
        assert threads == max(1, int(config.sampling.cpus_per_sampler) // config.sampling.processes_per_sampler)
