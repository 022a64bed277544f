"""The rollout of new versions: which version of a run the engines load, and which engine loads it next.

Invariant: engines load a version one at a time, so that the others answer meanwhile. A version that one engine could
not load or verify is not offered again; the engines keep the version that they have.
"""

from __future__ import annotations

import logging
import time

from aft_ray.storage.ledger import Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.storage.versions import find_version, read_config
from aft_ray.weights.version_manifest import VersionManifest, read_version_manifest

logger = logging.getLogger("ray.serve")


class Rollout:
    """A Serve deployment of one replica. It holds no weights, and may be restarted at any time."""

    def __init__(self, run: str, update_timeout_s: float) -> None:
        """
        Args:
            run: path or URI of the run directory.
            update_timeout_s: seconds after which another engine may begin an update although the last one that began
                has not reported its result.
        """
        self._run_dir = RunDir(run)
        self._config = read_config(self._run_dir)
        self._ledger = Ledger(self._run_dir)
        self._update_timeout_s = update_timeout_s
        self._failed: dict[int, str] = {}  # why a version is not offered again
        self._updating: tuple[str, float] | None = None  # the engine that loads a version, and its deadline

    async def newest_version(self) -> VersionManifest:
        """The version that a starting engine loads."""
        return self._newest()

    async def begin_update(self, engine: str, version: int | None) -> VersionManifest | None:
        """The version that an engine must load now; None when it holds the newest, or while another engine loads one.

        Args:
            engine: an id of the engine.
            version: the version that it holds.
        """
        if self._updating is not None and self._updating[0] != engine and time.monotonic() < self._updating[1]:
            return None
        newest = self._newest()
        if newest.version == version:
            return None
        self._updating = (engine, time.monotonic() + self._update_timeout_s)
        logger.info(f"engine {engine[:8]} begins to load version {newest.version} of {self._run_dir.uri()}")
        return newest

    async def end_update(self, engine: str, version: int, error: str | None) -> None:
        """Reports the result of an update. With an error, the version is not offered to any engine again."""
        if self._updating is not None and self._updating[0] == engine:
            self._updating = None
        if error is not None:
            logger.warning(f"engine {engine[:8]} did not take version {version} of {self._run_dir.uri()}: {error}")
            self._failed[version] = error

    def _newest(self) -> VersionManifest:
        self._ledger.refresh()
        trained = [version for version in self._ledger.trained_rounds() if version not in self._failed]
        found = find_version(self._run_dir, self._config, None, trained)
        return read_version_manifest(found.version, found.model)
