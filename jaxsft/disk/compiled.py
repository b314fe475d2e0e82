"""Compiled programs are kept on disk, so that the next start of a run does not compile them again.

    CACHE/compiled/MACHINE/jaxsft.txt       the mark: what this folder is; without it nothing here is written or removed
    CACHE/compiled/MACHINE/NAME-KEY-cache   a program, written and read by jax

In: the environment. Out: `JAX_COMPILATION_CACHE_DIR`, for this process and for those that it starts, unless the user
has set it. jax decides what is kept (programs that took a second to compile) and finds it by a key of the program, the
versions, the flags and the devices.

Three things are left to us. jax writes a program straight to its final name, and never again where that name is there.
A process that is killed in between leaves a part of a program, which jax notices, and compiles anew at every start:
such a part is removed here. A program for the CPU of one machine is loaded on any other, whatever that one can compute,
where two of them share a home: each kind of machine has a folder of its own. And who can write such a file can run code
as the user who reads it: the folder is the user's alone.
"""

import contextlib
import importlib
import os
import pathlib
import platform
import re
import stat
import time
import uuid
import zlib
from collections.abc import Callable
from typing import Any

from jaxsft.config import ConfigError
from jaxsft.disk.writing import is_file, user_cache

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MARK, MARK_TEXT = "jaxsft.txt", "Compiled programs of jaxsft, made anew where they are missing.\n"

_ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")
_MARKING = re.compile(r"\.jaxsft-[0-9a-f]{32}\.txt")
_ZLIB, _ZSTD = b"\x78", b"\x28\xb5\x2f\xfd"
_MARGIN = 3600.0
"""Seconds by which the clock of a file system may differ from that of another host."""
_CPU_FIELDS = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision",
)  # fmt: skip
"""Of /proc/cpuinfo: what says for which processors a program is."""


def keep_compiled(say: Callable[[str], None]) -> None:
    """Lets jax keep compiled programs in the user's cache; to be called before jax is imported.

    Where that cannot be, the run goes on without. A folder that the user has given to jax is left alone.

    Args:
        say: is told why no programs are kept.
    """
    if VARIABLE in os.environ:
        return
    try:
        folder = user_cache(say) / "compiled" / machine()
        _claim(folder)
        _remove_parts(folder)
    except (OSError, ConfigError) as error:
        say(f"compiled programs are not kept for the next start: {error}")
        return
    os.environ[VARIABLE] = str(folder)


def machine() -> str:
    """The kind of machine that this is, to XLA's compiler for CPUs: its processor, and how many of them may be used."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}-{count}-{zlib.crc32(_processor().encode()):08x}"


def _processor() -> str:
    """The first of /proc/cpuinfo; where that is not there, what Python knows."""
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.system()} {platform.processor()}"
    fields = (line.partition(":") for line in first.splitlines())
    return "\n".join(f"{name.strip()}:{value}" for name, _, value in fields if name.strip() in _CPU_FIELDS)


def _claim(folder: pathlib.Path) -> None:
    """Makes the folder with its mark, or sees that it is ours, and the user's alone.

    Raises:
        ConfigError: something of that name is there without the mark, or others may write into it.
        OSError: it cannot be made, or not be written into.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{folder}: not a folder that only this user writes into")
    if is_file(folder / MARK):
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{folder}: cannot be written into")
        return
    # Of a process that was killed before it could mark it; or another one has marked it meanwhile.
    if not all(_MARKING.fullmatch(path.name) for path in folder.iterdir()) and not is_file(folder / MARK):
        raise ConfigError(f"{folder}: exists and was not made by jaxsft; move it away")
    aside = folder / f".jaxsft-{uuid.uuid4().hex}.txt"
    aside.write_text(MARK_TEXT)
    os.utime(aside, (0, 0))  # Nothing in here has been looked at.
    aside.replace(folder / MARK)


def _remove_parts(folder: pathlib.Path) -> None:
    """Removes programs that are there in part: of those that came since the last look, whose time the mark bears.

    A program that another process is writing at this moment may be among them. It goes on writing into a file without
    a name, and the program is compiled once more by the next who needs it.
    """
    begin, last = time.time(), (folder / MARK).stat().st_mtime
    for path in folder.iterdir():
        if not _ENTRY.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # Another process has removed it meanwhile.
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_mtime > last - _MARGIN and not _is_whole(path):
                path.unlink()
    os.utime(folder / MARK, (begin, begin))


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a program can be unpacked to its end; packed by zlib, also whether it is as it was written."""
    packed = path.read_bytes()
    unpacker, error = _unpacker(packed)
    if unpacker is None:
        return len(packed) >= len(_ZSTD)
    try:
        for at in range(0, len(packed), 2**20):
            if not unpacker.eof:
                unpacker.decompress(packed[at : at + 2**20])
    except error:
        return False
    return unpacker.eof


def _unpacker(packed: bytes) -> tuple[Any, type[Exception]]:
    """What unpacks such bytes, as jax would, and the error that it raises; None where that is not installed."""
    if packed.startswith(_ZLIB):
        return zlib.decompressobj(), zlib.error
    if packed.startswith(_ZSTD):
        with contextlib.suppress(ImportError):
            zstd = importlib.import_module("compression.zstd")  # Python 3.14
            return zstd.ZstdDecompressor(), zstd.ZstdError
        with contextlib.suppress(ImportError):
            zstandard = importlib.import_module("zstandard")
            return zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    return None, Exception
