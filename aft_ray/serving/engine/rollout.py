"""A run directory's newest version, and whose turn it is to load it.

Invariant: engines change weights one at a time; a version that the first of them cannot load or prove is given up, and
the others go on with what they have.
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
    """A deployment of one replica. It holds no weights and may be restarted at any time."""

    def __init__(self, run: str, turn_s: float) -> None:
        """turn_s: how long an engine may take before its turn is given to the next."""
        self._run_dir = RunDir(run)
        self._config = read_config(self._run_dir)
        self._ledger = Ledger(self._run_dir)
        self._turn_s = turn_s
        self._refused: dict[int, str] = {}
        self._loading: tuple[str, float] | None = None

    async def current(self) -> VersionManifest:
        """What an engine that starts now is to load."""
        return self._manifest()

    async def turn(self, engine: str, version: int | None) -> VersionManifest | None:
        """What the engine is to load now; None: nothing, or it is not its turn."""
        if self._loading is not None and self._loading[0] != engine and time.monotonic() < self._loading[1]:
            return None
        manifest = self._manifest()
        if manifest.version == version:
            return None
        self._loading = (engine, time.monotonic() + self._turn_s)
        logger.info(f"version {manifest.version} of {self._run_dir.uri()} goes to engine {engine[:8]}")
        return manifest

    async def done(self, engine: str, version: int, error: str | None) -> None:
        """Ends the engine's turn; with an error the version is given up."""
        if self._loading is not None and self._loading[0] == engine:
            self._loading = None
        if error is not None:
            logger.warning(f"engine {engine[:8]} did not take version {version} of {self._run_dir.uri()}: {error}")
            self._refused[version] = error

    def _manifest(self) -> VersionManifest:
        self._ledger.refresh()
        trained = [version for version in self._ledger.trained_rounds() if version not in self._refused]
        published = find_version(self._run_dir, self._config, None, trained)
        return read_version_manifest(published.version, published.model)
