"""What arrives is compared with what the sender announced, tensor by tensor."""

import pytest
import torch

from aft_ray.weights.arrivals import Arrivals
from aft_ray.weights.broadcast.buckets import DIGESTS
from aft_ray.weights.digests import tensor_digest

SENT = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(5)}
ANNOUNCED = {name: tensor_digest(tensor) for name, tensor in SENT.items()}


def arrived(tensors, announced=ANNOUNCED):
    arrivals = Arrivals()
    arrivals.announce(announced)
    assert [name for name, _ in arrivals.watch(tensors)] == [name for name, _ in tensors]
    return arrivals.problem()


def test_nothing_is_wrong_with_what_was_sent_in_any_order():
    assert arrived(list(SENT.items())) == ""
    assert arrived(list(SENT.items())[::-1]) == ""


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ([("a", SENT["a"]), ("b", SENT["b"] * 1.01), ("c", SENT["c"])], "the tensor b is not what the trainer sent"),
        ([("a", SENT["a"]), ("b", SENT["c"]), ("c", SENT["b"])], "the tensor b is not what the trainer sent"),
        ([("a", SENT["a"].T), ("b", SENT["b"]), ("c", SENT["c"])], "the tensor a is not what the trainer sent"),
        ([("a", SENT["a"]), ("c", SENT["c"])], "the tensor b did not arrive"),
        ([], "the tensor a did not arrive"),
        ([*SENT.items(), ("d", SENT["b"])], "the tensor d arrived, of which the trainer sent no digest"),
        ([*SENT.items(), ("c", SENT["c"])], "the tensor c arrived twice"),
    ],
)
def test_what_differs_is_named(tensors, problem):
    assert arrived(tensors).startswith(problem)


def test_files_of_other_programs_have_no_digests_to_compare():
    assert arrived(list(SENT.items()), {}) == ""


def broadcast(digests, tensors=SENT):
    arrivals = Arrivals()
    arrivals.announce_order([*SENT, DIGESTS])
    end = [(DIGESTS, torch.tensor(digests).view(torch.uint8))] if digests else []
    assert [name for name, _ in arrivals.watch([*tensors.items(), *end])] == list(tensors)
    return arrivals.problem()


def test_a_broadcast_has_the_digests_at_its_end():
    assert broadcast(list(ANNOUNCED.values())) == ""
    assert "the tensor b is not" in broadcast(list(ANNOUNCED.values()), {**SENT, "b": SENT["c"]})


def test_a_broadcast_without_digests_or_without_a_tensor_is_refused():
    assert broadcast([]) == "the tensor a arrived, of which the trainer sent no digest"
    assert broadcast(list(ANNOUNCED.values()), {"a": SENT["a"]}) == "the tensor b did not arrive"
