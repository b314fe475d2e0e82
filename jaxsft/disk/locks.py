"""Who works in a folder: a lock that ends with its owner, however it may end, on one host and over several.

In: the path of the lock's file. Out: a `Lock`, held by one process at a time; the refusal of it names who has it.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import is_bucket
from jaxsft.disk.writing import Path, WriteError, is_file, read_file, writing

RENEW_SECONDS = 10.0
"""How often the owner of a lock says that it is alive."""
DEAD_SECONDS = 40.0
"""How long another host watches a lock on which nothing changes until it takes its owner for dead."""


class Lock:
    """A file that says who works in its folder; held from `acquire` to `release`.

    On a disk, the system itself frees the lock of a process that ends, however it ends. That does not reach over hosts
    everywhere, and buckets have nothing like it, so the owner also writes into the file every `RENEW_SECONDS`; another
    host watches it, and takes over when nothing has changed for `DEAD_SECONDS`. No two clocks are compared.
    """

    def __init__(self, path: Path, *, renew_seconds: float = RENEW_SECONDS, dead_seconds: float = DEAD_SECONDS) -> None:
        self._path, self._renew_seconds, self._dead_seconds = path, renew_seconds, dead_seconds
        self._is_local = not is_bucket(path)
        self._fd: int | None = None
        self._owner = _myself()
        self._renewals = 0
        self._lost = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Takes the lock, at once if it is free or its owner is known to be dead.

        Args:
            say: is told when it has to be watched, and when it is taken over.

        Raises:
            ConfigError: somebody alive holds it; names the host, the process, and since when.
            WriteError: its file cannot be written.
        """
        with writing(self._path):
            if os.path.islink(self._path) or (self._path.exists() and not is_file(self._path)):
                raise ConfigError(f"{self._path}: a lock is a file, and this is none; move it away")
            is_alone = self._lock_file()
            found = self._read()
            # The system would not have given us the file if a living process on this host held it.
            if found is not None and not (is_alone and found.get("boot") == _boot()):
                if _is_here(found) and _is_running(found):
                    self._close()
                    raise self._refusal(found)
                if not _is_here(found):
                    self._watch(found, say)
            if found is not None:
                say(f"{self._path}: taken over from {_describe(found)}, which is dead")
            self._write()
            if not is_alone:  # Two may have come at once; the lock belongs to the one that wrote last.
                time.sleep(min(2.0, self._renew_seconds))
                if not self._is_mine():
                    raise self._refusal(self._read() or {})
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def acquire_from_dead(self, unchanged: bytes | None = None) -> bool:
        """Takes the lock of an owner that is known to be dead, and waits for nothing; whether it has it.

        Args:
            unchanged: what the file held at least `dead_seconds` ago, where somebody looked: an owner on another host
                that has not written since is dead.
        """
        try:
            if not self._is_local or not stat.S_ISREG(os.lstat(self._path).st_mode):
                return False
            if self._read() is None and self._path.read_bytes() != unchanged:
                return False  # Perhaps its owner is about to write into it.
            is_alone = self._lock_file()
            found, content = self._read(), self._path.read_bytes()
        except (OSError, ConfigError):
            self._close()
            return False
        if content == unchanged or (is_alone and found is not None and found.get("boot") == _boot()):
            return True
        self._close()
        return False

    def check(self) -> None:
        """To be called before something is written.

        Raises:
            WriteError: another process has taken this one for dead, and works in the folder now.
        """
        found = self._read()
        if self._lost or (found is not None and not self._is_mine()):
            self._lost = True
            raise WriteError(f"{self._path}: taken over by {_describe(found or {})}; this process stops")

    def is_lock(self) -> bool:
        """Whether the file is one of ours, or empty as one that was just made."""
        return is_file(self._path) and (self._read() is not None or not read_file(self._path))

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._thread is None:
            self._close()
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):  # The folder may be gone.
            if not self._lost and self._is_mine():
                self._path.unlink()
        self._close()

    def _lock_file(self) -> bool:
        """Whether the system lets nobody else on this host have the file."""
        if not self._is_local:
            return False
        while True:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close()
                raise self._refusal(self._read() or {}) from None
            except OSError:  # A file system without locks.
                self._close()
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                    return True
            self._close()  # The owner gave the lock back just now, and removed the file.

    def _watch(self, owner: dict[str, Any], say: Callable[[str], None]) -> None:
        say(f"{self._path}: held by {_describe(owner)}; waiting up to {self._dead_seconds:.0f} s to see if it is alive")
        until = time.monotonic() + self._dead_seconds
        seen = str(owner)  # Compared as text, since NaN would differ from itself.
        while time.monotonic() < until:
            time.sleep(min(1.0, self._dead_seconds / 20))
            now = self._read()
            if now is None:
                return  # Given back.
            if str(now) != seen:
                self._close()
                raise self._refusal(now)

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            with contextlib.suppress(OSError):  # A disk that is away for a moment.
                if not self._path.exists():
                    self._make_again()
                elif self._read() is not None and not self._is_mine():
                    self._lost = True
                    return
                self._renewals += 1
                self._write()

    def _make_again(self) -> None:
        """Writes the file again after somebody has removed it, so that others see the lock; not if another process has
        made one."""
        if self._fd is not None:
            fresh = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before, self._fd = self._fd, fresh
            os.close(before)

    def _write(self) -> None:
        text = json.dumps(self._owner | {"renewals": self._renewals}) + "\n"
        if self._fd is None:
            self._path.write_text(text)
        else:
            os.pwrite(self._fd, text.encode(), 0)
            os.ftruncate(self._fd, len(text.encode()))

    def _read(self) -> dict[str, Any] | None:
        """Who the file says holds the lock; None where it says nothing of the kind."""
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and {"host", "pid", "since"} <= found.keys() else None

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and {**found, "renewals": 0} == {**self._owner, "renewals": 0}

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _refusal(self, owner: dict[str, Any]) -> ConfigError:
        who = _describe(owner)
        return ConfigError(f"{self._path.parent}: in use by {who}; wait for it, stop it, or work elsewhere")


def _myself() -> dict[str, Any]:
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    me = {"pid": os.getpid(), "start": _start(os.getpid()), "since": since, "id": uuid.uuid4().hex}
    return {"host": socket.gethostname(), "boot": _boot(), "container": _container()} | me


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether that process was started on this host, since it was last booted, and its number means the same here."""
    here = socket.gethostname(), _boot(), _container()
    return (owner["host"], owner.get("boot"), owner.get("container")) == here


def _is_running(owner: dict[str, Any]) -> bool:
    return _start(owner["pid"]) is not None and _start(owner["pid"]) == owner.get("start")


def _boot() -> str:
    """A name for this boot of this machine; empty where the system has none."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _container() -> str:
    """The container in which processes have numbers of their own."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _start(pid: Any) -> str | None:
    """When a process began, in the kernel's clock; None where there is none of that number."""
    try:
        return pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError, TypeError, OverflowError):
        pass
    try:
        os.kill(int(pid), 0)
        return "running"
    except (OSError, ValueError, TypeError, OverflowError):
        return None
