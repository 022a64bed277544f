"""Engines on the train workers' GPUs lie inside one node each and share no GPU; too many of them are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aft_ray.cluster.colocated_placement import EnginePlacement, WorkerPlacement, engine_placements


def workers_on(gpus_on_nodes: list[int]) -> list[WorkerPlacement]:
    """One worker for each GPU; consecutive ranks lie on different nodes."""
    gpu_nodes = sorted((gpu, node) for node, count in enumerate(gpus_on_nodes) for gpu in range(count))
    return [
        WorkerPlacement(rank, len(gpu_nodes), f"node-{node}", (str(gpu),)) for rank, (gpu, node) in enumerate(gpu_nodes)
    ]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8]), st.data())
def test_every_engine_has_gpus_of_its_own_in_one_node(gpus_on_nodes, size, data):
    placements = workers_on(gpus_on_nodes)
    fit = sum(count // size for count in gpus_on_nodes)
    engines = data.draw(st.integers(1, max(1, fit + 1)))
    if engines > fit:
        with pytest.raises(ValueError, match=f"{engines} colocated samplers need {size} GPUs .*: {fit} fit; lower"):
            engine_placements(placements, engines, size)
        return
    found = engine_placements(data.draw(st.permutations(placements)), engines, size)
    assert found == engine_placements(placements, engines, size)
    assert [len(engine.gpus) for engine in found] == [size] * engines
    taken = [(engine.node, gpu) for engine in found for gpu in engine.gpus]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= {(worker.node, gpu) for worker in placements for gpu in worker.gpus}


def test_without_gpus_engines_go_in_turn_to_the_workers_nodes():
    placements = [WorkerPlacement(0, 2, "a", ()), WorkerPlacement(1, 2, "b", ())]
    assert engine_placements(placements, 3, 0) == (
        EnginePlacement("a", ()),
        EnginePlacement("b", ()),
        EnginePlacement("a", ()),
    )
