"""Placement keeps every bundle inside one node, never uses resources twice, and names the numbers when it refuses."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aft_ray.cluster.connect import launcher_groups
from aft_ray.cluster.placement import Bundle, Node, NodeGroup, Reservation, Reservations, place
from aft_ray.config.run import ConfigError

FOR_DATA = Reservation("Ray Data task", 2, (Bundle(1),))


def samplers(count: int, gpus: int) -> Reservation:
    return Reservation("sampler", count, (Bundle(2, gpus),), "sampling.tensor_parallel_size")


def job(*entries: Reservation) -> Reservations:
    return Reservations((*entries, FOR_DATA), "Add nodes")


bundles = st.builds(Bundle, st.sampled_from([0.5, 1, 2, 8]), st.sampled_from([0, 0, 0.5, 1, 2, 4, 8]))
entries = st.builds(
    Reservation,
    st.sampled_from("abc"),
    st.integers(0, 4),
    st.lists(bundles, min_size=1, max_size=3).map(tuple),
    st.just("k"),
)
nodes = st.lists(st.builds(Node, st.just("n"), st.integers(0, 64), st.sampled_from([0, 1, 4, 8])), min_size=1)


@given(st.lists(entries, min_size=1, max_size=4), nodes)
def test_what_is_accepted_has_every_bundle_in_a_node_and_no_node_holds_more_than_it_has(entries, nodes):
    reservations = Reservations(tuple(entries), "Add nodes")
    try:
        assignments = place(reservations, nodes)
    except ConfigError:
        return
    wanted = Counter()
    for entry in entries:
        wanted[entry.name] += entry.count * len(entry.bundles)
    assert sum((Counter(dict(assignment.bundles)) for assignment in assignments), Counter()) == +wanted
    assert [assignment.node for assignment in assignments] == nodes
    for kind in ("cpus", "gpus"):
        assert all(getattr(assignment.free, kind) >= 0 for assignment in assignments)
        used = sum(getattr(assignment.node, kind) - getattr(assignment.free, kind) for assignment in assignments)
        assert used == pytest.approx(sum(entry.count * getattr(entry.each, kind) for entry in entries))


@given(st.integers(1, 12), st.sampled_from([1, 2, 4, 8]), st.integers(1, 12))
def test_alike_engines_fit_exactly_when_there_are_nodes_enough(count, gpus, nodes):
    cluster = [Node(f"n{i}", 100, 8) for i in range(nodes)]
    if count <= nodes * (8 // gpus):
        assert len(place(job(samplers(count, gpus)), cluster)) == nodes
    else:
        with pytest.raises(ConfigError, match="GPUs are needed and the cluster has"):
            place(job(samplers(count, gpus)), cluster)


@pytest.mark.parametrize(
    ("gpus_of_nodes", "sentence"),
    [
        ([8], r"^16 GPUs are needed and the cluster has 8: 2 samplers x \(8 GPUs and 2 CPUs\) \+ .*Add nodes$"),
        (
            [4, 4, 4, 4],
            r"one sampler needs 8 GPUs and 2 CPUs in one node, and the largest has 4 GPUs and 8 CPUs: lower ",
        ),
        ([8, 4, 4], r"but not node by node: .* 1 of 2 times 8 GPUs and 2 CPUs .* 4 GPUs and 8 CPUs on each of 2 nodes"),
    ],
)
def test_a_refusal_says_the_numbers_and_the_way_out(gpus_of_nodes, sentence):
    cluster = [Node(f"n{i}", 8, gpus) for i, gpus in enumerate(gpus_of_nodes)]
    with pytest.raises(ConfigError, match=sentence):
        place(job(samplers(2, 8)), cluster)


def test_engines_keep_off_the_cpus_and_cpus_off_the_gpu_nodes():
    head, worker = Node("head", 4, 0), Node("worker", 96, 8)
    on_head, on_worker = place(job(samplers(2, 4)), [head, worker])
    assert (dict(on_head.bundles), dict(on_worker.bundles)) == ({"Ray Data task": 2}, {"sampler": 2})
    assert on_worker.line().split() == ["worker", "4", "of", "96", "CPU", "8", "of", "8", "GPU", "2", "samplers"]


def test_nodes_that_may_still_come_count_up_to_the_autoscalers_limit():
    group = NodeGroup("h100", Bundle(96, 8), 3)
    assert len(group.startable(1, 10)) == 2
    assert len(group.startable(5, 10)) == 0
    assert len(NodeGroup("any", Bundle(1), None).startable(5, 10)) == 10
    with pytest.raises(ConfigError, match="32 GPUs are needed and the cluster can grow to 24"):
        place(job(samplers(4, 8)), group.startable(0, 10), "can grow to")


def test_the_launchers_config_says_which_groups_may_grow():
    config = {
        "max_workers": 6,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 8}},
            "gpu": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 4},
            "cpu": {"resources": {"CPU": 32}, "max_workers": 20},
        },
    }
    assert launcher_groups(config) == [NodeGroup("gpu", Bundle(96, 8), 4), NodeGroup("cpu", Bundle(32, 0), 6)]
