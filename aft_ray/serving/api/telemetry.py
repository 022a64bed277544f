"""What is counted and written down of every request: Prometheus metrics through Ray's, and one JSON line each.

Invariant: no text of a question or an answer is written unless `access.log_questions` says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import uuid
from typing import Any

from ray.serve import metrics

from aft_ray.serving.api.requests import Refusal
from aft_ray.serving.api.responses import Answer

_SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]
_SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class Telemetry:
    """Of one reasoner. Ray puts `ray_` before a metric's name."""

    def __init__(self, log_questions: bool) -> None:
        self._log_questions = log_questions
        self._log = logging.getLogger("aft_ray.access")
        if not self._log.handlers:
            self._log.addHandler(logging.StreamHandler(sys.stdout))
            self._log.setLevel(logging.INFO)
            self._log.propagate = False
        self._requests = metrics.Counter("aft_ray_requests", "requests answered", ("route", "status"))
        self._latency = metrics.Histogram(
            "aft_ray_request_latency_s", "seconds from arrival to the end of the answer", _SECONDS, ("route",)
        )
        self._rejections = metrics.Counter("aft_ray_rejections", "requests not answered, by why", ("reason",))
        self._candidates = metrics.Counter("aft_ray_candidates", "candidates sampled", ("strategy",))
        self._tokens = metrics.Counter("aft_ray_tokens", "tokens read and generated", ("kind",))
        self._saved = metrics.Counter("aft_ray_tokens_saved", "tokens of candidates never begun", ("strategy",))
        self._stops = metrics.Counter("aft_ray_stops", "how sampling ended", ("stopped",))
        self._agreement = metrics.Histogram(
            "aft_ray_agreement", "share of candidates that give the winner's answer", _SHARES, ("strategy",)
        )
        self._inside = metrics.Gauge("aft_ray_in_progress", "questions at work or waiting")
        self._version = metrics.Gauge("aft_ray_policy_version", "policy version of the last answer")

    def inside(self, count: int) -> None:
        self._inside.set(count)

    def answered(self, answer: Answer) -> None:
        """Counts a question, whichever route it came by."""
        reasoned, strategy = answer.reasoned, {"strategy": answer.ask.strategy}
        self._candidates.inc(len(reasoned.candidates), strategy)
        self._tokens.inc(answer.prompt_tokens, {"kind": "prompt"})
        self._tokens.inc(reasoned.tokens, {"kind": "completion"})
        if reasoned.tokens_saved:
            self._saved.inc(reasoned.tokens_saved, strategy)
        self._stops.inc(1, {"stopped": reasoned.stopped})
        self._agreement.observe(reasoned.ranking.agreement, strategy)
        if reasoned.version is not None:
            self._version.set(reasoned.version)

    def finished(self, record: Record) -> None:
        """Counts a request and writes its line."""
        tags = {"route": record.route, "status": str(record.status)}
        self._requests.inc(1, tags)
        self._latency.observe(time.monotonic() - record.started, {"route": record.route})
        if record.error:
            self._rejections.inc(1, {"reason": record.error})
        self._log.info(json.dumps(record.line(self._log_questions), ensure_ascii=False))


# Paths that are counted and logged, and how the ids of their requests begin.
_ROUTES = {
    "/v1/reason": "reason-",
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/models": "models-",
}


class Record:
    """What is known of a request so far."""

    def __init__(self, path: str, authorization: str | None) -> None:
        # Not the path itself: there are as many of these as anyone cares to ask for.
        self.route = path if path in _ROUTES else "other"
        self.counted = path.startswith("/v1/")
        self.id = f"{_ROUTES.get(path, 'request-')}{uuid.uuid4().hex}"
        self.authorization = authorization
        self.started = time.monotonic()
        self.status = 0
        self.error: str | None = None
        self._questions: list[str] = []
        self._answers: list[Answer] = []

    def asked(self, question: str) -> None:
        self._questions.append(question)

    def answered(self, answer: Answer) -> None:
        self._answers.append(answer)

    def failed(self, refusal: Refusal) -> None:
        error = refusal.body["error"]
        self.status, self.error = refusal.status, error["code"] or error["type"]

    def gone(self) -> None:
        """The client went away."""
        self.status, self.error = 499, "client_gone"

    def line(self, with_text: bool) -> dict[str, Any]:
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 4),
            # Tells keys apart without telling them.
            "key": hashlib.sha256(self.authorization.encode()).hexdigest()[:8] if self.authorization else None,
        }
        if self.error:
            line["error"] = self.error
        if self._answers:
            first = self._answers[0]
            line |= {
                "strategy": first.ask.strategy,
                "version": first.reasoned.version,
                "asked": sum(answer.ask.n for answer in self._answers),
                "sampled": sum(len(answer.reasoned.candidates) for answer in self._answers),
                "stopped": first.reasoned.stopped,
                "prompt_tokens": sum(answer.prompt_tokens for answer in self._answers),
                "completion_tokens": sum(answer.reasoned.tokens for answer in self._answers),
                "queued_s": round(first.queued_s, 4),
            }
        if with_text:
            line |= {"questions": self._questions, "answers": [a.reasoned.winner.text for a in self._answers]}
        return line
