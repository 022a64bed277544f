"""Every reply that a judge gave, in one SQLite file, so that no reply is asked for twice.

Invariants: a reply is durable before it counts. Several processes of one machine may use the file at once. Replies are
kept as they came and read anew each time, so a better reader of ratings needs no new calls.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

_BUSY_S = 60.0  # how long a process waits for others; what they do takes milliseconds
_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    request TEXT PRIMARY KEY, text TEXT NOT NULL, complete INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID
"""


class CacheBroken(RuntimeError):
    """A cache that cannot be used. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge answered. complete: it ended by itself and was not cut off."""

    text: str
    complete: bool
    prompt_tokens: int
    completion_tokens: int


def request_key(request: Mapping[str, Any], rating: int) -> str:
    """Names the `rating`-th reply to a request by all that decides it: model, messages, sampling settings."""
    content = json.dumps([request, rating], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


class JudgeCache:
    """The file, open in one thread; a context manager. Its methods raise CacheBroken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise self._broken(error) from error
        for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", _TABLE):
            self._execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, key: str) -> Reply | None:
        rows = self._execute(
            "SELECT text, complete, prompt_tokens, completion_tokens FROM replies WHERE request = ?", key
        )
        return next((Reply(text, bool(complete), asked, said) for text, complete, asked, said in rows), None)

    def put(self, key: str, reply: Reply) -> Reply:
        """Keeps a reply durably; returns the one that stands there: another process may have been faster."""
        row = (key, reply.text, reply.complete, reply.prompt_tokens, reply.completion_tokens)
        self._execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", *row)
        return self.get(key) or reply

    def _execute(self, statement: str, *values: str | int) -> list[Any]:
        # While another process opens or closes the file, SQLite says "busy" at once, whatever its own timeout.
        patient = Retrying(
            retry=retry_if_exception(_is_busy),
            stop=stop_after_delay(_BUSY_S),
            wait=wait_random(0.01, 0.1),
            reraise=True,
        )
        try:
            return patient(lambda: self._connection.execute(statement, values).fetchall())
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> CacheBroken:
        return CacheBroken(
            f"the judge's cache {self._path} cannot be used ({error}); make room or mend its permissions, or move the "
            "file away to pay for its replies again"
        )


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
