"""Keep chunks of remote objects in a folder of bounded size, shared by all processes of a machine."""

import hashlib
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

CHUNK = 2**20
"""Bytes of a chunk."""

# A process looks at the whole folder when it wrote this share of the limit, and then makes this much room: up
# to 16 processes stay within the limit between two looks.
_LOOK, _ROOM = 1 / 64, 1 / 4

logger = logging.getLogger(__name__)


class ChunkCache:
    """Chunks by (name, number), each in a file that appears whole; the oldest are deleted for room.

    Args:
        folder: Created if missing; its files may be deleted at any time.
        limit: Most bytes of all chunks.
    """

    def __init__(self, folder: str, limit: float) -> None:
        self._folder, self._limit, self._unseen, self._works = Path(folder), limit, limit, True

    def get(self, name: str, number: int, start: int, stop: int) -> bytes | None:
        """Return the bytes ``start`` to ``stop`` of a chunk; None if it is not there, or cut short."""
        try:
            with self._path(name, number).open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError:
            return None
        return data if len(data) == stop - start else None

    def put(self, name: str, number: int, data: bytes) -> None:
        """Keep a chunk; a folder that cannot be written is warned of once, and left alone."""
        if not self._works:
            return
        path = self._path(name, number)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
        try:
            self._make_room(len(data))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            self._works = False
            logger.warning(
                "data.remote.cache=%s: cannot be written (%s); going on without", self._folder, error.strerror
            )
            with suppress(OSError):
                partial.unlink()

    def drop(self, name: str, number: int) -> None:
        """Delete a chunk."""
        self._path(name, number).unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()[:32] / str(number)

    def _make_room(self, needed: int) -> None:
        self._unseen += needed
        if self._unseen < self._limit * _LOOK:
            return
        self._unseen = 0
        files = sorted((status.st_mtime, status.st_size, path) for path, status in self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files if total > self._limit * (1 - _ROOM) else ():
            path.unlink(missing_ok=True)
            total -= size
            if total <= self._limit * (1 - _ROOM):
                break

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._folder.glob("*/*"):
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:  # deleted by another process
                continue
        return found
