"""API keys: which clients may use the service.

Invariant: keys are compared in constant time, so that response times reveal nothing of them.
"""

from __future__ import annotations

import hmac
import os
import time
from pathlib import Path

from aft_ray.config.run import ConfigError
from aft_ray.config.serve import AccessConfig
from aft_ray.serving.api.errors import ApiError

# Least seconds between two checks whether the file of keys has changed.
_RELOAD_INTERVAL_S = 2.0


class ApiKeys:
    """The bearer keys that the service accepts, read again when their file changes.

    Raises:
        ConfigError: there is no key, and `access.open` is not set.
    """

    def __init__(self, access: AccessConfig) -> None:
        self._file = Path(access.keys_file) if access.keys_file else None
        self._env = access.keys_env
        self._file_stamp: tuple[int, int] | None = None
        self._checked_at = 0.0
        self._keys: list[bytes] = []
        self._load()
        self.required = bool(self._keys) or not access.open
        if self.required and not self._keys:
            raise ConfigError(
                f"there are no keys to serve with: name a file of keys with access.keys_file, set {self._env}, or set "
                f"access.open=true to let anyone ask"
            )

    def check(self, authorization: str | None) -> None:
        """Raises ApiError (401) unless the Authorization header holds one of the keys."""
        if not self.required:
            return
        self._load()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise ApiError(
                401,
                "an API key is needed: send it as 'Authorization: Bearer KEY'",
                "authentication_error",
                None,
                "no_key",
            )
        # All keys are compared, also after a match, so that the time does not tell which one matched.
        matches = [hmac.compare_digest(key, given.strip().encode()) for key in self._keys]
        if not any(matches):
            raise ApiError(401, "this API key is not valid", "authentication_error", None, "invalid_api_key")

    def _load(self) -> None:
        if self._file is None:
            self._keys = [key.strip().encode() for key in os.environ.get(self._env, "").split(",") if key.strip()]
            return
        if time.monotonic() - self._checked_at < _RELOAD_INTERVAL_S:
            return
        self._checked_at = time.monotonic()
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._file_stamp:
                return
            lines = [line.strip() for line in self._file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            if self._file_stamp is None:
                raise ConfigError(f"access.keys_file={self._file} cannot be read: {error}") from error
            return  # the file may be being replaced: the keys that were read last stay valid
        self._file_stamp = stamp
        self._keys = [line.encode() for line in lines if line and not line.startswith("#")]
