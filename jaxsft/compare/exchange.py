"""The folder in which the programs of a comparison find what they exchange; it is there only while they run.

In: the folder of the report. Out: a scratch folder beside it, with a lock that ends with its owner, and a note that
says what it is. What a killed comparison left behind is removed by the next one, if note and lock show whose it was and
that nobody works there; any other folder is somebody's.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

from jaxsft.config import ConfigError
from jaxsft.disk.locks import Lock
from jaxsft.disk.pages import MADE_BY, make_folder, refuse_other_pages, write_page
from jaxsft.disk.writing import WriteError, write_error, write_whole, writing

LOCK, NOTE = "owner.lock", "exchange.json"
LOGS = {"log.txt": "log.txt", "ours.txt": "ours.txt"}
"""What children print, and its name in the folder of the report where one of them fails."""

NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written")
"""In the words of the system, and of numpy."""


@contextlib.contextmanager
def exchange(out: pathlib.Path, say: Callable[[str], None] = lambda text: None) -> Iterator[pathlib.Path]:
    """A folder beside `out` for what two programs exchange; it goes when they are done, as do those of killed ones.

    What a child that failed had printed is kept in `out`.

    Raises:
        ConfigError: files of the names that are written to `out` are there and not ours.
        WriteError: there is no room.
    """
    refuse_other_pages(out / name for name in LOGS.values())
    make_folder(out.parent)
    prefix = f".{out.name}.exchange-"
    for left in sorted(out.parent.glob(f"{prefix}*")):
        _remove_left(left, out.name, say)
    with writing(out.parent):
        scratch = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=prefix))
    lock = Lock(scratch / LOCK)
    try:
        lock.acquire()
        # Only now: a folder with a note has, or had, an owner.
        write_whole(scratch / NOTE, _note(out.name))
        with room(scratch):
            yield scratch
    except (ConfigError, WriteError):
        with contextlib.suppress(OSError, ConfigError):  # The first error is the one to tell.
            _keep_logs(scratch, out)
        raise
    finally:
        _remove(scratch, lock)


@contextlib.contextmanager
def room(folder: pathlib.Path) -> Iterator[None]:
    """What is raised for want of room inside becomes a `WriteError` about `folder`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError) or not NO_ROOM.search(str(error)):
            raise
        raise write_error(folder, error.strerror or str(error)) from error


def _note(name: str) -> str:
    return json.dumps(MADE_BY | {"exchange_of": name}) + "\n"


def _remove_left(folder: pathlib.Path, name: str, say: Callable[[str], None]) -> None:
    """Removes what a killed comparison left, if it is that."""
    with contextlib.suppress(OSError):
        if folder.is_symlink() or (folder / NOTE).is_symlink() or (folder / NOTE).read_bytes() != _note(name).encode():
            return
        lock = Lock(folder / LOCK)
        try:
            lock.acquire(say)
        except ConfigError:
            return  # Somebody works there.
        say(f"{folder}: removed, left by a comparison that was killed")
        _remove(folder, lock)


def _remove(folder: pathlib.Path, lock: Lock) -> None:
    """Lock and note last: whatever is left of it until then is known again."""
    with contextlib.suppress(OSError):
        for each in list(folder.iterdir()):
            if each.name in (LOCK, NOTE):
                continue
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each, ignore_errors=True)
            else:
                each.unlink()
    with contextlib.suppress(OSError):
        lock.release()
        (folder / LOCK).unlink(missing_ok=True)
        (folder / NOTE).unlink(missing_ok=True)
        os.rmdir(folder)


def _keep_logs(scratch: pathlib.Path, out: pathlib.Path) -> None:
    for name, kept in LOGS.items():
        for log in sorted(scratch.rglob(name)):
            make_folder(out)
            write_page(out / kept, log.read_bytes())
