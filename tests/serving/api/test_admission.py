"""Keys, the bound on the queue, the bound on the body."""

import asyncio
import os

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aft_ray.config.run import ConfigError
from aft_ray.config.serve import AccessConfig, LimitsConfig
from aft_ray.serving.api import admission as guard
from aft_ray.serving.api.admission import Admission, BodyLimit, Keys
from aft_ray.serving.api.requests import Refusal


def test_each_key_of_the_file_opens_and_nothing_else_does(tmp_path):
    (tmp_path / "keys").write_text("# of the team\nfirst\n\n second \n")
    keys = Keys(AccessConfig(keys_file=str(tmp_path / "keys")))
    keys.check("Bearer first")
    keys.check("bearer second")
    for wrong in (None, "", "Bearer", "Bearer ", "Basic first", "Bearer # of the team", "Bearer firs", "Bearer Ω"):
        with pytest.raises(Refusal) as refused:
            keys.check(wrong)
        assert refused.value.status == 401
        assert refused.value.headers["WWW-Authenticate"] == "Bearer"


def test_a_changed_file_counts_and_a_missing_one_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_LOOK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("old")
    keys = Keys(AccessConfig(keys_file=str(file)))
    keys.check("Bearer old")
    file.write_text("newer")
    keys.check("Bearer newer")
    with pytest.raises(Refusal):
        keys.check("Bearer old")
    file.unlink()
    keys.check("Bearer newer")


def test_without_keys_it_serves_only_when_told_to_be_open(tmp_path, monkeypatch):
    monkeypatch.delenv("AFT_RAY_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"access\.keys_file.*AFT_RAY_API_KEYS.*access\.open=true"):
        Keys(AccessConfig())
    Keys(AccessConfig(open=True)).check(None)
    monkeypatch.setenv("AFT_RAY_API_KEYS", "one,two")
    with pytest.raises(Refusal):
        Keys(AccessConfig(open=True)).check(None)  # keys that are there count
    Keys(AccessConfig()).check("Bearer two")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(AccessConfig(keys_file=str(tmp_path / "none")))


def test_what_is_too_much_is_refused_at_once_and_told_when_to_come_again():
    async def all_of_it():
        admission = Admission(LimitsConfig(concurrency=2, queue=3))
        release = asyncio.Event()
        at_work = most_at_work = 0

        async def question():
            nonlocal at_work, most_at_work
            async with admission.enter(5):
                at_work += 1
                most_at_work = max(most_at_work, at_work)
                await release.wait()
                at_work -= 1

        calls = [asyncio.create_task(question()) for _ in range(9)]
        await asyncio.sleep(0.05)
        refused = [call.exception() for call in calls if call.done()]
        assert [error.status for error in refused] == [429] * 4
        assert all(int(error.headers["Retry-After"]) >= 1 for error in refused)
        release.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(error is None for error in done) == 5
        assert most_at_work == 2
        assert admission.inside == 0

    asyncio.run(all_of_it())


def test_the_deadline_counts_while_waiting_and_who_goes_away_leaves_the_queue():
    async def all_of_it():
        admission = Admission(LimitsConfig(concurrency=1, queue=2))
        async with admission.enter(1):
            with pytest.raises(Refusal) as late:
                async with admission.enter(0.05):
                    pytest.fail("there is one slot")
            assert late.value.status == 504

            async def wait():
                async with admission.enter(60):
                    pytest.fail("it went away")

            gone = asyncio.create_task(wait())
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert admission.inside == 1
        async with admission.enter(1):
            assert admission.inside == 1

    asyncio.run(all_of_it())


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_so(declared):
    client = TestClient(BodyLimit(Starlette(routes=[Route("/", echo, methods=["POST"])]), limit_bytes=1000))

    def send(size):
        body = os.urandom(size)
        return client.post("/", content=body if declared else iter([body[:10], body[10:]]))

    assert send(1000).text == "1000"
    with pytest.raises(Refusal) as refused:
        send(1001)
    assert refused.value.status == 413
    assert refused.value.body["error"]["type"] == "invalid_request_error"
