"""The bounds on the questions that are answered or waiting."""

import asyncio

import pytest

from aft_ray.config.serve import LimitsConfig
from aft_ray.serving.api.admission import AdmissionQueue
from aft_ray.serving.api.errors import ApiError


def test_a_question_above_the_bounds_is_rejected_at_once_with_a_retry_after():
    async def run():
        admission = AdmissionQueue(LimitsConfig(concurrency=2, queue=3))
        release = asyncio.Event()
        answering = most_answering = 0

        async def question():
            nonlocal answering, most_answering
            async with admission.admit(5):
                answering += 1
                most_answering = max(most_answering, answering)
                await release.wait()
                answering -= 1

        calls = [asyncio.create_task(question()) for _ in range(9)]
        await asyncio.sleep(0.05)
        refused = [call.exception() for call in calls if call.done()]
        assert [error.status for error in refused] == [429] * 4
        assert all(int(error.headers["Retry-After"]) >= 1 for error in refused)
        release.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(error is None for error in done) == 5
        assert most_answering == 2
        assert admission.in_progress == 0

    asyncio.run(run())


def test_the_deadline_includes_the_wait_and_a_cancelled_question_leaves_the_queue():
    async def run():
        admission = AdmissionQueue(LimitsConfig(concurrency=1, queue=2))
        async with admission.admit(1):
            with pytest.raises(ApiError) as late:
                async with admission.admit(0.05):
                    pytest.fail("there is one slot")
            assert late.value.status == 504

            async def wait():
                async with admission.admit(60):
                    pytest.fail("it was admitted after its cancellation")

            cancelled = asyncio.create_task(wait())
            await asyncio.sleep(0.01)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert admission.in_progress == 1
        async with admission.admit(1):
            assert admission.in_progress == 1

    asyncio.run(run())
