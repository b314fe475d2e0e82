"""What each process of a run has to say, in a file of its own.

    RUN/logs/process-N.log      one line per event: time, process, host, text; continued by the next start

In: sentences. Out: lines on disk from every process, whatever the console shows. A log that cannot be written stops
nothing: whatever must be kept is written elsewhere, with errors of its own.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
import traceback
from types import TracebackType

from jaxsft.disk.writing import Path, is_file, write_whole
from jaxsft.hosts.exits import is_bug

FOLDER = "logs"
UPLOAD_SECONDS, UPLOAD_BYTES = 30.0, 2**20
"""Between two writes of a log in a bucket, where a file cannot grow and is written whole; of a log of so many bytes.
Larger ones are written as much more seldom."""
LONGEST_TAIL = 2**16


def log_path(folder: Path, process: int) -> Path:
    """Where the log of a process stands in a run folder."""
    return folder / FOLDER / f"process-{process}.log"


class Log:
    """The log of this process. What is said before it has a folder is kept, and written when it has.

    Args:
        process: number of this process.
    """

    def __init__(self, process: int) -> None:
        self._process, self._host = process, socket.gethostname()
        self._folder: Path | None = None
        self._path: Path | None = None
        self._fd: int | None = None
        self._waiting: list[str] = []
        self._earlier = b""
        self._written_at = 0.0
        self._turn = threading.Lock()

    def open(self, folder: Path) -> None:
        """From now on lines go to the folder of a run, which is ours already; those that were kept go first."""
        self._folder, self._path = folder, log_path(folder, self._process)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if "://" not in os.fspath(self._path):
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
                self._fd = os.open(self._path, flags, 0o666)
            elif is_file(self._path):
                self._earlier = self._path.read_bytes()
        self._write()

    def write(self, text: str) -> None:
        """Adds an event; each line of its text is one line."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        lines = text.splitlines() or [""]
        with self._turn:  # a thread that watches has events as well
            self._waiting += [f"{now} process {self._process} {self._host}  {line}\n" for line in lines]
        self._write()

    def last_of(self, process: int) -> list[str]:
        """The last lines of another process of this run."""
        return last_lines(self._folder, process) if self._folder is not None else []

    def close(self, last_words: str = "") -> None:
        """Writes all that is left, and last what this process has to say at its end."""
        if last_words:
            self.write(last_words)
        self._write(is_last=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Closes the log; an error that passes here is its last event, with its traceback where it is a bug."""
        words = ""
        if error is not None and not isinstance(error, GeneratorExit):
            is_plain = not is_bug(error) or isinstance(error, KeyboardInterrupt)
            words = (
                f"error: {error or type(error).__name__}" if is_plain else "".join(traceback.format_exception(error))
            )
        self.close(words)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, *, is_last: bool = False) -> None:
        with self._turn:
            if self._path is not None and self._waiting:
                self._put(self._path, "".join(self._waiting).encode(errors="replace"), is_last=is_last)

    def _put(self, path: Path, content: bytes, *, is_last: bool) -> None:
        with contextlib.suppress(OSError):
            if self._fd is not None:
                os.write(self._fd, content)
            elif "://" in os.fspath(path):
                pause = UPLOAD_SECONDS * max(len(self._earlier) / UPLOAD_BYTES, 1)
                if time.monotonic() - self._written_at < pause and not is_last:
                    return
                self._written_at = time.monotonic()
                self._earlier += content
                write_whole(path, self._earlier)
        self._waiting.clear()


def last_lines(folder: Path, process: int, number: int = 5) -> list[str]:
    """The last lines that a process has written into its log of a run, oldest first; none where there is no log.

    Args:
        folder: the run folder.
        process: its number.
        number: how many lines at most.
    """
    path = log_path(folder, process)
    try:
        if not is_file(path):
            return []
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - LONGEST_TAIL, 0))
            tail = file.read(LONGEST_TAIL)
    except OSError:
        return []
    lines = tail.decode(errors="replace").splitlines()
    return (lines[1:] if size > LONGEST_TAIL else lines)[-number:]
