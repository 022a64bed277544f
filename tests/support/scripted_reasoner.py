"""A local server with the reasoner's HTTP API, whose responses are scripted by the test.

It replaces only the engines: the page, the browser, HTTP and the streams are real.
"""

import json
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from processes import http_server

import aft_ray

PAGE = Path(aft_ray.__file__).parent / "serving" / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
JSON = {"Content-Type": "application/json"}
EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
EXAMPLES = [
    "Ana has 4 apples. Ana finds 9 more. the pile of Ana grows to 3 times its size. how many apples does Ana have?",
    "Ben has 20 coins. Ben shares them equally with friends, 4 people in all. how many coins does Ben have?",
]
MODEL: dict[str, Any] = {
    "id": "demo",
    "object": "model",
    "created": 0,
    "owned_by": "aft_ray",
    "version": 3,
    "strategies": ["greedy", "score", "vote", "weighted_vote"],
    "tasks": {"arithmetic": {"examples": EXAMPLES}},
    "defaults": {
        "strategy": "weighted_vote",
        "n": 8,
        "temperature": 0.8,
        "top_p": 1.0,
        "max_tokens": 256,
        "stop_confidence": 0.95,
    },
    "limits": {"n": 64, "max_tokens": 256, "question_chars": 8000, "deadline_s": 60},
}


def candidate(index: int, answer: str | None, score: float, response: str = "", **more: Any) -> dict[str, Any]:
    text = response or f"4 + 9 = 13. 13 * 3 = {answer}. #### {answer}"
    key = answer if answer is None else answer.removesuffix(".0")
    sampled = {"index": index, "answer": answer, "key": key, "response": text, "score": score}
    return {**sampled, "weight": math.exp(score), "tokens": 31, "finish_reason": "stop", **more}


CANDIDATES = [
    candidate(2, "39", -0.31),
    candidate(0, "13", -0.92, "4 + 9 = 13. #### 13", tokens=12),
    candidate(3, "39", -0.12, "4 + 9 = 13.\nthe pile grows to 3 times its size: 13 * 3 = 39.\n#### 39"),
    candidate(1, None, -1.4, "4 + 9 = 13. 13 * 3 is", tokens=256, finish_reason="length"),
    candidate(4, "39", -0.2),
]


def result(candidates: Sequence[dict[str, Any]] = CANDIDATES, **more: Any) -> dict[str, Any]:
    """Returns the body of an answer: candidates with an answer come first, and then by score."""
    ranked = sorted(candidates, key=lambda each: (each["answer"] is None, -each["score"]))
    given = [each["answer"] for each in candidates if each["answer"] is not None]
    votes = [0 if each["answer"] is None else given.count(each["answer"]) for each in ranked]
    voted = enumerate(zip(ranked, votes, strict=True), 1)
    tokens = sum(each["tokens"] for each in ranked)
    said = f"{votes[0]} of {len(ranked)} candidates say {ranked[0]['answer']}, with 86 % of the weight by score."
    answer = {
        "id": "reason-1",
        "object": "reason",
        "created": 0,
        "model": "demo",
        "version": 3,
        "strategy": "weighted_vote",
        "answer": ranked[0]["answer"],
        "response": ranked[0]["response"],
        "confidence": 0.86,
        "agreement": votes[0] / len(ranked),
        "explanation": said,
        "seed": 123,
        "candidates": [{**each, "rank": rank, "votes": count} for rank, (each, count) in voted],
        "sampling": {"asked": 8, "sampled": len(ranked), "stopped": "certain", "tokens_saved": 93},
        "timings": {"queued_s": 0.0, "sampling_s": 0.21, "total_s": 0.22},
        "usage": {"prompt_tokens": 40, "completion_tokens": tokens, "total_tokens": tokens + 40},
    }
    return {**answer, **more}


def error(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def event(name: str, content: Any, newline: str = "\n") -> bytes:
    text = json.dumps(content, ensure_ascii=False)
    return newline.join([f"event: {name}", f"data: {text}", "", ""]).encode()


START = event("start", {"id": "reason-1", "model": "demo", "strategy": "vote", "n": 8, "seed": 123, "task": None})


def stream_of(answer: dict[str, Any], candidates: Sequence[dict[str, Any]] = CANDIDATES) -> list[bytes]:
    return [START, *(event("candidate", each) for each in candidates), event("result", answer)]


@dataclass
class Reply:
    """A response: a status with a body, or the pieces of a stream, sent one by one every `pause_s` seconds.

    Attributes:
        hold: whether the stream stays open after its pieces until the browser closes the connection.
        broken: whether the connection is closed before the end of the stream.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes] = ()
    pause_s: float = 0.0
    hold: bool = False
    broken: bool = False


@dataclass
class Reasoner:
    """The server. `replies` are the responses to the next questions; the last one is repeated."""

    url: str = ""
    key: str | None = None
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    replies: deque[Reply] = field(default_factory=lambda: deque([Reply(pieces=stream_of(result()))]))
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    closed_by_browser: threading.Event = field(default_factory=threading.Event)

    def script(self, *replies: Reply) -> None:
        self.replies = deque(replies)


@contextmanager
def scripted_reasoner() -> Iterator[Reasoner]:
    reasoner = Reasoner()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else small pieces are sent together

        def do_GET(self) -> None:
            if self.path in FILES:
                name, kind = FILES[self.path]
                headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
                self.send(200, (PAGE / name).read_bytes(), headers)
            elif self.path == "/v1/models" and self.allowed():
                self.send(200, {"object": "list", "data": [reasoner.model]}, JSON)
            elif self.path != "/v1/models":
                self.send(404, error(f"There is no {self.path}.", "not_found_error"), JSON)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reasoner.keys.append(self.headers["Authorization"])
            if not self.allowed():
                return
            reasoner.requests.append(request)
            reply = reasoner.replies.popleft() if len(reasoner.replies) > 1 else reasoner.replies[0]
            if reply.pieces:
                self.stream(reply)
            else:
                self.send(reply.status, reply.body, {**JSON, **reply.headers})

        def allowed(self) -> bool:
            if reasoner.key is None or self.headers["Authorization"] == f"Bearer {reasoner.key}":
                return True
            self.send(401, error("This server wants an API key.", "authentication_error"), JSON)
            return False

        def send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def stream(self, reply: Reply) -> None:
            self.send_response(200)
            for name, value in {**EVENTS, "Transfer-Encoding": "chunked"}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for piece in reply.pieces:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    time.sleep(reply.pause_s)
                if reply.hold:
                    self.wait_for_close()
                elif reply.broken:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")
            except OSError:
                self.close_connection = True
                reasoner.closed_by_browser.set()

        def wait_for_close(self) -> None:
            self.close_connection = True
            readable, _, _ = select.select([self.connection], [], [], 20)
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                reasoner.closed_by_browser.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http_server(Handler) as url:
        reasoner.url = f"{url}/"
        yield reasoner
