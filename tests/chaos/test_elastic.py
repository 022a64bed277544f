"""Nodes are lost and added in a Ray cluster of several: samplers leave and join, and engines get their GPUs."""

import os
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from tiny import tiny_config

from aft_ray.cluster.connect import connected
from aft_ray.cluster.placement import Bundle, Reservation, Reservations
from aft_ray.config.run import ClusterConfig as ClusterKeys
from aft_ray.config.run import ConfigError
from aft_ray.sampling.placement_groups import (
    actor_options,
    create_placement_group,
    remove_placement_groups,
    wait_for_placement_group,
)
from aft_ray.sampling.sampler_handles import SamplerHandles
from aft_ray.sampling.sampler_health import SamplersFailed
from aft_ray.sampling.sampler_pool import SamplerPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STORE = 100 << 20
ON_RAY = ClusterKeys()  # the cluster that this process is connected to
# A sampler takes a node of its own: the head has too few CPUs for one, and the others for two.
HEAD_CPUS, NODE_CPUS, SAMPLER_CPUS = 2, 3, 2.5


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine a node starts slowly
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": HEAD_CPUS, "object_store_memory": STORE, "include_dashboard": False},
    )
    ray.init(cluster.address, log_to_driver=False)
    # Workers on the other nodes cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE)


class Idle:
    """An actor that answers as a sampler does, without an engine."""

    async def status(self) -> dict:
        return {}


def idle_pool(config, minimum: int, timeout_s: float, changes: list) -> SamplerPool:
    groups = [create_placement_group(index, config.sampling) for index in range(config.sampling.samplers)]
    actors = [
        ray.remote(Idle).options(**actor_options(group, config.sampling), max_restarts=3).remote() for group in groups
    ]
    logs = tuple(f"sampler-{index}.log" for index in range(len(groups)))
    return SamplerPool(SamplerHandles(tuple(actors), tuple(groups), logs, minimum, timeout_s, 10, 1e-4), changes.append)


def test_a_sampler_without_a_place_is_waited_for_only_while_it_must_be_and_joins_when_a_node_comes(
    cluster, tiny_model, tmp_path
):
    config = tiny_config(tmp_path, tiny_model, sampling={"samplers": 2, "cpus_per_sampler": SAMPLER_CPUS})
    nodes, changes = [add_node(cluster)], []
    pool = idle_pool(config, 1, 5, changes)
    try:
        (ready,) = pool.wait_ready()
        sentence = (
            rf"^1 of 2 samplers answer and 2 must .*, after 5 s .*; sampler {1 - ready}: it waits for 2.5 CPUs in one "
            rf"node; free are .*0 GPUs and 0.5 CPUs on .* \(its output: sampler-{1 - ready}.log\)$"
        )
        with pytest.raises(SamplersFailed, match=sentence):
            pool.wait_ready(2)
        nodes.append(add_node(cluster))
        deadline = time.monotonic() + 60
        while len(pool.handles().ready) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert [(change.sampler, change.ready, change.reason) for change in changes] == [
            (ready, 1, None),
            (1 - ready, 2, None),
        ]
        ray.kill(pool.actors[0], no_restart=True)
        while 0 in pool.handles().ready:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        sentence = r"^1 of 2 samplers answer and 2 must .*; sampler 0: Ray does not restart it any more"
        with pytest.raises(SamplersFailed, match=sentence):
            pool.wait_ready(2)
    finally:
        pool.close()
        for node in nodes:
            cluster.remove_node(node)
    groups = pool.handles().placement_groups
    assert [placement_group_table(group)["state"] for group in groups] == ["REMOVED", "REMOVED"]


class Placed:
    """An actor that is placed like a sampler."""

    def gpus(self) -> tuple[str, list[str]]:
        return os.environ.get("CUDA_VISIBLE_DEVICES", ""), ray.get_runtime_context().get_accelerator_ids()["GPU"]

    def bundles_of_vllm(self, config) -> tuple[bool, list[bool]]:
        """Whether vLLM uses the placement group of this actor, and which of its processes are on this actor's node."""
        from vllm.config import ParallelConfig
        from vllm.platforms import current_platform
        from vllm.v1.executor import ray_utils

        wait_for_placement_group(config.tensor_parallel_size, 30)
        # Without GPUs vLLM refuses its Ray executor. These nodes only declare GPUs, so this makes vLLM count them.
        type(current_platform).ray_device_key = "GPU"
        group = ray.util.get_current_placement_group()
        parallel = ParallelConfig(
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            distributed_executor_backend="ray",
            placement_group=group,
        )
        ray_utils.initialize_ray_cluster(parallel, require_gpu_on_driver=False)
        here = ray.get_runtime_context().get_node_id()
        nodes = [node for _, node, _ in ray_utils.get_bundles_sorted_by_node(parallel.placement_group)]
        return parallel.placement_group.id == group.id, [node == here for node in nodes]


@pytest.mark.parametrize("stages", [1, 2])
def test_an_engine_has_its_gpus_and_vllm_opens_no_group_inside_its_group(cluster, tiny_model, tmp_path, stages):
    """The GPUs are only declared to Ray, which assigns and announces them like real ones."""
    sampling = tiny_config(
        tmp_path,
        tiny_model,
        sampling={
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": stages,
            "gpus_per_sampler": 2 * stages,
            "cpus_per_sampler": 2 * stages,
        },
    ).sampling
    nodes = [cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=STORE) for _ in range(stages)]
    group = create_placement_group(0, sampling)
    actor = ray.remote(Placed).options(**actor_options(group, sampling)).remote()
    try:
        if stages == 1:
            visible, gpus = ray.get(actor.gpus.remote(), timeout=60)
            assert visible.split(",") == gpus
            assert sorted(gpus) == ["0", "1"]
        else:
            taken, here = ray.get(actor.bundles_of_vllm.remote(sampling), timeout=300)
            assert taken
            assert here == [True, True, False, False]
    finally:
        ray.kill(actor)
        remove_placement_groups([group])
        for node in nodes:
            cluster.remove_node(node)


def test_what_an_autoscaler_may_add_counts(cluster):
    """The limits are reported to Ray as an autoscaler's provider does; no autoscaler runs here."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    def job(gpus: float) -> Reservations:
        samplers = Reservation("sampler", 2, (Bundle(1, gpus),), "sampling.tensor_parallel_size")
        return Reservations((samplers,), "Add nodes")

    with pytest.raises(ConfigError, match="16 GPUs are needed and the cluster has 0"), connected(ON_RAY, job(8)):
        pass
    group = NodeGroupConfig(name="gpus", max_count=2, resources={"CPU": 8, "GPU": 8})
    reported = ClusterConfig(node_group_configs=[group]).SerializeToString()
    GcsClient(cluster.address).report_cluster_config(reported)
    with connected(ON_RAY, job(8)) as places:
        assert [place.node.name for place in places if place.bundles] == ["gpus (to come)"] * 2
    with (
        pytest.raises(ConfigError, match="18 GPUs are needed and the cluster can grow to 16"),
        connected(ON_RAY, job(9)),
    ):
        pass
