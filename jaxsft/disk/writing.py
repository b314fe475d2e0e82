"""How files are written: whole or not at all, and never over what is not ours.

In: paths, on a disk or in a bucket. Out: files that are complete whenever they are there, and one kind of error where
there is no room for them.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath, check_scheme, is_bucket

Path: TypeAlias = epath.Path | pathlib.Path


class WriteError(OSError):
    """Something could not be written; what was there before is untouched. Its text is shown as it is."""

    exit_code = 74


def place(path: str | os.PathLike[str], key: str = "") -> Any:
    """A path that a user gave, on a disk or in a bucket: `gs://`, `s3://`, `file://`, or as `at_home` takes it.

    Args:
        path: as it was given.
        key: of the config, for the error.

    Returns:
        A `pathlib.Path`, or a `BucketPath`, which has the methods of one.

    Raises:
        ConfigError: as `at_home`; or what stands before `://` is not known, or its package is not installed.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return at_home(text.removeprefix("file://"), key)
    if not is_bucket(text):
        return at_home(text, key)
    check_scheme(text, key)
    return BucketPath(text)


def at_home(path: str | os.PathLike[str], key: str = "") -> pathlib.Path:
    """A path on a disk that a user gave, with `~` and `~name` at its beginning as the folders that they stand for.

    Args:
        path: as it was given.
        key: of the config, for the error.

    Raises:
        ConfigError: nobody knows that folder: HOME is not set and the user is in no list, or there is no such user; or
            it is a bucket, of which no folder of that name is made.
    """
    text = os.fspath(path)
    if is_bucket(text):
        raise ConfigError(f"{f'{key}: ' * bool(key)}{text}: no bucket can be used here, only a path on a disk")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        start = text.split("/")[0]
        remedy = "set HOME, or give the path in full" if start == "~" else "give the path in full"
        raise ConfigError(f"{f'{key}: ' * bool(key)}{text}: the folder of {start} is not known; {remedy}") from None


def user_cache(say: Callable[[str], None] = lambda text: None) -> pathlib.Path:
    """The folder of this program in the user's cache; where the user has no home, a private one among temporary files.

    Args:
        say: is told where that is.

    Raises:
        ConfigError: there is such a private folder, and it is somebody else's.
        WriteError: it cannot be made.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(folder) / "jaxsft"
    with contextlib.suppress(ConfigError):
        return at_home("~") / ".cache" / "jaxsft"
    private = pathlib.Path(tempfile.gettempdir()) / f"jaxsft-{os.getuid()}"
    with writing(private), contextlib.suppress(FileExistsError):
        private.mkdir(mode=0o700)
    found = private.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{private}: not a folder that only this user writes into; give another as data.cache")
    if private not in _TOLD:
        _TOLD.add(private)
        say(f"{private}: prepared data go there, since HOME is not set; set HOME or data.cache to keep them elsewhere")
    return private


_TOLD: set[pathlib.Path] = set()
"""Private folders that this process has spoken of."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside and renames it, so that it is never there in part; an object is not, by itself.

    Raises:
        WriteError: names the path, the bytes needed and the bytes free.
    """
    data = content.encode() if isinstance(content, str) else content
    aside = aside_of(path)
    with writing(path, len(data)):
        if is_bucket(path):
            path.write_bytes(data)
            return
        try:
            # What a killed write has left; of a link, the link itself is removed, and not what it leads to.
            aside.unlink(missing_ok=True)
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


def write_new(path: pathlib.Path, content: str) -> None:
    """Writes a file that must not be there yet, whole or not at all.

    Raises:
        ConfigError: something of that name is there.
        WriteError: it cannot be written.
    """
    data = content.encode()
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("xb")
        except FileExistsError:
            raise ConfigError(f"{path}: exists, and is not written over; give another name") from None
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)  # it is ours: it was not there before
            raise


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file; an object is written again, with it.

    Raises:
        WriteError: there is no room for it.
    """
    with writing(path, len(data)):
        if is_bucket(path):
            path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
            return
        with path.open("ab") as file:
            file.write(data)


def aside_of(path: Path) -> Any:
    """Where a file stands until it is whole: a name that nobody else gives."""
    return path.parent / f".{path.name}.jaxsft-part"


def is_file(path: Path) -> bool:
    """Whether there is a regular file, or a link to one: what can be read without waiting for anyone."""
    if isinstance(path, BucketPath):
        return path.is_file()
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def read_file(path: Path, *, most: int = 2**26) -> bytes:
    """A small file of ours.

    Raises:
        ValueError: it is no file, or larger than `most` bytes.
        OSError: it is not there, or cannot be read.
    """
    if path.exists() and not is_file(path):
        raise ValueError(f"{path.name} is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} has more than {most:,} bytes")
    return data


def refuse_others(path: Path, *marks: bytes) -> None:
    """Refuses to write over a file that is not ours: one that holds none of `marks` in its first 4 KiB.

    A link is somebody's, wherever it leads, and would be replaced.

    Raises:
        ConfigError: there is such a file, or something that is no file.
    """
    is_link = os.path.islink(path)
    if not (is_link or path.exists()):
        return
    begin = b""
    if not is_link and is_file(path):
        with path.open("rb") as file:
            begin = file.read(4096)
    if not any(mark in begin for mark in marks):
        raise ConfigError(f"{path}: exists and was not written by jaxsft; move it away, or write elsewhere")


def set_aside(path: Path, suffix: str = "before", *, name: str | None = None) -> Any:
    """Renames what is in the way to `NAME.SUFFIX-N`, of the first N that is free; returns the new path."""
    number = 1
    while (aside := path.with_name(f"{name or path.name}.{suffix}-{number}")).exists():
        number += 1
    with writing(aside):
        path.rename(aside)
    return aside


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns every error of the system that is raised inside into one `WriteError` about `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error.strerror or str(error), needed) from error


def write_error(path: Path, reason: str, needed: int | None = None) -> WriteError:
    """The error of what could not be written: why, the bytes that it needs, and those that are free there."""
    free = free_bytes(path)
    sizes = [f"{needed:,} bytes needed"] if needed is not None else []
    sizes += [f"{free:,} bytes free"] if free is not None else []
    return WriteError(f"{path}: could not be written: {reason}" + (f" ({', '.join(sizes)})" if sizes else ""))


def check_space(path: Path, needed: int) -> None:
    """Refuses to begin what will not fit.

    Raises:
        WriteError: fewer than `needed` bytes are free where `path` is or will be.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise write_error(path, os.strerror(errno.ENOSPC), needed)


def free_bytes(path: Path) -> int | None:
    """Bytes free where a path is or will be; None where that cannot be known, as in a bucket."""
    if is_bucket(path):
        return None
    place = pathlib.Path(os.fspath(path)).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None
