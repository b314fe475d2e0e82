"""Places that are no disk: objects in buckets, under the same methods as files have on a disk.

In: what a user gave where a file or folder goes. Out: its path: a `pathlib.Path`, or a `BucketPath` for `gs://`,
`s3://` and `memory://` (fsspec's, which ends with the process: for tests). Credentials, addresses and the like are what
the libraries find by themselves.

A bucket knows whole objects: one is there as it was written, or not at all. Nothing is appended to, and a folder is no
more than the names that begin with it. What is renamed is copied and then removed.

A call that fails as connections do is tried again for half a minute, and then is one `OSError`.
"""

import errno
import glob
import importlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from etils import epath

from jaxsft.config import ConfigError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "memory": "fsspec"}
"""What comes before `://` -> the package that knows such buckets."""
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds until a call is tried again."""
SMALL_BYTES = 2**20
"""An object that is read as a whole when it is opened."""
READ_BYTES = 2**23
"""Of a larger one, how much is asked for at once."""

_Result = TypeVar("_Result")
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_VERSION_KEYS = ("size", "ETag", "LastModified", "generation", "md5Hash", "crc32c", "updated", "created")


class BucketError(OSError):
    """A bucket could not be reached, or refused what was asked of it."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of no disk: a `BucketPath`, or its text."""
    return "://" in os.fspath(path)


class Stat(NamedTuple):
    """What is known of an object."""

    length: int
    version: str
    """Changes whenever the object is written."""

    @property
    def st_size(self) -> int:
        """Bytes, as `os.stat` calls them."""
        return self.length


class BucketPath(epath.Path):
    """The path of an object, or of the folder that names of objects seem to make.

    Worked example: `BucketPath("s3://data/run") / "a.txt"` is `s3://data/run/a.txt`, the object `run/a.txt` of the
    bucket `data`. Its parts are ("/", "s3:", "data", "run", "a.txt").

    All methods raise `BucketError` where the bucket cannot be reached.
    """

    # Python 3.12 turned round which of the two takes the parts.
    if sys.version_info < (3, 12):

        def __new__(cls, *parts: str | os.PathLike[str]) -> "BucketPath":
            return super().__new__(cls, *map(_as_part, parts))

    else:

        def __init__(self, *parts: str | os.PathLike[str]) -> None:
            super().__init__(*map(_as_part, parts))

    def __str__(self) -> str:
        parts = self.parts
        return f"{parts[1]}//{'/'.join(parts[2:])}" if self.is_absolute() else "/".join(parts)

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    @property
    def _key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def _files(self) -> Any:
        return _filesystem(self.parts[1][:-1])

    def _info(self) -> dict[str, Any] | None:
        try:
            # Not fsspec's own `exists`, which takes any failure for absence.
            return self._tried(lambda: self._files.info(self._key))
        except FileNotFoundError:
            return None

    def _tried(self, call: Callable[[], _Result]) -> _Result:
        return _tried(str(self), call)

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> Any:
        found = self._info()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        known = {key: str(found[key]) for key in _VERSION_KEYS if key in found}
        return Stat(found["size"] or 0, json.dumps(known, sort_keys=True))

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def absolute(self) -> "BucketPath":
        return self

    def expanduser(self) -> "BucketPath":
        return self

    def iterdir(self) -> Iterator["BucketPath"]:
        """What the folder holds; nothing where there is none."""
        try:
            found = self._tried(lambda: self._files.ls(self._key, detail=False))
        except FileNotFoundError:
            return
        names = {name.strip("/").rpartition("/")[2] for name in found if name.strip("/") != self._key}
        yield from (self / name for name in sorted(names))

    def files(self) -> list["BucketPath"]:
        """All objects below, in folders too, by name."""
        found = self._tried(lambda: self._files.find(self._key))
        return [self._of_key(name) for name in sorted(found) if not name.endswith("/")]

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        found = self._tried(lambda: self._files.glob(f"{glob.escape(self._key)}/{pattern}"))
        yield from (self._of_key(name) for name in sorted(found))

    def _of_key(self, key: str) -> "BucketPath":
        return BucketPath(f"{self.parts[1]}//{key.strip('/')}")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing needs to be made; refused where there is something, as on a disk."""
        if (not exist_ok or self.is_file()) and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def rmdir(self) -> None:
        """Nothing is left of a folder in which there is nothing."""

    def rmtree(self, missing_ok: bool = False) -> None:
        for each in self.files():
            each.unlink(missing_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._tried(lambda: self._files.rm_file(self._key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: str | os.PathLike[str]) -> "BucketPath":
        """Copies, and removes what was copied when all of it is there.

        Raises:
            FileExistsError: there is something.
        """
        to = BucketPath(target)
        if to.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
        return self.replace(to)

    def replace(self, target: str | os.PathLike[str]) -> "BucketPath":
        to = BucketPath(target)
        places = {self: to} if self.is_file() else {each: to / each.relative_to(self) for each in self.files()}
        for each, place in places.items():
            each.copy_to(place)
        for each in places:
            each.unlink(missing_ok=True)
        return to

    def copy_to(self, target: "BucketPath") -> None:
        """Copies an object within its bucket, or to another one of the same kind."""
        self._tried(lambda: self._files.cp_file(self._key, target._key))

    def open(self, mode: str = "r", **options: Any) -> Any:
        """For reading only: an object is written as a whole."""
        if mode == "r":
            return io.TextIOWrapper(self.open("rb"), encoding="utf-8", newline=options.get("newline"))
        if mode != "rb":
            raise ValueError(f"{self}: opened with mode {mode!r}; an object is written by write_bytes or upload")
        found = self.stat()
        if found.length <= SMALL_BYTES:
            return io.BytesIO(self.read_bytes())
        return io.BufferedReader(_Ranges(self, found.length), READ_BYTES)

    def read_bytes(self) -> bytes:
        return self._tried(lambda: self._files.cat_file(self._key))

    def read_range(self, start: int, count: int) -> bytes:
        """So many bytes from `start` on; fewer where the object ends before."""
        return self._tried(lambda: self._files.cat_file(self._key, start=start, end=start + count)) if count else b""

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: Any) -> int:
        content = bytes(data)
        self._tried(lambda: self._files.pipe_file(self._key, content))
        return len(content)

    def write_text(self, content: str, *options: Any, **named: Any) -> int:
        return self.write_bytes(content.encode())

    def upload(self, source: pathlib.Path) -> None:
        """Writes the object from a file, in parts where it is large; it is there when all of them are."""
        self._tried(lambda: self._files.put_file(str(source), self._key))

    def download(self, target: pathlib.Path) -> None:
        """Writes the object into a file."""
        self._tried(lambda: self._files.get_file(self._key, str(target)))


epath.register_path_cls(BucketPath)  # so that `epath.Path` of one is itself


class _Ranges(io.RawIOBase):
    """A large object, read in parts."""

    def __init__(self, path: BucketPath, length: int) -> None:
        self._path, self._length, self._at = path, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._path.read_range(self._at, max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _as_part(part: str | os.PathLike[str]) -> str:
    scheme, mark, rest = os.fspath(part).partition("://")
    return f"/{scheme}:/{rest}" if mark else scheme


def check_scheme(text: str, key: str = "") -> str:
    """What stands before `://`, of a kind of bucket that is known and whose package is there.

    Raises:
        ConfigError: it is not; says what is known, or what to install.
    """
    scheme, _, rest = text.partition("://")
    label = f"{key}: " * bool(key)
    if scheme not in PACKAGES:
        known = ", ".join(f"{each}://" for each in ("gs", "s3", "file"))
        raise ConfigError(f"{label}{text}: {scheme}:// is not known; expected a path on a disk, or one of {known}")
    if not rest.strip("/"):
        raise ConfigError(f"{label}{text}: names no bucket; expected {scheme}://BUCKET/FOLDER")
    try:
        importlib.import_module(PACKAGES[scheme])
    except ImportError:
        raise ConfigError(
            f"{label}{text}: {scheme}:// needs the package {PACKAGES[scheme]}: pip install 'jaxsft[buckets]'"
        ) from None
    return scheme


def _filesystem(scheme: str) -> Any:
    """fsspec's object for a kind of bucket, one for each process; it remembers no listings, which others change."""
    import fsspec

    if scheme == "memory":
        return fsspec.filesystem("memory")
    if scheme == "gs":
        return fsspec.filesystem("gs", use_listings_cache=False)
    # `_tried` tries again; with their own tries in between nobody could say how long that takes.
    once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 20, "read_timeout": 60}
    files = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=once)
    files.retries = 1
    return files


def _tried(where: str, call: Callable[[], _Result]) -> _Result:
    """The result of a call of fsspec's.

    Raises:
        OSError: what it refused, as on a disk; a `BucketError` where it was tried again in vain, or cannot be done.
    """
    begin = time.monotonic()
    bucket = "/".join(where.split("/")[:3])
    # gcsfs tries again by itself; and what was given up just now is asked once.
    delays = () if where.startswith("gs://") or bucket in _GIVEN_UP else DELAYS
    for delay in (*delays, None):
        try:
            result = call()
            _GIVEN_UP.discard(bucket)
            return result
        except _FINAL:
            raise
        except Exception as error:
            library = type(error).__module__.partition(".")[0]
            if not isinstance(error, OSError) and library not in _LIBRARIES:
                raise  # a bug, of ours or theirs
            reason = " ".join((str(error) or type(error).__name__).split())[:300]
            if type(error).__name__ in _HOPELESS or 400 <= _code(error) < 500:
                raise BucketError(errno.EIO, reason, where) from error
            if delay is None:
                _GIVEN_UP.add(bucket)
                times = len(delays) + 1
                reason += f" (tried {times} times in {time.monotonic() - begin:.0f} s)" * (times > 1)
                raise BucketError(errno.EIO, reason, where) from error
        time.sleep(delay)
    raise AssertionError


_GIVEN_UP: set[str] = set()
"""Buckets that did not answer, however often they were asked; so that an end is not put off by each thing it does."""
_LIBRARIES = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "s3fs",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
    "fsspec",
    "asyncio",
)
_HOPELESS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError")


def _code(error: Exception) -> int:
    """Of HTTP, where the library says it."""
    code = str(getattr(error, "code", ""))
    return int(code) if code.isdigit() else 0
