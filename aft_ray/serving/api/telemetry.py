"""Telemetry: Prometheus metrics, exported by Ray, and an access log with one JSON line for each request.

Invariant: the text of questions and answers is logged only if `access.log_questions` is set, and keys never are.
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

from aft_ray.serving.api.errors import ApiError
from aft_ray.serving.api.responses import Answer

_LATENCY_BUCKETS_S = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]
_SHARE_BUCKETS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class Telemetry:
    """The metrics and the access log of one reasoner. Ray prefixes the metrics' names with `ray_`."""

    def __init__(self, log_questions: bool) -> None:
        self._log_questions = log_questions
        self._log = logging.getLogger("aft_ray.access")
        if not self._log.handlers:
            self._log.addHandler(logging.StreamHandler(sys.stdout))
            self._log.setLevel(logging.INFO)
            self._log.propagate = False
        self._requests = metrics.Counter("aft_ray_requests", "requests answered", ("route", "status"))
        self._latency = metrics.Histogram(
            "aft_ray_request_latency_s", "seconds from arrival to the end of the answer", _LATENCY_BUCKETS_S, ("route",)
        )
        self._rejections = metrics.Counter("aft_ray_rejections", "requests that failed, by reason", ("reason",))
        self._candidates = metrics.Counter("aft_ray_candidates", "candidates sampled", ("strategy",))
        self._tokens = metrics.Counter("aft_ray_tokens", "tokens read and generated", ("kind",))
        self._saved = metrics.Counter(
            "aft_ray_tokens_saved", "estimated tokens of candidates that were not sampled", ("strategy",)
        )
        self._stops = metrics.Counter("aft_ray_stops", "questions by the reason that sampling stopped", ("stopped",))
        self._agreement = metrics.Histogram(
            "aft_ray_agreement", "share of candidates that give the winner's answer", _SHARE_BUCKETS, ("strategy",)
        )
        self._in_progress = metrics.Gauge("aft_ray_in_progress", "questions being answered or waiting")
        self._version = metrics.Gauge("aft_ray_policy_version", "policy version of the last answer")

    def set_in_progress(self, count: int) -> None:
        self._in_progress.set(count)

    def count_answer(self, answer: Answer) -> None:
        """Counts an answered question of any route."""
        result, strategy = answer.result, {"strategy": answer.request.strategy}
        self._candidates.inc(len(result.candidates), strategy)
        self._tokens.inc(answer.prompt_tokens, {"kind": "prompt"})
        self._tokens.inc(result.tokens, {"kind": "completion"})
        if result.tokens_saved:
            self._saved.inc(result.tokens_saved, strategy)
        self._stops.inc(1, {"stopped": result.stopped})
        self._agreement.observe(result.ranking.agreement, strategy)
        if result.version is not None:
            self._version.set(result.version)

    def finish_request(self, record: RequestRecord) -> None:
        """Counts a request that has ended and writes its line to the access log."""
        tags = {"route": record.route, "status": str(record.status)}
        self._requests.inc(1, tags)
        self._latency.observe(time.monotonic() - record.started, {"route": record.route})
        if record.error:
            self._rejections.inc(1, {"reason": record.error})
        self._log.info(json.dumps(record.to_json(self._log_questions), ensure_ascii=False))


# Paths that have a metric of their own, each with the prefix of its requests' ids.
_ROUTES = {
    "/v1/reason": "reason-",
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/models": "models-",
}


class RequestRecord:
    """What is known of one HTTP request, collected while it is answered."""

    def __init__(self, path: str, authorization: str | None) -> None:
        # A client may request any path, so that labels by path would be without bound.
        self.route = path if path in _ROUTES else "other"
        self.logged = path.startswith("/v1/")
        self.id = f"{_ROUTES.get(path, 'request-')}{uuid.uuid4().hex}"
        self.authorization = authorization
        self.started = time.monotonic()
        self.status = 0
        self.error: str | None = None
        self._questions: list[str] = []
        self._answers: list[Answer] = []

    def add_question(self, question: str) -> None:
        self._questions.append(question)

    def add_answer(self, answer: Answer) -> None:
        self._answers.append(answer)

    def set_error(self, error: ApiError) -> None:
        body = error.body["error"]
        self.status, self.error = error.status, body["code"] or body["type"]

    def set_client_gone(self) -> None:
        """Records that the client closed the connection before the end of the answer."""
        self.status, self.error = 499, "client_gone"

    def to_json(self, with_text: bool) -> dict[str, Any]:
        """Returns the request's line in the access log, with questions and answers if `with_text`."""
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 4),
            # A hash tells keys apart without revealing them.
            "key": hashlib.sha256(self.authorization.encode()).hexdigest()[:8] if self.authorization else None,
        }
        if self.error:
            line["error"] = self.error
        if self._answers:
            first = self._answers[0]
            line |= {
                "strategy": first.request.strategy,
                "version": first.result.version,
                "asked": sum(answer.request.n for answer in self._answers),
                "sampled": sum(len(answer.result.candidates) for answer in self._answers),
                "stopped": first.result.stopped,
                "prompt_tokens": sum(answer.prompt_tokens for answer in self._answers),
                "completion_tokens": sum(answer.result.tokens for answer in self._answers),
                "queued_s": round(first.queued_s, 4),
            }
        if with_text:
            line |= {"questions": self._questions, "answers": [a.result.winner.text for a in self._answers]}
        return line
