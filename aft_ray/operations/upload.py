"""The working directory of a job: what Ray would upload of it, found the way Ray finds it."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from pathlib import Path

from aft_ray.operations.findings import Upload

# Beside what .gitignore and .rayignore name: what a project keeps that no job reads.
EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "/runs",
    "/data",
    "/build",
    "**/__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)
_NAMED = 5


def checkout() -> Path | None:
    """The checkout of aft_ray that a person works in: this directory, or where aft_ray is run from; None: neither."""
    return next(
        (
            place
            for place in (Path.cwd(), Path(__file__).parents[2])
            if (place / "pyproject.toml").is_file() and (place / "aft_ray" / "cli.py").is_file()
        ),
        None,
    )


def measure_upload(directory: Path, excludes: Sequence[str] = EXCLUDES) -> Upload:
    """Size of the files that Ray would send, before compression, and the largest of them."""
    from ray._private.runtime_env import packaging

    sizes: list[tuple[int, str]] = []

    def seen(path: Path) -> None:
        if path.is_file():
            sizes.append((path.stat().st_size, str(path.relative_to(directory))))

    directory = directory.absolute()
    excluded = [packaging._get_excludes(directory, list(excludes))]
    packaging._dir_travel(directory, excluded, seen, include_gitignore=True, logger=logging.getLogger(__name__))
    largest = [(name, size) for size, name in heapq.nlargest(_NAMED, sizes)]
    return Upload(str(directory), sum(size for size, _ in sizes), len(sizes), largest)


def upload_limit() -> int:
    """Bytes that the dashboard takes at once: the tighter of Ray's two limits."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    return int(min(ray_constants.DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE))
