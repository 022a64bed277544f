"""Readers and the writer of a read-write lock."""

import asyncio

import pytest

from aft_ray.serving.engine.read_write_lock import ReadWriteLock


def test_a_writer_is_alone_and_later_readers_wait_for_it():
    order = []

    async def read(lock, name, seconds):
        async with lock.shared():
            order.append(f"{name} in")
            await asyncio.sleep(seconds)
            order.append(f"{name} out")

    async def write(lock):
        async with lock.exclusive(5):
            order.append("alone in")
            await asyncio.sleep(0.02)
            order.append("alone out")

    async def run():
        lock = ReadWriteLock()
        first = asyncio.create_task(read(lock, "first", 0.05))
        await asyncio.sleep(0.01)
        writer = asyncio.create_task(write(lock))
        await asyncio.sleep(0.01)
        later = asyncio.create_task(read(lock, "later", 0))
        await asyncio.gather(first, writer, later)

    asyncio.run(run())
    assert order == ["first in", "first out", "alone in", "alone out", "later in", "later out"]


def test_a_writer_that_times_out_lets_readers_continue():
    async def run():
        lock = ReadWriteLock()
        async with lock.shared():
            with pytest.raises(TimeoutError):
                async with lock.exclusive(0.05):
                    pytest.fail("not alone")
            async with asyncio.timeout(1), lock.shared():
                pass

    asyncio.run(run())


def test_a_cancelled_reader_releases_the_lock():
    async def run():
        lock = ReadWriteLock()

        async def hold():
            async with lock.shared():
                await asyncio.sleep(60)

        call = asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        async with asyncio.timeout(1), lock.exclusive(1):
            pass

    asyncio.run(run())
