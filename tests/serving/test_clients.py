"""The running service, tested with clients from elsewhere: OpenAI's package, curl, httpx and a Prometheus scrape."""

import contextlib
import json
import math
import os
import re
import subprocess
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import ENDLESS, ROOT, TURN_END, Reasoner

# The first test includes the training of the model and the start of the service.
pytestmark = pytest.mark.timeout(900)
ERROR_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "server_error",
}
# A question that takes seconds, for clients that disconnect before its answer.
LONG = {"question": ENDLESS, "n": 64, "max_tokens": 450, "temperature": 0.5, "stop_confidence": 1}


@pytest.fixture
def http(reasoner: Reasoner):
    with reasoner.client() as client:
        yield client


@pytest.fixture
def client(reasoner: Reasoner):
    with openai.OpenAI(base_url=f"{reasoner.url}/v1", api_key=reasoner.key, max_retries=0, timeout=120) as found:
        yield found


def ask(http: httpx.Client, question: str, **how) -> dict:
    answer = http.post("/v1/reason", json={"question": question, **how})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, **body) -> list[tuple[str, dict]]:
    with http.stream("POST", "/v1/reason", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            (name, data) = lines
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def in_common(one: dict, other: dict) -> set[int]:
    """Returns the indices that both answers have candidates of, and asserts that these candidates are equal.

    Scores may differ in their last digits with what else the engine is doing.
    """
    ours, theirs = ({row["index"]: row for row in answer["candidates"]} for answer in (one, other))
    shared = ours.keys() & theirs.keys()
    for index in shared:
        for name in ("response", "answer", "tokens", "finish_reason"):
            assert ours[index][name] == theirs[index][name]
        assert ours[index]["score"] == pytest.approx(theirs[index]["score"], abs=1e-3)
    return shared


def indices(answer: dict) -> set[int]:
    return {row["index"] for row in answer["candidates"]}


def wait_for(condition, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return found


def refused(answer: httpx.Response, status: int, *, param: str | None, says: str) -> None:
    """Asserts that a response has OpenAI's error body, with `says` in its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ERROR_TYPES
    assert error["param"] == param
    assert says in error["message"], error["message"]
    assert "Traceback" not in answer.text


# ── OpenAI's package ──────────────────────────────────────────────────────────────────────────────────────────────────


def messages(question: str) -> list:
    return [{"role": "user", "content": question}]


def test_openai_lists_the_model(client, reasoner):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == (reasoner.model, "aft_ray", "model")
    assert client.models.retrieve(reasoner.model).id == reasoner.model


def test_openai_chat_gives_the_winning_response(client, reasoner):
    done = client.chat.completions.create(model=reasoner.model, messages=messages(reasoner.problems[0]), seed=1)
    (choice,) = done.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert f"#### {done.aft_ray['answer']}" in choice.message.content
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens > 0
    assert "ignored" not in done.aft_ray


@pytest.mark.parametrize("include_usage", [True, False])
def test_openai_chat_streams_what_it_gives_whole(client, reasoner, include_usage):
    how = {"model": reasoner.model, "messages": messages(reasoner.problems[1]), "seed": 3}
    how["extra_body"] = {"stop_confidence": 1, "strategy": "score"}
    whole = client.chat.completions.create(**how)
    chunks = list(
        client.chat.completions.create(**how, stream=True, stream_options={"include_usage": include_usage})
        if include_usage
        else client.chat.completions.create(**how, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert told == ([whole.usage] if include_usage else [])
    last = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [chunk.choices[0].finish_reason for chunk in last] == ["stop"]
    assert last[0].aft_ray["answer"] == whole.aft_ray["answer"]


def test_openai_chat_streams_a_greedy_response_token_by_token(client, reasoner):
    how = {"model": reasoner.model, "messages": messages(reasoner.problems[2]), "temperature": 0}
    whole = client.chat.completions.create(**how)
    pieces = []
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
        usage = chunk.usage
    assert "".join(pieces) == whole.choices[0].message.content
    # The end-of-sequence token has no text.
    assert len(pieces) > usage.completion_tokens // 2
    assert usage == whole.usage
    assert whole.aft_ray["strategy"] == "greedy"


def test_openai_gets_as_many_choices_as_it_asks_for_however_sure_the_winner_is(client, reasoner):
    answer = client.chat.completions.create(
        model=reasoner.model,
        messages=[{"role": "user", "content": reasoner.problems[0]}],
        n=5,
        seed=4,
        extra_body={"best_of": 8, "strategy": "vote", "stop_confidence": 0.5},
    )
    assert [choice.index for choice in answer.choices] == list(range(5))


def test_openai_gets_the_best_of_several_as_choices(client, reasoner):
    done = client.chat.completions.create(
        model=reasoner.model,
        messages=messages(reasoner.problems[3]),
        n=2,
        seed=5,
        extra_body={
            "best_of": 6, "strategy": "score", "stop_confidence": 1, "include_candidates": True, "top_k": 3, "user": "x"
        },
    )  # fmt: skip
    candidates = done.aft_ray["candidates"]
    assert len(candidates) == done.aft_ray["sampling"]["sampled"] == 6
    assert [choice.index for choice in done.choices] == [0, 1]
    assert [choice.message.content for choice in done.choices] == [row["response"] for row in candidates[:2]]
    scores = [row["score"] for row in candidates]
    assert scores == sorted(scores, reverse=True)
    assert done.aft_ray["seed"] == 5
    assert done.aft_ray["ignored"] == ["top_k", "user"]
    chunks = client.chat.completions.create(
        model=reasoner.model,
        messages=messages(reasoner.problems[3]),
        n=2,
        seed=5,
        stream=True,
        extra_body={"best_of": 6, "strategy": "score", "stop_confidence": 1},
    )
    texts = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert dict(texts) == {choice.index: choice.message.content for choice in done.choices}


def test_openai_completes_prompts_of_every_shape(client, reasoner):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reasoner.model_directory)
    first, second = reasoner.problems[4:6]
    how = {"model": reasoner.model, "temperature": 0, "max_tokens": 40}
    one = client.completions.create(prompt=first, **how)
    other = client.completions.create(prompt=second, **how)
    both = client.completions.create(prompt=[first, second], **how)
    assert [choice.text for choice in both.choices] == [one.choices[0].text, other.choices[0].text]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.total_tokens == one.usage.total_tokens + other.usage.total_tokens
    assert [part["answer"] for part in both.aft_ray["prompts"]] == [one.aft_ray["answer"], other.aft_ray["answer"]]
    tokens = [tokenizer(text)["input_ids"] for text in (first, second)]
    assert client.completions.create(prompt=tokens[0], **how).choices[0].text == one.choices[0].text
    listed = client.completions.create(prompt=tokens, **how)
    assert [choice.text for choice in listed.choices] == [choice.text for choice in both.choices]
    chunks = list(client.completions.create(prompt=first, stream=True, **how))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == one.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_openai_repeats_an_answer_by_its_seed(client, reasoner):
    how = {"model": reasoner.model, "messages": messages(reasoner.problems[6]), "temperature": 1.0}
    more = {"best_of": 8, "stop_confidence": 1, "include_candidates": True}
    for strategy in ("score", "vote", "weighted_vote"):
        first = client.chat.completions.create(**how, extra_body={**more, "strategy": strategy})
        again = client.chat.completions.create(
            **how, seed=first.aft_ray["seed"], extra_body={**more, "strategy": strategy}
        )
        assert again.aft_ray["answer"] == first.aft_ray["answer"]
        both = in_common(first.aft_ray, again.aft_ray)
        # A vote stops as soon as its winner is certain, with the candidates that are finished by then.
        assert both == set(range(8)) if strategy == "score" else both
    # Another seed gives other candidates.
    other = client.chat.completions.create(
        **how, seed=first.aft_ray["seed"] + 1000, extra_body={**more, "strategy": "score"}
    )
    texts = [[row["response"] for row in answer.aft_ray["candidates"]] for answer in (first, other)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("change", "error", "param", "says"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "'gpt-9' is not served here"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, "messages", "the user's"),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature", "less than or equal to 2"),
        ({"temperature": 0, "n": 2}, openai.BadRequestError, "n", "one response"),
        ({"max_tokens": 481}, openai.BadRequestError, "max_tokens", "481"),
        ({"max_completion_tokens": 481}, openai.BadRequestError, "max_completion_tokens", "481"),
        ({"stop": ["x"]}, openai.BadRequestError, "stop", "stop is not supported"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs", "logprobs is not supported"),
        ({"n": 3, "extra_body": {"best_of": 2}}, openai.BadRequestError, "best_of", "less than n"),
        ({"extra_body": {"best_of": 65}}, openai.BadRequestError, "best_of", "best_of (65)"),
        ({"extra_body": {"task": "poetry"}}, openai.BadRequestError, "task", "it has arithmetic"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, openai.BadRequestError, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "a " * 700}]}, openai.BadRequestError, "messages", "tokens"),
    ],
)
def test_openai_raises_its_own_errors_which_name_the_field(client, reasoner, change, error, param, says):
    how = {"model": reasoner.model, "messages": messages("how many?"), **change}
    with pytest.raises(error) as raised:
        client.chat.completions.create(**how)
    assert raised.value.param == param
    assert says in raised.value.body["message"]
    with pytest.raises(error):
        client.chat.completions.create(**how, stream=True)


def test_openai_raises_an_authentication_error_for_a_wrong_key(reasoner):
    with (
        openai.OpenAI(base_url=f"{reasoner.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        stranger.models.list()
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("prompt", "param", "says"),
    [
        (["x", ""], "prompt.1", "at least 1 character"),
        ([[]], "prompt", "tokens"),
        ([10**6], "prompt", "tokens"),
        ([10**30], "prompt", "tokens"),
        (["x", "y", "z"], "prompt", "1 to 2 prompts"),
        (["x", 1], "prompt.1", "string"),
        ({}, "prompt", ""),
    ],
)
def test_openai_invalid_prompts_are_rejected_by_name(http, reasoner, prompt, param, says):
    answer = http.post("/v1/completions", json={"model": reasoner.model, "prompt": prompt})
    refused(answer, 400, param=param, says=says)
    assert "function-after" not in answer.text


# ── curl ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def written_commands(text: str) -> list[str]:
    """Returns the curl commands in the code blocks of a document, each with its continuation lines."""
    commands = []
    for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
        joined = block.replace("\\\n", " ")
        # A quoted body may span several lines.
        commands += re.findall(r"^(?:\$ )?(curl (?:'[^']*'|\"[^\"]*\"|[^\n'\"])*)", joined, flags=re.MULTILINE)
    assert len(commands) == len(re.findall(r"^(?:\$ )?curl ", text, flags=re.MULTILINE))
    return commands


def curl(command: str, reasoner: Reasoner, directory: Path) -> tuple[int, str, str]:
    """Runs a command with the service's address and model put in. Returns status, content type and body."""
    (directory / ".curlrc").write_text(
        f'silent\nmax-time = 120\nheader = "Authorization: Bearer {reasoner.key}"\n'
        'write-out = "\\n%{http_code} %{content_type}"\n'
    )
    here = re.sub(r"(https?://)?(localhost|127\.0\.0\.1|HOST|[a-z.-]*example\.\w+)(:\d+)?(?=/)", reasoner.url, command)
    here = re.sub(r'("model": *)"[^"]*"', rf'\1"{reasoner.model}"', here)
    environment = os.environ | {"CURL_HOME": str(directory), "HOME": str(directory), "KEY": reasoner.key}
    done = subprocess.run(["bash", "-c", here], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, (here, done.stderr)
    body, _, end = done.stdout.rpartition("\n")
    status, _, kind = end.partition(" ")
    return int(status), kind, body


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md", "what it says when it starts"])
def test_every_written_curl_command_works(reasoner, document, tmp_path):
    path = ROOT / document
    if path.suffix == ".md":
        commands = written_commands(path.read_text()) if path.exists() else []
    else:
        commands = re.findall(r"^ +ask +(curl .*)$", reasoner.said, flags=re.MULTILINE)
        assert commands
    if not commands:
        pytest.skip(f"{document} has no curl command")
    for command in commands:
        status, kind, body = curl(command, reasoner, tmp_path)
        assert status == 200, (command, body)
        if re.search(r'"stream": *true', command):
            assert kind.startswith("text/event-stream"), command
        else:
            assert kind.startswith("application/json"), command
            assert json.loads(body), command


# ── /v1/reason ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_has_the_fields_of_the_contract(http, reasoner):
    answer = ask(http, reasoner.problems[7], n=4, stop_confidence=1, seed=11)
    assert set(answer) == {
        "id", "object", "created", "model", "version", "strategy", "answer", "response", "confidence", "agreement",
        "explanation", "seed", "candidates", "sampling", "timings", "usage",
    }  # fmt: skip
    assert answer["id"].startswith("reason-")
    assert (answer["object"], answer["model"], answer["version"]) == ("reason", reasoner.model, None)
    assert (answer["strategy"], answer["seed"], answer["sampling"]["asked"]) == ("weighted_vote", 11, 4)
    assert abs(answer["created"] - time.time()) < 120
    for rank, row in enumerate(answer["candidates"], start=1):
        assert set(row) == {
            "rank", "index", "answer", "key", "response", "score", "votes", "weight", "tokens", "finish_reason"
        }  # fmt: skip
        assert row["rank"] == rank
        assert row["score"] <= 0
        assert row["weight"] == pytest.approx(math.exp(row["score"]))
        assert row["votes"] == sum(other["answer"] == row["answer"] for other in answer["candidates"])
    tokens = sum(row["tokens"] for row in answer["candidates"])
    # The last candidate may have been ended because the winner was certain.
    assert answer["sampling"]["sampled"] == len(answer["candidates"]) in (3, 4)
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["response"] == answer["candidates"][0]["response"]
    assert answer["response"].endswith(f"#### {answer['answer']}")
    assert answer["timings"]["total_s"] >= answer["timings"]["sampling_s"] > 0


def elected(strategy: str, rows: list[dict]) -> tuple[str | None, float]:
    """Returns the answer that a strategy chooses among these candidates, and its share; computed independently."""
    if strategy == "score":
        best = max(rows, key=lambda row: row["score"])
        return best["answer"], sum(math.exp(r["score"]) for r in rows if r["answer"] == best["answer"]) / sum(
            math.exp(r["score"]) for r in rows
        )
    weight = {"vote": lambda row: 1.0, "weighted_vote": lambda row: math.exp(row["score"])}[strategy]
    tally, scores = defaultdict(float), defaultdict(float)
    for row in rows:
        if row["answer"] is not None:
            tally[row["answer"]] += weight(row)
            scores[row["answer"]] += row["score"]
    winner = max(tally, key=lambda answer: (round(tally[answer], 9), scores[answer]))
    return winner, tally[winner] / sum(map(weight, rows))


@pytest.mark.parametrize("strategy", ["score", "vote", "weighted_vote"])
def test_strategies_choose_the_answer_of_their_candidates(http, reasoner, strategy):
    split = 0
    for problem in reasoner.problems[8:20]:
        answer = ask(http, problem, strategy=strategy, n=9, temperature=1.3, stop_confidence=1, seed=17)
        rows = answer["candidates"]
        winner, share = elected(strategy, rows)
        assert answer["answer"] == winner
        assert answer["confidence"] == pytest.approx(share, abs=1e-5)
        assert answer["agreement"] == pytest.approx(sum(row["answer"] == winner for row in rows) / len(rows), abs=1e-5)
        split += len({row["answer"] for row in rows}) > 1
    # Otherwise the strategies had nothing to decide.
    assert split >= 3


def test_a_stream_has_the_same_content_as_the_whole_answer(http, reasoner):
    how = {"question": reasoner.problems[20], "n": 5, "strategy": "score", "stop_confidence": 1, "seed": 23}
    plain = ask(http, **how)
    told = events(http, **how)
    names = [name for name, _ in told]
    assert names == ["start", *["candidate"] * 5, "result"]
    start, result = told[0][1], told[-1][1]
    assert start == {
        "id": start["id"], "model": reasoner.model, "strategy": "score", "n": 5, "seed": 23, "task": "arithmetic"
    }  # fmt: skip
    assert result["id"] == start["id"]
    for changing in ("id", "created", "timings", "candidates"):
        result_part, plain_part = result.pop(changing), plain.pop(changing)
        if changing == "candidates":
            assert in_common({"candidates": result_part}, {"candidates": plain_part}) == set(range(5))
            shown = {row["index"]: row for _, row in told[1:-1]}
            for row in result_part:
                assert shown[row["index"]] == {key: row[key] for key in row if key not in ("rank", "votes")}
    assert result["confidence"] == pytest.approx(plain.pop("confidence"), abs=1e-3)
    result.pop("confidence")
    assert _without_score(result) == _without_score(plain)


def _without_score(answer: dict) -> dict:
    return answer | {"explanation": re.sub(r"-?\d+\.\d+", "", answer["explanation"])}


def test_stopping_early_saves_candidates_and_changes_none(http, reasoner):
    saved = 0
    for problem in reasoner.problems[21:27]:
        how = {"n": 24, "temperature": 0.7, "strategy": "vote", "seed": 29}
        early = ask(http, problem, **how, stop_confidence=0.8)
        late = ask(http, problem, **how | {"strategy": "score"}, stop_confidence=1)
        assert indices(late) == set(range(24))
        assert in_common(early, late) == indices(early)
        if early["sampling"]["stopped"] == "confident":
            # The candidates of the waves were all finished, and they have the first indices.
            assert indices(early) == set(range(early["sampling"]["sampled"]))
            saved += 24 - early["sampling"]["sampled"]
            assert early["sampling"]["tokens_saved"] > 0
    assert saved > 24


def test_greedy_is_one_candidate_and_needs_no_seed(http, reasoner):
    first, again = (ask(http, reasoner.problems[27], strategy="greedy") for _ in range(2))
    assert in_common(first, again) == {0}
    assert first["sampling"] == {"asked": 1, "sampled": 1, "stopped": "complete", "tokens_saved": 0}
    assert ask(http, reasoner.problems[27], temperature=0)["response"] == first["response"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"n": 65}, "n", "n (65) is more than this service takes, 64"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 481}, "max_tokens", "max_tokens (481)"),
        ({"question": "x" * 1501}, "question", "1501 characters"),
        ({"question": "a " * 700}, "question", "tokens as a prompt"),
        ({"question": ""}, "question", "at least 1 character"),
        ({"task": "poetry"}, "task", "it has arithmetic"),
        ({"colour": "red"}, "colour", "colour is not a field"),
        ({"temperature": 0, "strategy": "vote"}, "temperature", "needs a temperature above 0"),
        ({"temperature": 2.01}, "temperature", "less than or equal to 2"),
        ({"strategy": "guess"}, "strategy", "'vote'"),
        ({"strategy": "greedy", "n": 2}, "n", "one response"),
        ({"stop_confidence": 0.4}, "stop_confidence", "0.5"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**62}, "seed", "less than"),
        ({"question": 7}, "question", "string"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_fields_are_rejected_by_name(http, body, param, says, stream):
    refused(
        http.post("/v1/reason", json={"question": "how many?", "stream": stream, **body}), 400, param=param, says=says
    )


def test_another_model_is_not_found(http, reasoner):
    for answer in (
        http.post("/v1/reason", json={"question": "how many?", "model": "gpt-9"}),
        http.get("/v1/models/gpt-9"),
    ):
        refused(answer, 404, param="model", says=f"'{reasoner.model}' is")
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/reason", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"", "application/json", 400, "a JSON object"),
        (b"[]", "application/json", 400, "a JSON object"),
        (b"null", "application/json", 400, "the body"),
        (b"{", "application/json", 400, "not valid JSON"),
        (b"\xff\xfe", "application/json", 400, "JSON"),
        (b"[" * 100_000, "application/json", 400, "nested"),
        (b'{"question": "x", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, "JSON"),
        (b'{"question": "how many?"}', "text/plain", 400, "Content-Type: application/json"),
        (b"question=how+many", "application/x-www-form-urlencoded", 400, "Content-Type: application/json"),
        (b'{"question": "' + b"x" * 300_000 + b'"}', "application/json", 413, "256 KiB"),
    ],
)
def test_invalid_bodies_are_rejected(http, path, content, kind, status, says):
    answer = http.post(path, content=content, headers={"Content-Type": kind})
    refused(answer, status, param=None, says=says)


def test_a_long_body_of_unknown_length_is_rejected(http):
    def pieces():
        for _ in range(400):
            yield b" " * 1024

    # The connection may be closed for sending before the client has read the response.
    with contextlib.suppress(httpx.WriteError):
        refused(http.post("/v1/reason", content=pieces()), 413, param=None, says="256 KiB")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "stop_confidence", "n", "seed", "max_tokens"])
def test_numbers_that_are_not_finite_are_rejected_by_name(http, field, number):
    body = b'{"question": "how many?", "%s": %s}' % (field.encode(), number)
    answer = http.post("/v1/reason", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, param=field, says="finite number")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/reason", b'{"question": "\\ud800"}', "question"),
        ("/v1/reason", b'{"question": "x", "\\udfff": 1}', None),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', "prompt"),
    ],
)
def test_halves_of_surrogate_pairs_are_rejected(http, reasoner, path, body, param):
    if path != "/v1/reason":
        body = body[:-1] + f', "model": "{reasoner.model}"}}'.encode()
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, param=param, says="")


def test_unknown_methods_and_paths_are_rejected(http):
    for answer in (http.get("/v1/reason"), http.put("/v1/reason", json={})):
        refused(answer, 405, param=None, says="method not allowed")
        assert answer.headers["allow"] == "POST"
    for path in ("/v1/nothing", "/nothing", "/v1/../etc/passwd"):
        refused(http.get(path), 404, param=None, says="not found")


# ── Disconnecting clients, and too many clients ───────────────────────────────────────────────────────────────────────


def test_sampling_ends_when_its_client_disconnects(http, reasoner):
    started = time.monotonic()
    ask(http, **LONG, seed=31)
    whole_s = time.monotonic() - started
    gone = sum(line["status"] == 499 for line in reasoner.access_log())

    with reasoner.client() as leaving, leaving.stream("POST", "/v1/reason", json={**LONG, "stream": True}) as answer:
        assert next(answer.iter_lines()) == "event: start"
    assert asked_s(http, reasoner) < whole_s / 2

    with reasoner.client() as leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post("/v1/reason", json=LONG, timeout=min(1.0, whole_s / 4))
    assert asked_s(http, reasoner) < whole_s / 2

    body = {"model": reasoner.model, "messages": messages(ENDLESS), "max_tokens": 450, "temperature": 0, "stream": True}
    with reasoner.client() as leaving, leaving.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data: ")

    wait_for(lambda: sum(line["status"] == 499 for line in reasoner.access_log()) >= gone + 3)
    assert {line["error"] for line in reasoner.access_log() if line["status"] == 499} == {"client_gone"}


def asked_s(http: httpx.Client, reasoner: Reasoner) -> float:
    started = time.monotonic()
    ask(http, reasoner.problems[28], strategy="greedy")
    return time.monotonic() - started


def test_clients_that_disconnect_release_their_slots(http, reasoner):
    """Clients disconnect while their question is answered and while it waits, with and without a stream."""
    admitted = reasoner.concurrency + reasoner.queue

    def leave(number: int) -> None:
        body = {**LONG, "stream": number % 2 == 0}
        with (
            reasoner.client() as leaving,
            contextlib.suppress(httpx.ReadTimeout),
            leaving.stream("POST", "/v1/reason", json=body, timeout=0.7) as answer,
        ):
            next(answer.iter_lines())

    for _ in range(3):
        with ThreadPoolExecutor(admitted) as pool:
            list(pool.map(leave, range(admitted)))
    time.sleep(1)
    with ThreadPoolExecutor(admitted) as pool:
        answers = list(pool.map(lambda problem: ask(http, problem), reasoner.problems[:admitted]))
    assert len(answers) == admitted


def test_a_full_queue_rejects_questions_and_mixes_no_answers(http, reasoner):
    how = {"n": 3, "temperature": 1.0, "strategy": "score", "stop_confidence": 1}
    problems = reasoner.problems[:40]
    ready = threading.Barrier(len(problems))

    def one(seed: int) -> httpx.Response:
        with reasoner.client() as own:
            own.get("/health")
            ready.wait(60)
            return own.post("/v1/reason", json={"question": problems[seed], "seed": seed, **how})

    with ThreadPoolExecutor(len(problems)) as pool:
        answers = list(pool.map(one, range(len(problems))))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            refused(answer, 429, param=None, says="Retry-After")
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
    good = [seed for seed, answer in enumerate(answers) if answer.status_code == 200]
    assert len(good) >= reasoner.concurrency + reasoner.queue
    for seed in good[:12]:
        alone = ask(http, problems[seed], seed=seed, **how)
        assert in_common(answers[seed].json(), alone) == {0, 1, 2}
        assert answers[seed].json()["answer"] == alone["answer"]


def test_a_response_ends_at_either_end_token_which_is_not_part_of_its_text(http, reasoner):
    """The model ends about half of its responses with each. If one did not end them, they would go on to the limit."""
    answers = [ask(http, problem, n=8, temperature=0.7, stop_confidence=1, seed=1) for problem in reasoner.problems[:5]]
    candidates = [one for answer in answers for one in answer["candidates"]]
    assert {one["finish_reason"] for one in candidates} == {"stop"}
    assert not [one for one in candidates if TURN_END in one["response"]]


# ── API keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("authorization", "code"),
    [(None, "no_key"), ("Bearer wrong", "invalid_api_key"), ("Bearer", "no_key"), ("Basic eDp5", "no_key")],
)
def test_without_a_key_nothing_is_answered(reasoner, authorization, code):
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (
        ("GET", "/v1/models"), ("POST", "/v1/reason"), ("POST", "/v1/chat/completions"), ("GET", "/v1/nothing")
    ):  # fmt: skip
        answer = httpx.request(method, reasoner.url + path, headers=headers, timeout=30)
        refused(answer, 401, param=None, says="API key")
        assert answer.json()["error"]["code"] == code
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_keys_change_while_it_runs(reasoner):
    def status(key: str) -> int:
        return httpx.get(f"{reasoner.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    before = reasoner.keys_file.read_text()
    try:
        assert status("another") == 401
        reasoner.keys_file.write_text("another\n")
        wait_for(lambda: status("another") == 200)
        assert status(reasoner.key) == 401
    finally:
        reasoner.keys_file.write_text(before)
    wait_for(lambda: status(reasoner.key) == 200)
    assert status("another") == 401


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/openapi.json", "/docs", "/", "/page.css", "/page.js", "/icon.svg"]
)
def test_paths_that_need_no_key(reasoner, path):
    answer = httpx.get(reasoner.url + path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_documents_page_needs_nothing_from_elsewhere(reasoner):
    page = httpx.get(f"{reasoner.url}/docs").text
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", page) == []
    parts = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)
    assert len(parts) >= 2
    for part in parts:
        assert httpx.get(reasoner.url + part).status_code == 200, part


# ── Metrics and the access log ────────────────────────────────────────────────────────────────────────────────────────


def scrape(reasoner: Reasoner) -> dict[str, float]:
    """Returns the sum of each of our metrics, by its name and our labels."""
    (port,) = reasoner.session.glob("metrics_export_port_*")
    text = httpx.get(f"http://127.0.0.1:{port.read_text().strip()}/metrics", timeout=60).text
    sums = defaultdict(float)
    for name, labels, value in re.findall(r"^(ray_aft_ray_\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE):
        ours = re.findall(r'\b((?:route|status|reason|strategy|kind|stopped)="[^"]*")', labels)
        sums[",".join([name, *sorted(ours)])] += float(value)
    return sums


def test_prometheus_counts_what_was_asked(http, reasoner):
    asked = 'ray_aft_ray_requests_total,route="/v1/reason",status="200"'
    sampled_ones = 'ray_aft_ray_candidates_total,strategy="score"'
    unknown = 'ray_aft_ray_rejections_total,reason="model_not_found"'
    too_long = 'ray_aft_ray_requests_total,route="/v1/reason",status="413"'
    ask(http, reasoner.problems[29], n=2, strategy="score", stop_confidence=1)
    wait_for(lambda: scrape(reasoner)[sampled_ones] > 0, 60)
    # Ray exports metrics every few seconds: wait until all earlier requests are counted.
    before = settled(reasoner)
    for problem in reasoner.problems[30:33]:
        ask(http, problem, n=4, strategy="score", stop_confidence=1)
    http.post("/v1/reason", json={"question": "x", "model": "gpt-9"})
    http.post("/v1/reason", content=b"x" * 300_000)
    wait_for(lambda: scrape(reasoner)[asked] - before[asked] == 3, 60)
    after = settled(reasoner)
    assert after[sampled_ones] - before[sampled_ones] == 12
    assert after[unknown] - before[unknown] == 1
    assert after[too_long] - before[too_long] == 1
    assert after['ray_aft_ray_tokens_total,kind="completion"'] > before['ray_aft_ray_tokens_total,kind="completion"']
    latency = 'ray_aft_ray_request_latency_s_count,route="/v1/reason"'
    assert after[latency] - before[latency] == 5
    assert after["ray_aft_ray_in_progress"] == 0


def settled(reasoner: Reasoner) -> dict[str, float]:
    """Returns the metrics once they have not changed for longer than Ray takes to export them."""
    last, since = scrape(reasoner), time.monotonic()
    deadline = time.monotonic() + 90
    while time.monotonic() - since < 12:
        assert time.monotonic() < deadline, "the counts never settle"
        time.sleep(1)
        now = scrape(reasoner)
        if now != last:
            last, since = now, time.monotonic()
    return last


def test_the_access_log_has_no_text_of_questions_or_answers(http, reasoner):
    secret = "the pile of Zanzibar"
    answer = ask(http, secret, n=2, stop_confidence=1, strategy="score")
    http.post("/v1/reason", json={"question": secret, "colour": secret})
    http.post("/v1/chat/completions", json={"model": secret, "messages": messages(secret)})
    (line,) = wait_for(lambda: [line for line in reasoner.access_log() if line["id"] == answer["id"]])
    assert (line["route"], line["status"], line["strategy"], line["sampled"]) == ("/v1/reason", 200, "score", 2)
    assert line["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert {"prompt_tokens", "queued_s", "seconds", "stopped", "version", "key", "time"} <= set(line)
    written = "".join(file.read_text(errors="replace") for file in reasoner.session.glob("logs/**/*") if file.is_file())
    assert answer["id"] in written
    assert "Zanzibar" not in written
    assert reasoner.key not in written


def test_pages_of_other_sites_may_not_ask(reasoner):
    other = {"Origin": "https://elsewhere.example"}
    with reasoner.client() as client:
        before = client.options("/v1/reason", headers=other | {"Access-Control-Request-Method": "POST"})
        read = client.get("/v1/models", headers=other)
    assert read.status_code == 200
    assert not [name for answer in (before, read) for name in answer.headers if name.startswith("access-control-")]
