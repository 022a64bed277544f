"""Engines on the train workers' GPUs: each inside a node, none shared, and a refusal when they do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aft_ray.cluster.colocated_placement import EnginePlacement, WorkerPlacement, engine_placements


def seats_of(gpus_on_nodes: list[int]) -> list[WorkerPlacement]:
    """One worker a GPU, ranks going through the nodes in turn."""
    places = sorted((gpu, node) for node, count in enumerate(gpus_on_nodes) for gpu in range(count))
    return [WorkerPlacement(rank, len(places), f"node-{node}", (str(gpu),)) for rank, (gpu, node) in enumerate(places)]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8]), st.data())
def test_every_engine_has_gpus_of_its_own_in_one_node(gpus_on_nodes, size, data):
    placements = seats_of(gpus_on_nodes)
    fit = sum(count // size for count in gpus_on_nodes)
    engines = data.draw(st.integers(1, max(1, fit + 1)))
    if engines > fit:
        with pytest.raises(ValueError, match=f"{engines} colocated samplers need {size} GPUs .*: {fit} fit; lower"):
            engine_placements(placements, engines, size)
        return
    found = engine_placements(data.draw(st.permutations(placements)), engines, size)
    assert found == engine_placements(placements, engines, size)
    assert [len(seat.gpus) for seat in found] == [size] * engines
    taken = [(seat.node, gpu) for seat in found for gpu in seat.gpus]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= {(seat.node, gpu) for seat in placements for gpu in seat.gpus}


def test_without_gpus_engines_go_in_turn_to_the_workers_nodes():
    placements = [WorkerPlacement(0, 2, "a", ()), WorkerPlacement(1, 2, "b", ())]
    assert engine_placements(placements, 3, 0) == (
        EnginePlacement("a", ()),
        EnginePlacement("b", ()),
        EnginePlacement("a", ()),
    )
