"""What runs, evaluations and services reserve, and the bundles of an engine."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from aft_ray.cluster.placement import Node, place
from aft_ray.cluster.reservations import (
    evaluation_reservations,
    placement_group_bundles,
    sampler_bundles,
    serving_reservations,
    stages_are_whole,
    training_reservations,
)
from aft_ray.config.run import ConfigError
from aft_ray.config.serve import ServeConfig


def sampling(**keys):
    return tiny_config(Path("/run"), Path("m"), sampling=keys).sampling


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1.0, 2.0, 8.0, 16.0]))
def test_a_placement_group_reserves_what_the_check_counts(tensor, pipeline, gpu, cpus):
    config = sampling(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        cpus_per_sampler=cpus,
        gpus_per_sampler=tensor * pipeline if gpu else 0,
    )
    bundles, planned = placement_group_bundles(config), sampler_bundles(config)
    assert sum(bundle["CPU"] for bundle in bundles) == pytest.approx(sum(bundle.cpus for bundle in planned))
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == sum(bundle.gpus for bundle in planned)
    if gpu and pipeline > 1:  # vLLM's Ray executor takes bundles of one GPU
        assert [bundle["GPU"] for bundle in bundles] == [1] * (tensor * pipeline)
        assert [bundle.gpus for bundle in planned] == [tensor] * pipeline
    else:
        assert len(bundles) == len(planned) == 1


@pytest.mark.parametrize(
    ("on_nodes", "tensor", "whole"),
    [([8, 8], 8, True), ([4, 8, 4], 4, True), ([5, 8, 3], 8, False), ([4, 4], 8, False)],
)
def test_the_processes_of_a_stage_share_a_node(on_nodes, tensor, whole):
    assert stages_are_whole(on_nodes, tensor) is whole


def test_the_stages_of_an_engine_may_lie_on_different_nodes_but_the_processes_of_a_stage_may_not(tmp_path):
    config = tiny_config(
        tmp_path,
        Path("m"),
        sampling={
            "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "gpus_per_sampler": 8, "cpus_per_sampler": 8
        },
    )  # fmt: skip
    reservations = training_reservations(config)
    assert (reservations.cpus, reservations.gpus) == (8 + 1 + 2, 8)
    assert any("2 stages of 4 in one node" in line for line in reservations.lines())
    assignments = place(reservations, [Node("a", 8, 4), Node("b", 8, 4)])
    assert [dict(assignment.bundles)["sampler"] for assignment in assignments] == [1, 1]
    with pytest.raises(ConfigError, match="one sampler needs 4 GPUs and 4 CPUs in one node"):
        place(reservations, [Node(f"n{i}", 8, 3) for i in range(4)])


def test_colocated_samplers_take_no_gpus_beside_the_train_workers_but_have_their_own_in_an_evaluation(tmp_path):
    config = tiny_config(
        tmp_path,
        Path("m"),
        sampling={"colocate": True, "samplers": 2, "tensor_parallel_size": 2, "gpus_per_sampler": 2},
        training={"workers": 4, "gpus_per_worker": 1, "zero_stage": 2},
    )
    assert (training_reservations(config).gpus, training_reservations(config).cpus) == (4, 2 + 4 + 2)
    assert evaluation_reservations(config).gpus == 4


def test_a_service_reserves_whole_engines():
    serve = ServeConfig.model_validate(
        {"model": "m", "engine": {"replicas": 2, "tensor_parallel_size": 2, "cpus": 1, "gpus": 1}}
    )
    assert serving_reservations(serve).gpus == 4
    with pytest.raises(ConfigError, match="one engine needs 2 GPUs and 2 CPUs in one node"):
        place(serving_reservations(serve), [Node(f"n{i}", 8, 1) for i in range(8)])
