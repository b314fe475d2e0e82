"""Prepared data on disk: folders of our own in the cache, whole or taken for damaged, and nobody else's ever touched.

    CACHE/jaxsft-prepared/jaxsft.txt        the mark: what this folder is; without it nothing here is written or removed
    CACHE/jaxsft-prepared/KEY/tokens.bin, loss_weights.bin, writers.bin, offsets.bin, origins.bin    see `Prepared`
                              report.json   what was read, kept, dropped and cut
                              seal.json     size and CRC-32 of every other file; written last
    CACHE/jaxsft-prepared/.building-KEY-ID/ the same while it is made, and building.lock, held by who makes it

In: the arrays of prepared data. Out: the same, mapped. A folder that is being made is removed only by who makes it, or
when its lock says that its owner is dead; of any folder only files that have our names are removed.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.locks import DEAD_SECONDS, Lock
from jaxsft.disk.writing import place, user_cache, write_whole, writing

ARRAYS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "tokens": (np.int32, (-1,)),
    "loss_weights": (np.float32, (-1,)),
    "writers": (np.uint8, (-1,)),
    "offsets": (np.int64, (-1,)),
    "origins": (np.int64, (-1, 3)),
}
REPORT, SEAL, LOCK = "report.json", "seal.json", "building.lock"
MARK, MARK_TEXT = "jaxsft.txt", "Prepared data of jaxsft, made anew where it is missing.\n"

SEALED = (*(f"{name}.bin" for name in ARRAYS), REPORT)
_OURS = {*SEALED, SEAL, LOCK, *(f".{name}.jaxsft-part" for name in (REPORT, SEAL))}
"""What we write into a folder of prepared data."""
_BUILDING = re.compile(r"\.building-[0-9a-f]{16}-[0-9a-f]{32}")
_MARKING = re.compile(r"\.jaxsft-[0-9a-f]{32}\.txt")
_LONGEST_SEAL = 2**16


class Found(NamedTuple):
    """The files of a folder of prepared data."""

    arrays: dict[str, np.ndarray]
    report: dict[str, Any]


def folder(configured: str | None, say: Callable[[str], None] = lambda text: None) -> pathlib.Path:
    """Where prepared data stand on this disk: in a folder of our own in `data.cache`, or in the user's cache.

    Raises:
        ConfigError: that place begins with `~`, and there is no such folder.
    """
    if configured is not None and not isinstance(place(configured, "data.cache"), BucketPath):
        return place(configured, "data.cache") / "jaxsft-prepared"
    return user_cache(say) / "prepared"


def claim(folder: pathlib.Path) -> None:
    """Makes the folder for prepared data, with its mark, or sees that it is ours.

    Raises:
        ConfigError: something of that name is there without the mark.
        WriteError: it cannot be made.
    """
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise _not_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if _is_marked(folder):
            return
        # The folder has no mark: a process was killed before it could write one, or another process is writing it just
        # now.
        if not all(_MARKING.fullmatch(path.name) for path in folder.iterdir()) and not _is_marked(folder):
            raise _not_ours(folder)
        aside = folder / f".jaxsft-{uuid.uuid4().hex}.txt"
        aside.write_text(MARK_TEXT)
        aside.replace(folder / MARK)


def load(folder: pathlib.Path) -> Found | None:
    """The prepared data in a folder; None unless they are whole, to the byte."""
    try:
        if not all(_is_file(folder / name) for name in (*SEALED, SEAL)):
            return None
        if (folder / SEAL).stat().st_size > _LONGEST_SEAL:
            return None
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if not isinstance(seal, dict) or seal.keys() != {*SEALED}:
            return None
        if any(_checksum(folder / name) != sealed for name, sealed in seal.items()):
            return None
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r").reshape(shape)
            for name, (dtype, shape) in ARRAYS.items()
        }
        return Found(arrays, report)
    except (OSError, ValueError, RecursionError):
        return None


def check_replaceable(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """To be called where `load` found nothing whole: whether prepared data may be put there.

    Args:
        say: is told that what stands there is damaged.

    Raises:
        ConfigError: something there is no file or folder of ours.
    """
    if not folder.is_symlink() and not folder.exists():
        return
    with writing(folder):
        if folder.is_symlink() or not folder.is_dir():
            raise _not_ours(folder)
        for path in folder.iterdir():
            if path.name in _OURS and not _is_file(path) and os.path.lexists(path):
                raise _not_ours(path)  # What is gone by now was replaced by another process that prepares the same.
    say(f"{folder}: prepared data that are damaged or not whole; they are prepared anew")


@contextlib.contextmanager
def building(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to make the prepared data of `folder` in, locked; and what others left there when they died is removed.

    Raises:
        WriteError: it cannot be made.
    """
    begin, left = time.monotonic(), _remove_dead(folder.parent, {})
    made = folder.with_name(f".building-{folder.name[:16]}-{uuid.uuid4().hex}")
    lock = Lock(made / LOCK)
    with writing(made):
        made.mkdir()
        try:
            lock.acquire()
        except BaseException:
            _remove(made)
            lock.release()
            raise
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            if not made.exists():
                (folder / LOCK).unlink(missing_ok=True)  # the lock was renamed with its folder
        _remove(made)
        lock.release()
        if time.monotonic() - begin > DEAD_SECONDS:
            _remove_dead(folder.parent, left)


def finish(folder: pathlib.Path, offsets: np.ndarray, origins: np.ndarray, report: dict[str, Any]) -> None:
    """Writes the last arrays, the report, and last the seal, whose presence says that the rest is there.

    Raises:
        WriteError: there is no room for them.
    """
    for name, array in (("offsets", offsets), ("origins", origins)):
        path = folder / f"{name}.bin"
        with writing(path, array.nbytes):
            path.write_bytes(array.tobytes())
    sizes = {name: (folder / f"{name}.bin").stat().st_size for name in ARRAYS}
    write_whole(folder / REPORT, json.dumps(report | {"bytes": sizes}, indent=2, ensure_ascii=False))
    write_whole(folder / SEAL, json.dumps({name: _checksum(folder / name) for name in SEALED}, indent=1))


def put_in_place(building: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames; of several processes that prepare the same, the first one's work stays.

    What is damaged there is replaced file by file, so that whatever else stands beside it stays. Others that do the
    same at that moment write the same bytes.

    Raises:
        ConfigError: something there is not ours.
        WriteError: it cannot be renamed.
    """
    try:
        building.rename(folder)
        return
    except OSError as error:
        reason = error
    if load(folder) is not None:
        return
    with writing(folder):
        if not folder.is_symlink() and not folder.exists():
            raise reason
        check_replaceable(folder, lambda text: None)
        (folder / SEAL).unlink(missing_ok=True)
        for name in (*SEALED, SEAL):
            (building / name).replace(folder / name)


def _remove_dead(within: pathlib.Path, seen: dict[pathlib.Path, bytes]) -> dict[pathlib.Path, bytes]:
    """Removes the folders that were being made by processes that are dead.

    Args:
        within: where they stand.
        seen: what the locks of some held `DEAD_SECONDS` ago.

    Returns:
        What the locks of the others hold now: of other hosts, of which nobody here can tell at once.
    """
    left = {}
    with contextlib.suppress(OSError):
        for folder in within.iterdir():
            if not _BUILDING.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            lock = Lock(folder / LOCK)
            if lock.acquire_from_dead(seen.get(folder)):
                _remove(folder)
                lock.release()
            else:
                has_lock = _is_file(folder / LOCK)
                if folder in seen and not has_lock:
                    with contextlib.suppress(OSError):  # Only if it is empty.
                        folder.rmdir()
                with contextlib.suppress(OSError):
                    left[folder] = (folder / LOCK).read_bytes() if has_lock else b""
    return left


def _remove(folder: pathlib.Path) -> None:
    """Removes our files of a folder, the lock last, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            if path.name in _OURS and _is_file(path):
                path.unlink()
        folder.rmdir()


def _is_marked(folder: pathlib.Path) -> bool:
    with contextlib.suppress(OSError):
        if _is_file(folder / MARK):
            with (folder / MARK).open("rb") as file:
                return file.read(len(MARK_TEXT)) == MARK_TEXT.encode()
    return False


def _is_file(path: pathlib.Path) -> bool:
    """Whether there is a regular file, and no link to one: we make none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _checksum(path: pathlib.Path) -> list[int]:
    """Size and CRC-32 of a file."""
    if not path.stat().st_size:
        return [0, 0]
    content = np.memmap(path, np.uint8, "r")
    return [len(content), zlib.crc32(content)]


def _not_ours(path: pathlib.Path) -> ConfigError:
    return ConfigError(
        f"{path}: exists and was not made by jaxsft, which would keep prepared data there; move it away, or give "
        "another folder as data.cache"
    )
