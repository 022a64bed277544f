"""The reasoner's web page in a real browser, with a local server whose answers are scripted."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from chromium import ARGS, CHROMIUM
from scripted_reasoner import (
    CANDIDATES,
    EXAMPLES,
    MODEL,
    PAGE,
    START,
    Reasoner,
    Reply,
    candidate,
    error,
    event,
    result,
    scripted_reasoner,
    stream_of,
)

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
expect = playwright.expect

MARKUP = '<script>alert(1)</script><img src=x onerror="alert(2)"><b>bold</b> &amp;'

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no chromium here")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def reasoner() -> Iterator[Reasoner]:
    with scripted_reasoner() as server:
        yield server


@dataclass
class Visits:
    """Opens the page and collects everything that the browser complains about, which fails the test."""

    browser: Any
    reasoner: Reasoner
    contexts: list[Any] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __call__(self, path: str = "", ready: bool = True, init: str = "", **context: Any) -> Any:
        here = self.browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **context})
        here.set_default_timeout(10_000)
        self.contexts.append(here)
        here.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective));" + init
        )
        page = here.new_page()
        page.on("console", self.heard)
        page.on("pageerror", lambda raised: self.complaints.append(f"error {raised}"))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", self.requested)
        page.goto(self.reasoner.url + path)
        if ready:
            expect(page.locator("#model")).to_have_text("demo")
        return page

    def heard(self, message: Any) -> None:
        # The browser itself logs each error response and lost connection that a test scripts.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(f"{message.type} {message.text}")

    def requested(self, request: Any) -> None:
        if not request.url.startswith(self.reasoner.url):
            self.complaints.append(f"request to {request.url}")


@pytest.fixture
def visit(browser: Any, reasoner: Reasoner) -> Iterator[Visits]:
    visits = Visits(browser, reasoner)
    yield visits
    for context in visits.contexts:
        context.close()
    assert visits.complaints == []


def ask(page: Any, question: str = EXAMPLES[0]) -> None:
    page.locator("#question").fill(question)
    page.locator("#ask").click()


def answered(page: Any) -> None:
    expect(page.locator("#candidates .winner")).to_have_count(1)


def indices(page: Any) -> list[int]:
    items: list[int] = page.locator("#candidates > li").evaluate_all("all => all.map(li => Number(li.dataset.index))")
    return items


def widths(page: Any, bars: str) -> list[float]:
    found: list[float] = page.locator(bars).evaluate_all("all => all.map(each => parseFloat(each.style.width))")
    return found


# ---- Asking


def test_a_question_is_answered_with_ranked_candidates(visit, reasoner):
    page = visit()
    ask(page)
    expect(page.locator("#answer")).to_have_text("39")
    expect(page.locator("#explanation")).to_have_text("3 of 5 candidates say 39, with 86 % of the weight by score.")
    expect(page.locator("#confidence")).to_have_text("86 %")
    expect(page.locator("#version")).to_have_text("version 3")
    expect(page.locator("#status")).to_have_text("Answer: 39. 5 of 8 candidates.")
    assert indices(page) == [3, 4, 2, 0, 1]
    rows = page.locator("#candidates > li summary")
    texts = [
        "139Winner3 votesscore -0.12031 tokens",
        "2393 votesscore -0.20031 tokens",
        "3393 votesscore -0.31031 tokens",
        "4131 votescore -0.92012 tokens",
        "5No answercut off0 votesscore -1.400256 tokens",
    ]
    expect(rows).to_have_text(texts)
    expect(page.locator(".winner .response")).to_be_visible()
    expect(page.locator(".winner .response")).to_have_text(CANDIDATES[2]["response"])
    expect(page.locator("#candidates > li:not(.winner) .response >> visible=true")).to_have_count(0)
    page.locator("#candidates > li").nth(3).locator("summary").click()
    expect(page.locator("#candidates > li").nth(3).locator(".response")).to_be_visible()
    for fact in ("Weighted vote", "nothing could change the answer", "93 tokens saved", "0.22 s", "123"):
        expect(page.locator("#facts")).to_contain_text(fact)
    sent = {"question": EXAMPLES[0], "strategy": "weighted_vote", "n": 8, "temperature": 0.8, "stop_confidence": 0.95}
    assert reasoner.requests == [{**sent, "stream": True}]


def test_bars_show_the_votes_and_the_scores(visit):
    page = visit()
    ask(page)
    answered(page)
    weights = [sum(each["weight"] for each in CANDIDATES if each["answer"] == answer) for answer in ("39", "13")]
    assert widths(page, "#votes .bar > span") == pytest.approx(
        [100 * weight / sum(weights) for weight in weights], abs=0.01
    )
    likely = sorted((100 * each["weight"] for each in CANDIDATES), reverse=True)
    assert widths(page, "#candidates .bar > span") == pytest.approx(likely, abs=0.01)
    expect(page.locator("#votes")).to_contain_text("3 votes, 86 %")
    expect(page.locator("#votes")).to_contain_text("1 candidate without an answer")


def test_spellings_that_the_server_counts_as_one_answer_share_a_bar(visit, reasoner):
    candidates = [candidate(0, "12", -0.1), candidate(1, "12.0", -0.2), candidate(2, "7", -0.3)]
    answer = result(candidates, strategy="vote")
    for each in answer["candidates"]:
        each["votes"] = 1 if each["answer"] == "7" else 2
    reasoner.script(Reply(pieces=stream_of(answer, candidates)))
    page = visit()
    ask(page)
    expect(page.locator("#votes li")).to_have_text(["122 votes, 67 %", "71 vote, 33 %"])


def test_candidates_show_up_before_the_result_and_keep_their_place(visit, reasoner):
    reasoner.script(Reply(pieces=[START, *(event("candidate", each) for each in CANDIDATES[:3])], hold=True))
    page = visit()
    ask(page)
    expect(page.locator("#status")).to_have_text("3 of 8 candidates")
    assert indices(page) == [2, 0, 3]
    assert page.locator("#progress").evaluate("bar => [bar.value, bar.max]") == [3, 8]
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#ask")).to_be_disabled()
    expect(page.locator(".winner")).to_have_count(0)


def test_stop_closes_the_connection_and_keeps_what_came(visit, reasoner):
    reasoner.script(Reply(pieces=[START, *(event("candidate", each) for each in CANDIDATES[:2])], hold=True))
    page = visit()
    ask(page)
    expect(page.locator("#candidates > li")).to_have_count(2)
    page.locator("#stop").focus()
    page.keyboard.press("Enter")
    assert reasoner.closed_by_browser.wait(10)
    expect(page.locator("#status")).to_have_text("Stopped. 2 candidates came, not ranked.")
    expect(page.locator("#error")).to_be_empty()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#ask")).to_be_focused()
    reasoner.script(Reply(pieces=stream_of(result())))
    page.keyboard.press("Enter")
    answered(page)


def test_stop_works_before_the_first_candidate(visit, reasoner):
    reasoner.script(Reply(pieces=[START], hold=True))
    page = visit()
    ask(page)
    page.locator("#stop").click()
    assert reasoner.closed_by_browser.wait(10)
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_settings_are_sent_as_they_stand(visit, reasoner):
    page = visit()
    page.locator("#settings > summary").click()
    page.locator("#strategy").select_option("vote")
    expect(page.locator("#strategy-hint")).to_contain_text("most candidates give")
    page.locator("#n").fill("3")
    page.locator("#temperature").fill("0.33")
    page.locator("#seed").fill("7")
    page.locator("#stop_confidence").fill("1")
    expect(page.locator("#stop-hint")).to_have_text("When nothing can change the answer.")
    expect(page.locator("#brief")).to_have_text("Vote, 3 candidates, temperature 0.33")
    ask(page, "  1 + 1?\n")
    answered(page)
    sent = {"question": "1 + 1?", "strategy": "vote", "n": 3, "temperature": 0.33, "stop_confidence": 1, "seed": 7}
    assert reasoner.requests == [{**sent, "stream": True}]


def test_greedy_has_nothing_to_sample(visit, reasoner):
    page = visit()
    page.locator("#settings > summary").click()
    page.locator("#n").fill("65")  # above the limit, which does not matter here
    page.locator("#strategy").select_option("greedy")
    for name in ("n", "temperature", "stop_confidence"):
        expect(page.locator(f"#{name}")).to_be_disabled()
    ask(page)
    answered(page)
    assert reasoner.requests == [{"question": EXAMPLES[0], "strategy": "greedy", "stream": True}]


def test_stopping_early_is_left_alone_where_the_server_has_no_default_for_it(visit, reasoner):
    reasoner.model = {**MODEL, "defaults": {**MODEL["defaults"], "stop_confidence": None}}
    page = visit()
    ask(page)
    answered(page)
    assert reasoner.requests[0]["stop_confidence"] == 1


def test_numbers_out_of_range_are_named_before_anything_is_sent(visit, reasoner):
    page = visit()
    page.locator("#settings > summary").click()
    page.locator("#n").fill("65")
    page.locator("#settings > summary").click()
    ask(page)
    expect(page.locator("#error")).to_contain_text("Candidates: ")
    expect(page.locator("#error")).to_contain_text("64")
    expect(page.locator("#n")).to_be_focused()
    assert reasoner.requests == []


def test_the_task_is_asked_for_only_where_there_are_several(visit, reasoner):
    page = visit()
    expect(page.locator("#task")).to_be_hidden()
    expect(page.locator("#examples button")).to_have_text(EXAMPLES)
    tasks = {"arithmetic": {"examples": EXAMPLES}, "gsm8k": {"examples": []}, "mmlu": {"examples": ["Which one?"]}}
    reasoner.model = {**MODEL, "tasks": tasks}
    page = visit()
    page.get_by_label("Task").select_option("gsm8k")
    expect(page.locator("#examples")).to_be_hidden()
    page.get_by_label("Task").select_option("mmlu")
    page.locator("#examples button").click()
    expect(page.locator("#question")).to_have_value("Which one?")
    expect(page.locator("#question")).to_be_focused()
    page.locator("#ask").click()
    answered(page)
    assert reasoner.requests[0]["task"] == "mmlu"


def test_a_result_without_an_answer_and_without_a_run_is_said(visit, reasoner):
    candidates = [candidate(0, None, -0.5, "hm")]
    answer = result(candidates, version=None, confidence=0.0, explanation="No candidate gives an answer.")
    reasoner.script(Reply(pieces=stream_of(answer, candidates)))
    page = visit()
    ask(page)
    expect(page.locator("#answer")).to_have_text("No answer")
    expect(page.locator("#version")).to_have_text("not from a run")
    expect(page.locator("#copy-answer")).to_be_disabled()
    expect(page.locator("#votes li")).to_have_text(["1 candidate without an answer"])


def test_the_address_fills_in_the_question_and_asks_nothing(visit, reasoner):
    page = visit("#q=2+3%20%26%204%3F%20%C3%A4%25")
    expect(page.locator("#question")).to_have_value("2+3 & 4? ä%")
    page.evaluate("location.hash = '#q=<b>100% & more'")
    expect(page.locator("#question")).to_have_value("<b>100% & more")
    assert reasoner.requests == []


def test_earlier_results_can_be_seen_again(visit, reasoner):
    page = visit()
    expect(page.locator("#earlier")).to_be_hidden()
    ask(page, "the first")
    answered(page)
    other = [candidate(0, "5", -0.3)]
    reasoner.script(Reply(pieces=stream_of(result(other, version=4), other)))
    ask(page, "the second")
    expect(page.locator("#answer")).to_have_text("5")
    page.locator("#history button", has_text="the first").click()
    expect(page.locator("#answer")).to_have_text("39")
    expect(page.locator("#asked")).to_have_text("the first")
    expect(page.locator("#result-heading")).to_be_focused()
    expect(page.locator("#version")).to_have_text("version 4")
    expect(page.locator("#facts")).to_contain_text("version 3")
    assert indices(page) == [3, 4, 2, 0, 1]
    assert len(reasoner.requests) == 2
    expect(page.locator("#history [aria-current=true]")).to_contain_text("the first")


# ---- The stream


AWKWARD = [
    ("start", '{"a": "é € 😀 \u2028"}'),
    ("candidate", "two\nlines"),
    ("", "no name"),
    ("result", " leading space: and a colon"),
]


def awkward_stream(newline: str, end: str) -> bytes:
    """Comments, an event without data, a field without a colon, unknown fields, and `end` after the last event."""
    blocks = [": keep-alive", "event: nothing", "data", "id: 7\nretry: 10\nunknown: x"]
    for name, content in AWKWARD:
        lines = [f"event:{name}"] if name else []
        blocks.append("\n".join([*lines, ": between", *(f"data: {line}" for line in content.split("\n"))]))
    return ("\n\n".join(blocks) + "\n\n" + end).replace("\n", newline).encode()


@pytest.mark.parametrize("end", ["", "event: late\ndata: lost"], ids=["whole", "cut"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_events_are_read_whole_wherever_the_chunks_end(visit, newline, end):
    page = visit()
    read = """async (bytes) => {
        const { readEvents } = await import("/page.js");
        const whole = Uint8Array.from(bytes);
        const splits = [[...whole].map(byte => [byte])];
        for (let at = 0; at <= whole.length; at++) splits.push([whole.slice(0, at), whole.slice(at)]);
        const outcomes = new Set();
        for (const chunks of splits) {
            const stream = new ReadableStream({ start(to) {
                for (const chunk of chunks) to.enqueue(Uint8Array.from(chunk));
                to.close();
            } });
            const events = [];
            for await (const event of readEvents(stream)) events.push([event.type, event.data]);
            outcomes.add(JSON.stringify(events));
        }
        return [...outcomes];
    }"""
    outcomes = page.evaluate(read, list(awkward_stream(newline, end)))
    assert [json.loads(each) for each in outcomes] == [[["", ""], *map(list, AWKWARD)]]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_stream_that_arrives_byte_by_byte_gives_the_same_page(visit, reasoner, newline):
    candidates = [candidate(0, "39 €", -0.1, "né 😀 " + "#### 39 €"), candidate(1, "13", -0.9, "漢字")]
    events = [("start", json.loads(START.split(b"data: ")[1])), *(("candidate", each) for each in candidates)]
    events.append(("result", result(candidates)))
    sent = b": hello" + 2 * newline.encode() + b"".join(event(name, content, newline) for name, content in events)
    reasoner.script(Reply(pieces=[bytes([byte]) for byte in sent]))
    page = visit()
    ask(page)
    expect(page.locator("#answer")).to_have_text("39 €")
    expect(page.locator(".response")).to_have_text(["né 😀 #### 39 €", "漢字"])


# ---- Text from the server


def test_markup_from_anywhere_is_shown_as_text(visit, reasoner):
    hostile = [candidate(0, MARKUP, -0.1, f"{MARKUP}\n####"), candidate(1, f"2{MARKUP}", -0.2)]
    answer = result(hostile, explanation=MARKUP, strategy=MARKUP)
    reasoner.model = {**MODEL, "tasks": {"arithmetic": {"examples": [MARKUP]}, MARKUP: {"examples": []}}}
    reasoner.script(Reply(pieces=stream_of(answer, hostile)), Reply(400, error(MARKUP)))
    page = visit()
    before = page.evaluate("[document.scripts.length, document.images.length, document.querySelectorAll('b').length]")
    page.locator("#examples button").click()
    page.locator("#ask").click()
    for place in ("#answer", "#asked", "#explanation", ".winner bdi", "#votes bdi >> nth=0", "#history bdi >> nth=0"):
        expect(page.locator(place)).to_have_text(MARKUP)
    expect(page.locator(".winner .response")).to_contain_text(MARKUP)
    expect(page.locator("#facts")).to_contain_text(MARKUP)
    page.locator("#ask").click()
    expect(page.locator("#error")).to_have_text(MARKUP)
    page.wait_for_timeout(200)  # an image that fails to load raises its error only now
    after = page.evaluate("[document.scripts.length, document.images.length, document.querySelectorAll('b').length]")
    assert before == after == [1, 1, 0]


def test_the_page_never_writes_markup():
    script = (PAGE / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"\sstyle=|\son\w+=|<style|https?://|<script(?![^>]*\ssrc=)", html)


# ---- Errors


def test_a_key_is_asked_for_when_the_server_wants_one(visit, reasoner):
    reasoner.key = "s3cret"
    page = visit(ready=False)
    expect(page.locator("#error")).to_have_text("This server wants an API key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#error")).to_have_text("This server wants an API key.")
    page.locator("#key").fill("s3cret")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("demo")
    expect(page.locator("#error")).to_be_empty()
    ask(page)
    answered(page)
    assert reasoner.keys == ["Bearer s3cret"]
    page.reload()
    expect(page.locator("#model")).to_have_text("demo")
    assert page.evaluate("[sessionStorage['api-key'], JSON.stringify({...localStorage})]") == ["s3cret", "{}"]


def test_a_key_typed_with_a_question_also_loads_the_model(visit, reasoner):
    reasoner.key = "s3cret"
    page = visit(ready=False)
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill("s3cret")
    ask(page)
    answered(page)
    expect(page.locator("#model")).to_have_text("demo")
    assert reasoner.requests == [{"question": EXAMPLES[0], "stream": True}]


def test_a_question_refused_for_its_key_is_asked_again_with_the_right_one(visit, reasoner):
    page = visit()
    reasoner.key = "s3cret"
    ask(page)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("clé")
    page.keyboard.press("Enter")
    expect(page.locator("#error")).to_have_text("No API key has such a character.")
    page.locator("#key").fill(" s3cret ")
    page.keyboard.press("Enter")
    answered(page)
    assert reasoner.keys == [None, "Bearer s3cret"]
    expect(page.locator("#error")).to_be_empty()


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (503, "server_error")])
def test_a_busy_server_is_asked_again_after_the_time_it_names(visit, reasoner, status, kind):
    busy = Reply(status, error("The queue is full.", kind), {"Retry-After": "2"})
    reasoner.script(busy, Reply(pieces=stream_of(result())))
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The queue is full.")
    expect(page.locator("#retry")).to_have_text("Try again in 2 s")
    expect(page.locator("#retry")).to_be_disabled()
    expect(page.locator("#retry")).to_be_enabled()
    page.locator("#retry").press("Enter")
    answered(page)
    expect(page.locator("#ask")).to_be_focused()
    assert reasoner.requests[0] == reasoner.requests[1]
    expect(page.locator("#error")).to_be_empty()
    expect(page.locator("#retry")).to_be_hidden()


def test_an_error_within_the_stream_keeps_what_came(visit, reasoner):
    failed = event("error", error("The engine stopped.", "server_error"))
    reasoner.script(Reply(pieces=[START, event("candidate", CANDIDATES[0]), failed]))
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The engine stopped.")
    expect(page.locator("#status")).to_have_text("1 candidate came, not ranked.")
    expect(page.locator("#candidates > li")).to_have_count(1)
    expect(page.locator("#retry")).to_be_enabled()
    expect(page.locator("#result")).to_be_hidden()


def test_a_bad_value_is_shown_at_its_field(visit, reasoner):
    reasoner.script(Reply(400, error("n must be a whole number.", param="n")), Reply(pieces=stream_of(result())))
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("n must be a whole number.")
    expect(page.locator("#n")).to_be_focused()
    expect(page.locator("#n")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#retry")).to_be_hidden()
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator("[aria-invalid]")).to_have_count(0)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(pieces=[START, b"event: cand"], broken=True), "The connection broke off before the result."),
        (Reply(pieces=[START]), "The connection ended before the result."),
        (Reply(pieces=[b"event: result\ndata: {\n\n"]), "This page does not understand the server's answer."),
        (Reply(502, b"<html>Bad gateway</html>"), "The server answered with status 502 and did not say why."),
    ],
    ids=["broken", "ended", "garbled", "proxy"],
)
def test_whatever_ends_a_request_is_said_in_words(visit, reasoner, reply, said):
    reasoner.script(reply, Reply(pieces=stream_of(result())))
    page = visit()
    ask(page)
    expect(page.get_by_role("alert")).to_have_text(said)
    page.locator("#retry").click()
    answered(page)
    visit.complaints[:] = [
        each for each in visit.complaints if "SyntaxError" not in each
    ]  # the page logs this error on purpose


def test_a_server_that_is_gone_is_said_in_words(visit):
    page = visit()
    page.context.set_offline(True)
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.locator("#retry").click()
    answered(page)


def test_an_empty_question_is_not_sent(visit, reasoner):
    page = visit()
    page.locator("#ask").click()
    expect(page.get_by_role("alert")).to_have_text("Type a question first.")
    expect(page.locator("#question")).to_be_focused()
    assert reasoner.requests == []


# ---- Copying


def test_the_copied_command_asks_the_same_question(visit, reasoner):
    reasoner.key = "s3cret"
    page = visit(ready=False, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#key").fill("s3cret")
    question = 'It\'s $HOME `id` \\ "quoted" !x\nüber <b>?'
    ask(page, question)
    answered(page)
    page.locator("#copy-answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == "39"
    page.locator("#copy-curl").click()
    command = page.evaluate("navigator.clipboard.readText()")
    assert "s3cret" not in command
    words = shlex.split(command)
    assert words[:2] == ["curl", f"{reasoner.url}v1/reason"]
    body = {key: value for key, value in reasoner.requests[0].items() if key != "stream"} | {"seed": 123}
    assert json.loads(words[-1]) == body
    assert body["question"] == question
    if shutil.which("curl"):
        reasoner.script(Reply(body=result()))
        with_key = {**os.environ, "API_KEY": "s3cret", "NO_PROXY": "*"}
        subprocess.run(["sh", "-c", command], check=True, timeout=20, env=with_key, stdout=subprocess.DEVNULL)
        assert reasoner.requests[-1] == body


def test_copying_works_where_the_browser_has_no_clipboard_object(visit):
    page = visit(init="Object.defineProperty(navigator, 'clipboard', {value: undefined});")
    ask(page)
    answered(page)
    page.locator("#copy-answer").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    expect(page.locator("#copy-answer")).to_be_focused()
    page.locator("#question").fill("")
    page.locator("#question").press("Control+v")
    expect(page.locator("#question")).to_have_value("39")


# ---- Accessibility


def test_a_question_is_asked_and_stopped_and_read_by_keyboard_alone(visit, reasoner):
    reasoner.script(Reply(pieces=[START], hold=True), Reply(pieces=stream_of(result())))
    page = visit()

    def tab_to(place: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("place => document.activeElement.matches(place)", place):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
                return
        pytest.fail(f"{place} cannot be reached with the tab key")

    tab_to("#theme")
    tab_to("#question")
    page.keyboard.type("How many?")
    page.keyboard.press("Control+Enter")
    tab_to("#stop")
    page.keyboard.press("Space")
    expect(page.locator("#ask")).to_be_focused()
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator("#ask")).to_be_focused()
    tab_to("#copy-curl")
    tab_to(".winner summary")
    page.keyboard.press("Enter")
    expect(page.locator(".winner .response")).to_be_hidden()
    tab_to("#history button")
    page.keyboard.press("Enter")
    expect(page.locator("#result-heading")).to_be_focused()
    assert [each["question"] for each in reasoner.requests] == ["How many?"] * 2


def test_a_candidate_that_moves_in_the_ranking_keeps_the_focus(visit, reasoner):
    reasoner.script(Reply(pieces=stream_of(result()), pause_s=0.3))
    page = visit()
    ask(page)
    page.locator("#candidates > li[data-index='0'] summary").focus()
    answered(page)
    expect(page.locator("#candidates > li[data-index='0'] summary")).to_be_focused()


def test_nothing_is_animated_if_the_user_prefers_reduced_motion(visit):
    moving = "document.getAnimations().length"
    init = "const play = Element.prototype.animate; window.played = 0;"
    init += "Element.prototype.animate = function (...all) { window.played++; return play.apply(this, all); };"
    for motion, some in (("reduce", False), ("no-preference", True)):
        page = visit(init=init, reduced_motion=motion)
        ask(page)
        answered(page)
        assert bool(page.evaluate("window.played")) is some
        assert motion == "no-preference" or page.evaluate(moving) == 0


def test_colours_follow_the_system_until_they_are_chosen(visit):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit(color_scheme=scheme).evaluate(background) for scheme in ("light", "dark"))
    assert light != dark
    page = visit(color_scheme="light")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == dark
    expect(page.locator("#theme")).to_have_accessible_name("Light colours")
    page.locator("#theme").click()
    assert page.evaluate(background) == light
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate(background) == light
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert page.evaluate(background) == dark


def test_the_page_works_where_storage_is_switched_off(visit):
    off = "for (const area of ['localStorage', 'sessionStorage']) "
    off += "Object.defineProperty(window, area, { get() { throw new DOMException('off', 'SecurityError'); } });"
    page = visit(init=off)
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    ask(page)
    answered(page)


@pytest.mark.parametrize("width", [360, 1100])
def test_no_text_of_the_model_overflows_the_page(visit, reasoner, width):
    long = [candidate(0, "9" * 300, -0.1, "x" * 3000), candidate(1, "word " * 60, -0.2, tokens=99999)]
    answer = result(long, explanation="e" * 500, model="m" * 80, seed=2**53 - 1)
    reasoner.model = {**MODEL, "id": "demo", "tasks": {"a" * 90: {"examples": ["q" * 300]}, "b": {"examples": []}}}
    reasoner.script(Reply(pieces=stream_of(answer, long)), Reply(429, error("r" * 400), {"Retry-After": "9"}))
    page = visit(viewport={"width": width, "height": 740})
    page.locator("#settings > summary").click()
    ask(page, "u" * 500)
    answered(page)
    sticking = """() => [...document.querySelectorAll("body *")]
        .filter(each => each.getBoundingClientRect().right > innerWidth + 0.5)
        .map(each => each.tagName + "#" + each.id + "." + each.className)"""
    assert page.evaluate(sticking) == []
    ask(page, "u" * 500)
    expect(page.locator("#error")).to_be_visible()
    assert page.evaluate(sticking) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (...colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255);
    };
    const luminance = rgb => {
        const [r, g, b] = rgb.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const each of document.querySelectorAll("body *")) {
        const own = [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()) || each.value;
        if (!own || !each.checkVisibility() || each.matches("input[type=range], option, noscript")) continue;
        const behind = [];
        for (let at = each; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
        const [back, front] = [paint(...behind), paint(...behind, getComputedStyle(each).color)].map(luminance);
        const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
        found.push([ratio, each.tagName + "#" + each.id + "." + each.className]);
    }
    return found;
}"""
UNLABELLED = """() => [...document.querySelectorAll("input, select, textarea, button, progress, section, form")]
.filter(each => {
    const by = each.getAttribute("aria-labelledby");
    const named = each.labels?.length || each.ariaLabel || (by && document.getElementById(by)?.textContent);
    return !(named || (each.tagName === "BUTTON" && each.textContent.trim()));
}).map(each => each.outerHTML)"""
DANGLING = """() => [...document.querySelectorAll("*")].flatMap(each => ["for", "aria-describedby", "aria-errormessage"]
    .map(name => each.getAttribute(name)).filter(id => id && !document.getElementById(id)))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_every_control_has_a_label(visit, reasoner, scheme):
    tasks = {"arithmetic": {"examples": EXAMPLES}, "gsm8k": {"examples": []}}
    reasoner.model = {**MODEL, "tasks": tasks}
    hold = Reply(pieces=[START, event("candidate", CANDIDATES[3])], hold=True)
    busy = Reply(429, error("The queue is full."), {"Retry-After": "60"})
    reasoner.script(Reply(pieces=stream_of(result())), hold, busy)
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    page.locator("#settings > summary").click()
    page.locator("#key-row").evaluate("row => row.hidden = false")

    def check(least: int) -> None:
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) >= least
        assert [each for each in contrasts if each[0] < 4.5] == []
        assert page.evaluate(UNLABELLED) == []
        assert page.evaluate(DANGLING) == []
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
        assert len(ids) == len(set(ids))
        headings = "all => all.filter(each => each.checkVisibility()).map(each => Number(each.tagName[1]))"
        levels = page.locator("h1, h2, h3, h4").evaluate_all(headings)
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    check(20)
    ask(page)
    answered(page)
    check(60)
    page.locator("#ask").click()
    expect(page.locator("#candidates > li")).to_have_count(1)
    check(25)
    page.locator("#stop").click()
    page.locator("#ask").click()
    expect(page.locator("#error")).to_be_visible()
    check(25)
    assert page.locator("html").get_attribute("lang") == "en"
    for role in ("banner", "main", "contentinfo", "form"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("status")).to_have_count(1)
