"""An OpenAI-compatible endpoint on this machine, which a test can make misbehave."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from processes import http_server


@dataclass
class Answer:
    """What the server sends: a status with a body, after `after_s` seconds, or nothing when it hangs up."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    hang_up: bool = False


def chat(text: str | None, finish_reason: str = "stop") -> Answer:
    """A chat completion with the reply `text`."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Answer(body=json.dumps({**completion, "usage": usage}).encode())


def rated(rating: float) -> Answer:
    return chat(f"Evaluation Evidence: I saw it.\nRating: {rating}")


def refusal(status: int, message: str = "no", **headers: str) -> Answer:
    body = json.dumps({"error": {"message": message, "type": "x", "code": status}}).encode()
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class JudgeServer:
    """The state of the server. `answer(number, request)` returns the answer to a request; numbers start at 1."""

    url: str = ""
    answer: Callable[[int, dict], Answer] = lambda number, request: rated(5)
    models: list[str] = field(default_factory=lambda: ["m"])
    models_answer: Answer | None = None
    requests: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.keys.append(self.headers["Authorization"])
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in server.models]
            listed = Answer(body=json.dumps({"object": "list", "data": data}).encode())
            self.send(server.models_answer or listed)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(request)
                server.keys.append(self.headers["Authorization"])
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
                number = len(server.requests)
            answer = server.answer(number, request)
            time.sleep(answer.after_s)
            with server.lock:
                server.in_flight -= 1
            self.send(answer)

        def send(self, answer: Answer) -> None:
            if answer.hang_up:
                self.close_connection = True
                return
            headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body)), **answer.headers}
            try:
                self.send_response(answer.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)
            except OSError:  # The judge did not wait for the answer.
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http_server(Handler) as url:
        server.url = f"{url}/v1"
        yield server
