"""Sharing and excluding."""

import asyncio

import pytest

from aft_ray.serving.engine.read_write_lock import ReadWriteLock


def test_who_excludes_is_alone_and_is_not_overtaken():
    order = []

    async def share(gate, name, seconds):
        async with gate.shared():
            order.append(f"{name} in")
            await asyncio.sleep(seconds)
            order.append(f"{name} out")

    async def exclude(gate):
        async with gate.exclusive(5):
            order.append("alone in")
            await asyncio.sleep(0.02)
            order.append("alone out")

    async def all_of_it():
        gate = ReadWriteLock()
        first = asyncio.create_task(share(gate, "first", 0.05))
        await asyncio.sleep(0.01)
        alone = asyncio.create_task(exclude(gate))
        await asyncio.sleep(0.01)
        later = asyncio.create_task(share(gate, "later", 0))
        await asyncio.gather(first, alone, later)

    asyncio.run(all_of_it())
    assert order == ["first in", "first out", "alone in", "alone out", "later in", "later out"]


def test_who_cannot_have_it_alone_in_time_lets_the_others_go_on():
    async def all_of_it():
        gate = ReadWriteLock()
        async with gate.shared():
            with pytest.raises(TimeoutError):
                async with gate.exclusive(0.05):
                    pytest.fail("not alone")
            async with asyncio.timeout(1), gate.shared():
                pass

    asyncio.run(all_of_it())


def test_a_cancelled_call_leaves_the_gate():
    async def all_of_it():
        gate = ReadWriteLock()

        async def stay():
            async with gate.shared():
                await asyncio.sleep(60)

        call = asyncio.create_task(stay())
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        async with asyncio.timeout(1), gate.exclusive(1):
            pass

    asyncio.run(all_of_it())
