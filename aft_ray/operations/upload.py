"""The working directory of a job: which files Ray would upload, and how large they are.

Invariant: the files are those that Ray itself selects.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

from aft_ray.cluster.compat import upload_size_limits, visit_upload
from aft_ray.operations.findings import Upload

# Files that no job reads. Ray also excludes what .gitignore and .rayignore name.
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
_LARGEST_FILES = 5


def checkout() -> Path | None:
    """The checkout of aft_ray: the current directory, else the one that this module is imported from; None: neither."""
    return next(
        (
            directory
            for directory in (Path.cwd(), Path(__file__).parents[2])
            if (directory / "pyproject.toml").is_file() and (directory / "aft_ray" / "cli.py").is_file()
        ),
        None,
    )


def measure_upload(directory: Path, excludes: Sequence[str] = EXCLUDES) -> Upload:
    """The number, size before compression, and largest of the files that Ray would upload."""
    sizes: list[tuple[int, str]] = []

    def add(path: Path) -> None:
        if path.is_file():
            sizes.append((path.stat().st_size, str(path.relative_to(directory))))

    directory = directory.absolute()
    visit_upload(directory, excludes, add)
    largest = [(name, size) for size, name in heapq.nlargest(_LARGEST_FILES, sizes)]
    return Upload(str(directory), sum(size for size, _ in sizes), len(sizes), largest)


def upload_limit() -> int:
    """The largest working directory in bytes that Ray accepts: the lower one of its two limits."""
    return min(upload_size_limits())
