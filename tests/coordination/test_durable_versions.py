"""A version that is offered from memory is forgotten with its train workers, unless its model directory is complete."""

import asyncio

import pytest

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.coordination.coordinator import Coordinator, PeerFailed
from aft_ray.weights.version_manifest import VersionManifest


def early(version, **attributes):
    return VersionManifest(version, f"rounds/{version}", ("a",), (), durable=False, **attributes)


def late(version):
    return VersionManifest(version, f"rounds/{version}", ("a",), ())


def runs(test):
    """A test whose body is a coroutine that is given a coordinator."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(Coordinator()), 15))

    return run


def later(waiting):
    return asyncio.ensure_future(waiting)


async def soon() -> None:
    await asyncio.sleep(0.05)


@runs
async def test_a_version_that_was_only_in_memory_must_be_trained_again(coordinator):
    await coordinator.publish(late(0))
    await coordinator.begin_training()  # the first start forgets nothing
    assert (await coordinator.wait_version(0, 1))[0] == late(0)
    await coordinator.publish(early(1, receive_plan="objects"))
    assert (await coordinator.wait_version(1, 1))[0] == early(1, receive_plan="objects")
    await coordinator.begin_training()
    assert (await coordinator.wait_version(0, 1))[0] == late(0)
    waiting = later(coordinator.wait_version(1, 10))
    await soon()
    assert not waiting.done()
    await coordinator.publish(early(1, receive_plan="new objects"))
    assert (await waiting)[0] == early(1, receive_plan="new objects")


@runs
async def test_a_version_that_is_durable_outlives_its_train_workers_and_is_read_from_its_directory(coordinator):
    await coordinator.publish(early(1, receive_plan="objects", broadcast="an address"))
    await coordinator.set_durable(1)
    assert (await coordinator.wait_version(1, 1))[0].receive_plan == "objects"
    await coordinator.begin_training()
    assert (await coordinator.wait_version(1, 1))[0] == late(1)


@runs
async def test_who_waits_for_a_directory_waits_through_a_start_of_the_train_workers(coordinator):
    await coordinator.publish(early(1, broadcast="an address"))
    waiting = later(coordinator.wait_durable(1, 10))
    await coordinator.begin_training()
    await coordinator.publish(early(1, broadcast="a new address"))
    # The driver waits for the directory, so that no train worker waits for the driver.
    assert await coordinator.wait_broadcast(1, 0, 1, 10) is None
    assert not waiting.done()
    assert not await coordinator.is_durable(1)
    await coordinator.set_durable(1)
    await waiting
    assert await coordinator.is_durable(1)


@runs
async def test_a_version_that_is_published_from_disk_is_durable(coordinator):
    waiting = later(coordinator.wait_durable(1, 10))
    await soon()
    await coordinator.publish(late(1))
    await waiting


@runs
async def test_references_to_objects_are_taken_when_every_train_worker_has_given_its_own(coordinator):
    await coordinator.give_objects(1, 1, {"lost": "of a worker that has ended"})
    await coordinator.begin_training()
    await coordinator.give_objects(1, 0, {"a": 1})
    taking = later(coordinator.take_objects(1, 2, 10))
    await soon()
    assert not taking.done()
    await coordinator.give_objects(1, 1, {"b": 2, "c": 3})
    assert await taking == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(PeerFailed, match="waited 0 s for the train workers to put version 1 into the object store"):
        await coordinator.take_objects(1, 2, 0.1)


@runs
async def test_every_train_worker_hears_the_same_of_whether_the_driver_waits(coordinator):
    assert not await coordinator.is_requested(1)
    waiting = later(coordinator.wait_version(1, 10))
    await soon()
    assert not await coordinator.is_requested(1)  # as the first worker was told
    assert await coordinator.is_requested(0)
    await coordinator.publish(early(1, broadcast="an address"))
    await waiting
    group = BroadcastGroup(1, (Receiver("sampler 0", 1),))
    announced = later(coordinator.announce_broadcast(group, 10))
    assert await coordinator.wait_broadcast(1, 0, 1, 10) == group
    assert await announced is None
