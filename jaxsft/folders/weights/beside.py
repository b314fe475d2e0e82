"""A file that is written and summed up by a thread, while what comes next is put together.

In: the bytes of a file, piece by piece. Out: the file, on disk when it is closed, and its entry for a seal.
"""

import contextlib
import io
import os
import pathlib
import queue
import threading
import zlib
from collections.abc import Iterator

import numpy as np

from jaxsft.disk.seal import Entry

BLOCK_BYTES = 1 << 22
"""Written and summed up while they are in the cache of the processor."""
SYNC_BYTES = 1 << 27
"""Sent to the disk at once, so that it works from the beginning on."""
MAX_WAITING = 1
"""Pieces that wait in memory while one is written and one is made."""


class FileBeside:
    """A file in the making; `entry` is known when it is closed."""

    def __init__(self, path: pathlib.Path) -> None:
        self.entry = Entry(0, 0)
        self._pieces: queue.Queue[np.ndarray | None] = queue.Queue(MAX_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, args=(path,), name="export", daemon=True)
        self._thread.start()

    def write(self, piece: np.ndarray) -> None:
        """Appends the bytes of an array that nobody changes any more. What goes wrong is told when it is closed."""
        self._pieces.put(piece.reshape(-1).view(np.uint8))

    def close(self) -> None:
        """Returns when all is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._pieces.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write_all(self, path: pathlib.Path) -> None:
        pieces = self._until_closed()
        try:
            with path.open("wb", buffering=0) as file:
                since = 0
                for piece in pieces:
                    for at in range(0, len(piece), BLOCK_BYTES):
                        block = piece[at : at + BLOCK_BYTES]
                        self._write(file, block)
                        since += len(block)
                        if since >= SYNC_BYTES:
                            os.fdatasync(file.fileno())
                            since = 0
                os.fsync(file.fileno())
        except Exception as error:
            self._error = error
            for _ in pieces:  # Whoever gives more pieces helps other processes, and must not wait for ever.
                pass

    def _until_closed(self) -> Iterator[np.ndarray]:
        while (piece := self._pieces.get()) is not None:
            yield piece

    def _write(self, file: io.FileIO, block: np.ndarray) -> None:
        done = 0
        while done < len(block):
            done += file.write(block[done:].data) or 0
        self.entry = Entry(self.entry.size + len(block), zlib.crc32(block.data, self.entry.crc32))


@contextlib.contextmanager
def file_beside(path: pathlib.Path) -> Iterator[FileBeside]:
    """A file, closed at the end."""
    file = FileBeside(path)
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    file.close()
