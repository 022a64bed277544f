"""Whether a directory of this machine has room for files that will be written there."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from aft_ray.storage.files import RunDirError


def check_room(directory: str | os.PathLike[str], needed: int, what: str, way_out: str) -> None:
    """Raises RunDirError, one sentence, when fewer than `needed` bytes are free where `directory` is.

    Args:
        directory: need not exist yet.
        what: what is written, as the subject of the sentence.
        way_out: what the user can do, as the end of the sentence.
    """
    place = Path(directory).absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunDirError(
            f"{what} needs {needed / 1e9:,.1f} GB in {place} of {socket.gethostname()}, and {free / 1e9:,.1f} GB are "
            f"free there; {way_out}"
        )
