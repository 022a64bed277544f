"""The cache of a judge's replies: one SQLite file, so that no reply is paid for twice.

Invariants: a reply is durable before it is used. Several processes of one machine may use the file at the same time.
Replies are stored as they were received and parsed each time, so a better parser of ratings needs no new requests.
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

_BUSY_TIMEOUT_S = 60.0  # How long a process waits for others. What they do takes milliseconds.
_CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    request TEXT PRIMARY KEY, text TEXT NOT NULL, complete INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID
"""


class JudgeCacheFailed(RuntimeError):
    """The cache cannot be used. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of a judge. `complete`: the judge ended the reply itself, and no token limit cut it off."""

    text: str
    complete: bool
    prompt_tokens: int
    completion_tokens: int


def request_key(request: Mapping[str, Any], index: int) -> str:
    """The cache key of the reply number `index`, from 0, to a request.

    It is a digest of everything that the reply depends on: model, messages and sampling settings.
    """
    content = json.dumps([request, index], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


class JudgeCache:
    """The open cache file: a context manager for one thread. Its methods raise JudgeCacheFailed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error
        for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", _CREATE_TABLE):
            self._execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, key: str) -> Reply | None:
        """The reply of a key, or None when it is not in the cache."""
        rows = self._execute(
            "SELECT text, complete, prompt_tokens, completion_tokens FROM replies WHERE request = ?", key
        )
        return next(
            (Reply(text, bool(complete), prompt, completion) for text, complete, prompt, completion in rows), None
        )

    def put(self, key: str, reply: Reply) -> Reply:
        """Stores a reply durably, and returns the stored one: another process may have stored its reply first."""
        row = (key, reply.text, reply.complete, reply.prompt_tokens, reply.completion_tokens)
        self._execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", *row)
        return self.get(key) or reply

    def _execute(self, statement: str, *values: str | int) -> list[Any]:
        # While another process opens or closes the file, SQLite reports "busy" at once and ignores its own timeout.
        retry_while_busy = Retrying(
            retry=retry_if_exception(_is_busy),
            stop=stop_after_delay(_BUSY_TIMEOUT_S),
            wait=wait_random(0.01, 0.1),
            reraise=True,
        )
        try:
            return retry_while_busy(lambda: self._connection.execute(statement, values).fetchall())
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> JudgeCacheFailed:
        return JudgeCacheFailed(
            f"the judge's cache {self._path} cannot be used ({error}); make room or mend its permissions, or move the "
            "file away to pay for its replies again"
        )


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
