"""A file of a complete directory, and the writing of one: what is written is hashed at once.

Invariant: nobody reads a file again to learn its digest; the digest is that of the bytes that were handed to storage.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class StoredFile:
    """What a manifest holds of one file. It can be sent between processes.

    Attributes:
        name: the path below the directory, with forward slashes.
        size: bytes.
        sha256: the digest of the contents, in hexadecimal digits.
    """

    name: str
    size: int
    sha256: str


@dataclass(slots=True)
class HashedFile:
    """A file of a directory that is being written. `entry` says what was written, complete or so far."""

    name: str
    _stream: Any
    _size: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Appends bytes, or any other contiguous buffer of them. Returns their number."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._stream.write(view)
        self._size += len(view)
        return len(view)

    @property
    def entry(self) -> StoredFile:
        """The name, the size and the digest of what was written."""
        return StoredFile(self.name, self._size, self._digest.hexdigest())
