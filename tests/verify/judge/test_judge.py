"""A judge pays for each rating once, repeats only transient failures, and explains a failure in one sentence."""

import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import pytest
from judge_server import Answer, JudgeServer, chat, judge_server, rated, refusal

from aft_ray.config.run import ConfigError, JudgeConfig
from aft_ray.verify.judge.judge import Judge, JudgeCounts, JudgeFailed, RatingRequest


@pytest.fixture
def build(server, tmp_path):
    """A judge of the server, all of one cache."""

    def built(**settings) -> Judge:
        return Judge(JudgeConfig(**{"url": server.url, "attempts": 2, **settings}), tmp_path / "judge.sqlite")

    return built


def rating_request(response: str) -> RatingRequest:
    return RatingRequest(f"q-{response}", "how many coins?", "8 + 4 = 12. #### 12", response)


def rating_requests(count: int) -> list[RatingRequest]:
    return [rating_request(f"response {index}") for index in range(count)]


def failure(judge: Judge, wanted: list[RatingRequest]) -> str:
    with pytest.raises(JudgeFailed) as error:
        judge.rate(wanted)
    assert "\n" not in str(error.value)
    return str(error.value)


def of(server: JudgeServer, response: str) -> int:
    """How often the server was asked about a response."""
    return sum(f"\n{response}\n" in prompt for prompt in server.prompts)


def test_a_candidate_gets_the_mean_of_several_ratings(server, build):
    server.answer = lambda number, request: rated(4 + request["seed"])
    judge = build(ratings=3, temperature=0.5, max_tokens=99, seed=2)
    (rating,) = judge.rate([rating_request("8 + 4 = 13")])
    assert rating.reward == 7.0
    assert rating.evidence == ("I saw it.",) * 3
    assert rating.unparsable == 0
    assert sorted(request["seed"] for request in server.requests) == [2, 3, 4]
    for request in server.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.5, 99)
        assert "structured_outputs" not in request
    assert all(of(server, text) == 3 for text in ("how many coins?", "8 + 4 = 12. #### 12", "8 + 4 = 13"))
    assert judge.counts == JudgeCounts(calls=3, prompt_tokens=300, completion_tokens=30)


def test_ratings_come_in_the_order_of_the_requests(server, build):
    def answer(number: int, request: dict) -> Answer:
        rating = int(request["messages"][0]["content"].split("response ")[1].split("\n")[0])
        return Answer(body=rated(rating).body, after_s=0.2 / rating)

    server.answer = answer
    wanted = [rating_request(f"response {index}") for index in (3, 9, 1, 9, 5)]
    assert [rating.reward for rating in build(ratings=1).rate(wanted)] == [3, 9, 1, 9, 5]
    assert len(server.requests) == 4  # equal requests are sent once


def test_no_seed_and_guided_decoding_are_sent_when_configured(server, build):
    build(ratings=2, seed=None, guided=True).rate([rating_request("a")])
    assert all("seed" not in request for request in server.requests)
    assert all("Rating" in request["structured_outputs"]["regex"] for request in server.requests)
    assert len(server.requests) == 2


def test_nothing_is_asked_twice(server, build):
    first = build()
    ratings = first.rate(rating_requests(5))
    assert len(server.requests) == 15
    again = build()
    assert again.rate([*rating_requests(6)])[:5] == ratings
    assert len(server.requests) == 18
    assert (again.counts.hits, again.counts.calls - again.counts.retries) == (15, 3)
    assert again.rate([]) == []
    # other settings make another request; another URL does not
    build(temperature=0.7, ratings=1).rate(rating_requests(5))
    assert len(server.requests) == 23
    with judge_server() as elsewhere:
        build(url=elsewhere.url).rate(rating_requests(6))
        assert not elsewhere.requests
    both = first.counts + again.counts
    assert both.calls - both.retries == 18  # a busy machine may drop a connection


def test_threads_with_the_same_requests_send_each_once(server, build):
    server.answer = lambda number, request: Answer(body=rated(5).body, after_s=0.05)
    judge = build(ratings=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(judge.rate, [rating_requests(8)] * 4))
    assert len(server.requests) == 8
    assert all(result == results[0] for result in results)


def test_no_more_requests_are_in_flight_than_allowed(server, build):
    server.answer = lambda number, request: Answer(body=rated(5).body, after_s=0.05)
    build(concurrency=4).rate(rating_requests(10))
    assert server.most_in_flight == 4


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(500),
        refusal(503, "loading"),
        refusal(408),
        refusal(429),
        Answer(hang_up=True),
        Answer(body=rated(5).body, after_s=2.0),
    ],
    ids=["500", "503", "408", "429", "hang up", "timeout"],
)
def test_a_transient_failure_is_sent_again(server, build, trouble):
    server.answer = lambda number, request: trouble if number == 1 else rated(6)
    judge = build(ratings=1, timeout_s=1)
    assert judge.rate([rating_request("a")])[0].reward == 6
    assert (judge.counts.calls, judge.counts.retries) == (2, 1)


@pytest.mark.parametrize("dated", [False, True])
def test_a_retry_waits_for_as_long_as_the_endpoint_asks(server, build, dated):
    after = formatdate(time.time() + 4, usegmt=True) if dated else "3"
    server.answer = lambda number, request: refusal(429, Retry_After=after) if number == 1 else rated(6)
    start = time.monotonic()
    build(ratings=1).rate([rating_request("a")])
    assert 2.9 < time.monotonic() - start < 8


def test_an_endpoint_that_stays_down_fails_the_batch_and_loses_nothing(server, build):
    down = True

    def answer(number: int, request: dict) -> Answer:
        return refusal(503, "overloaded") if down and "response 7" in request["messages"][0]["content"] else rated(6)

    server.answer = answer
    said = failure(build(ratings=1, concurrency=2, attempts=2), rating_requests(12))
    assert said.startswith(f"the judge at {server.url} was asked 2 times and failed (HTTP 503: ")
    assert "overloaded" in said
    assert of(server, "response 7") == 2
    down = False
    assert all(rating.reward == 6 for rating in build(ratings=1).rate(rating_requests(12)))
    assert all(of(server, f"response {index}") == 1 for index in range(12) if index != 7)


def test_after_a_failure_the_replies_in_flight_are_stored(server, build):
    def answer(number: int, request: dict) -> Answer:
        return refusal(401) if "response 0" in request["messages"][0]["content"] else slow

    slow = Answer(body=rated(6).body, after_s=0.5)
    server.answer = answer
    failure(build(ratings=1, concurrency=4), rating_requests(20))
    assert len(server.requests) == 4
    server.answer = lambda number, request: rated(6)
    judge = build(ratings=1)
    judge.rate(rating_requests(20))
    assert judge.counts.hits == 3


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "feedback.judge.api_key_env"), (403, "feedback.judge.api_key_env"), (404, "feedback.judge.url")],
)
def test_another_failure_is_not_sent_again(server, build, status, words):
    server.answer = lambda number, request: refusal(status, "because")
    said = failure(build(attempts=5, ratings=1, concurrency=1), rating_requests(3))
    assert f"HTTP {status}" in said
    assert "because" in said
    assert words in said
    assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there(build):
    said = failure(build(url="http://127.0.0.1:9/v1", model="m", attempts=2), rating_requests(1))
    assert "http://127.0.0.1:9/v1 was asked 2 times and failed (no answer: Connection error.)" in said
    assert "feedback.judge.url" in said


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}),
        Answer(body=b"not json"),
        Answer(body=b"[]"),
        Answer(body=b"{}"),
        Answer(body=b'{"choices": [{"message": "hello"}]}'),
    ],
    ids=["html", "no json", "list", "empty", "no message"],
)
def test_an_endpoint_with_another_api(server, build, answer):
    server.answer = lambda number, request: answer
    said = failure(build(ratings=1), rating_requests(1))
    assert "does not answer as an OpenAI-compatible API does" in said
    server.models_answer = answer
    with pytest.raises(JudgeFailed):
        build().check()


def test_replies_without_a_rating_are_counted_and_left_out_of_the_mean(server, build):
    replies = {0: rated(4), 1: chat("I cannot tell."), 2: rated(7)}
    server.answer = lambda number, request: replies[request["seed"]]
    judge = build()
    (rating,) = judge.rate([rating_request("a")])
    assert (rating.reward, rating.unparsable, len(rating.evidence)) == (5.5, 1, 2)
    assert judge.counts.unparsable == 1
    # these replies are stored as well, and parsed again
    again = build()
    assert again.rate([rating_request("a")]) == [rating]
    assert (again.counts.calls, again.counts.hits, again.counts.unparsable) == (0, 3, 1)


@pytest.mark.parametrize(
    "answer",
    [
        chat(None),
        chat(""),
        chat("Evaluation Evidence: good\nRating: 1", finish_reason="length"),
        chat("half a pair: \ud800"),
        Answer(body=chat("").body.replace(b'"choices": [', b'"choices": [], "rest": [')),
    ],
    ids=["no text", "empty", "cut off", "surrogate", "no choice"],
)
def test_a_candidate_without_any_rating_gets_none(server, build, answer):
    server.answer = lambda number, request: answer if "\nbad\n" in request["messages"][0]["content"] else rated(6)
    good, bad = build().rate([rating_request("good"), rating_request("bad")])
    assert good.reward == 6
    assert (bad.reward, bad.evidence, bad.unparsable) == (None, (), 3)


def test_too_many_replies_without_a_rating_stop_the_batch_early(server, build):
    server.answer = lambda number, request: chat("What a fine solution.")
    said = failure(build(max_unparsable=0.1, concurrency=2), rating_requests(40))
    assert "13 of the first 13 replies" in said
    assert "feedback.judge.max_unparsable=0.1" in said
    assert "'What a fine solution.'" in said
    assert 13 <= len(server.requests) <= 14


def test_no_reply_without_a_rating_is_allowed_when_the_limit_is_zero(server, build):
    server.answer = lambda number, request: chat("Hm.") if number == 3 else rated(5)
    assert "1 of the first" in failure(build(max_unparsable=0), rating_requests(2))


def test_a_request_that_the_endpoint_refuses_costs_its_candidate_only(server, build):
    def answer(number: int, request: dict) -> Answer:
        too_long = "response 1\n" in request["messages"][0]["content"]
        return refusal(400, "maximum context length is 4096 tokens") if too_long else rated(6)

    server.answer = answer
    judge = build()
    ratings = judge.rate(rating_requests(3))
    assert [rating.reward for rating in ratings] == [6, None, 6]
    assert (judge.counts.refused, judge.counts.retries, judge.counts.unparsable) == (3, 0, 0)
    server.answer = lambda number, request: refusal(400, "seed is not supported")
    assert "was refused: " in (said := failure(build(temperature=0), rating_requests(40)))
    assert "seed is not supported" in said


def test_check_names_the_model(server, build):
    server.models = ["first", "second"]
    assert build().check() == "first"
    assert build(model="second").check() == "second"
    with pytest.raises(ConfigError, match=r"has no model third; set feedback.judge.model to one .*: first, second"):
        build(model="third").check()
    build(ratings=1).rate(rating_requests(1))
    assert server.requests[0]["model"] == "first"


def test_check_fails_at_once(server, build):
    start = time.monotonic()
    with pytest.raises(JudgeFailed, match="asked once and failed"):
        build(url="http://127.0.0.1:9/v1", attempts=9).check()
    server.models_answer = refusal(401)
    with pytest.raises(JudgeFailed, match="api_key_env"):
        build(attempts=9).check()
    server.models_answer, server.models = None, []
    with pytest.raises(JudgeFailed, match="lists no model"):
        build(attempts=9).check()
    assert time.monotonic() - start < 10


def test_the_key_is_the_one_that_the_config_names(server, build, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-you")
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.delenv("NO_KEY", raising=False)
    build(ratings=1).rate(rating_requests(1))
    build(ratings=1, api_key_env="MY_KEY").rate([rating_request("other")])
    assert not any("not-for-you" in key for key in server.keys)
    assert server.keys[-1] == "Bearer secret"
    with pytest.raises(ConfigError, match=r"NO_KEY, which .* is not set"):
        build(api_key_env="NO_KEY").check()


def test_a_cache_that_cannot_be_used_is_a_failure_before_anything_is_paid(server, build, tmp_path):
    (tmp_path / "judge.sqlite").write_text("no database, and long enough to look at " * 100)
    assert "cannot be used" in failure(build(), rating_requests(1))
    assert not server.requests
