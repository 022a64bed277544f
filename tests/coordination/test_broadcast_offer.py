"""Driver and train workers meet before a broadcast, or neither waits for the other: the same answer reaches all."""

import asyncio
import time
from dataclasses import dataclass

import pytest

from aft_ray.coordination.broadcast_group import BroadcastGroup, Receiver
from aft_ray.coordination.coordinator import Coordinator, PeerFailed

LONG_S, SHORT_S = 30.0, 0.2


@dataclass(frozen=True)
class Offered:
    """A version manifest, as far as the coordinator reads it."""

    version: int
    broadcast: object | None = "an address"
    durable: bool = False

    def once_durable(self):
        return Offered(self.version, None, True)


def group(version, *names) -> BroadcastGroup:
    return BroadcastGroup(version, tuple(Receiver(name, 1) for name in names))


def come(coordinator, version, rank=0, workers=1, timeout_s=LONG_S):
    """A train worker that comes to the broadcast of a version."""
    return asyncio.ensure_future(coordinator.wait_broadcast(version, rank, workers, timeout_s))


def announce(coordinator, version, timeout_s=LONG_S):
    return asyncio.ensure_future(coordinator.announce_broadcast(group(version, "sampler 0"), timeout_s))


def runs(test):
    """A test whose body is a coroutine that is given a coordinator. It may not last as long as a LONG_S wait."""

    def run() -> None:
        async def within_time() -> None:
            await asyncio.wait_for(test(Coordinator()), LONG_S / 2)

        asyncio.run(within_time())

    return run


async def soon() -> None:
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("driver_first", [True, False])
def test_engines_join_once_every_train_worker_has_come(driver_first):
    @runs
    async def check(coordinator):
        await coordinator.publish(Offered(1))
        if driver_first:
            announced = announce(coordinator, 1)
            await soon()
            workers = [come(coordinator, 1, rank, 2) for rank in range(2)]
        else:
            workers = [come(coordinator, 1, 1, 2)]
            await soon()
            announced = announce(coordinator, 1)
            await soon()
            assert not announced.done()  # worker 0, which sends, is not there
            workers.append(come(coordinator, 1, 0, 2))
        assert await announced is None
        assert await asyncio.gather(*workers) == [group(1, "sampler 0")] * 2

    check()


@runs
async def test_a_train_worker_that_comes_after_the_driver_has_gone_on_waits_for_nobody(coordinator):
    for version in range(1, 4):  # each round
        await coordinator.publish(Offered(version))
        reason = await announce(coordinator, version, SHORT_S)
        assert reason == (
            f"the train workers did not come to the broadcast of version {version} within 0 s (weights.timeout_s)"
        )
        began = time.monotonic()
        assert await asyncio.gather(*(come(coordinator, version, rank, 2) for rank in range(2))) == [None, None]
        assert time.monotonic() - began < 1


@runs
async def test_a_driver_that_times_out_while_one_train_worker_is_missing_sends_the_others_on(coordinator):
    await coordinator.publish(Offered(1))
    first = come(coordinator, 1, 1, 2)
    assert await announce(coordinator, 1, SHORT_S) is not None
    assert await first is None
    assert await come(coordinator, 1, 0, 2) is None


@runs
async def test_a_train_worker_that_times_out_ends_the_offer_for_all(coordinator):
    await coordinator.publish(Offered(1))
    second = come(coordinator, 1, 1, 2)
    assert await come(coordinator, 1, 0, 2, SHORT_S) is None
    assert await second is None
    began = time.monotonic()
    assert await announce(coordinator, 1) == "the train workers do not offer the broadcast of version 1 any more"
    assert time.monotonic() - began < 1


@runs
async def test_a_train_worker_waits_no_longer_when_the_driver_asks_for_a_later_version(coordinator):
    await coordinator.publish(Offered(1))
    workers = [come(coordinator, 1, 0, 2)]
    later = asyncio.ensure_future(coordinator.wait_version(3, LONG_S))
    assert await workers[0] is None
    assert await come(coordinator, 1, 1, 2) is None
    assert await announce(coordinator, 1) is not None
    await coordinator.publish(Offered(3))
    assert (await later)[0] == Offered(3)
    third = come(coordinator, 3)
    assert await announce(coordinator, 3) is None
    assert await third == group(3, "sampler 0")
    assert await announce(coordinator, 3) is not None  # a version is broadcast once


@runs
async def test_no_train_worker_waits_when_no_engine_needs_the_version(coordinator):
    await coordinator.publish(Offered(1))
    assert await coordinator.announce_broadcast(group(1), LONG_S) is not None
    assert await come(coordinator, 1) is None


@runs
async def test_a_train_worker_may_come_before_worker_0_has_published(coordinator):
    early = come(coordinator, 1, 1, 2)
    await soon()
    await coordinator.publish(Offered(1))
    announced = announce(coordinator, 1)
    await soon()
    assert not announced.done()
    assert await come(coordinator, 1, 0, 2) == group(1, "sampler 0")
    assert await early == group(1, "sampler 0")
    assert await announced is None


@runs
async def test_train_workers_that_start_again_end_the_offers_of_their_predecessors(coordinator):
    await coordinator.publish(Offered(1))
    lost = come(coordinator, 1, 1, 2)
    waiting = announce(coordinator, 1)
    await soon()
    await coordinator.begin_training()
    assert "do not offer" in await waiting
    assert await lost is None
    # They train the version again, and offer it again: the answers to their predecessors are not theirs.
    early = come(coordinator, 1, 1, 2)
    await soon()
    await coordinator.publish(Offered(1))
    announced = announce(coordinator, 1)
    assert await come(coordinator, 1, 0, 2) == await early == group(1, "sampler 0")
    assert await announced is None
    # A version that is published from disk is not offered.
    await coordinator.publish(Offered(2))
    await coordinator.publish(Offered(2, None))
    assert await announce(coordinator, 2) is not None


@runs
async def test_a_failure_ends_the_waits_of_both_sides(coordinator):
    await coordinator.publish(Offered(1))
    waits = [announce(coordinator, 1), come(coordinator, 1, 0, 2)]
    await soon()
    await coordinator.fail("a reason")
    for wait in waits:
        with pytest.raises(PeerFailed, match="a reason"):
            await wait
