"""Seals: what a finished folder holds, to the byte, and whether it still does.

In: a folder. Out: a file beside the others that names them all, and later on what is no longer as it says.

    seal.json       size and CRC-32 of every other file, by path; written last

A folder without a seal was never finished; one whose files differ from it is damaged. What a seal names, and is as it
says, is known to be ours: nothing else is ever removed with the folder.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from etils import epath

from jaxsft.disk.writing import is_file, read_file, write_whole

SEAL = "seal.json"
REMOVING = "removing.json"
"""The name of a seal while its folder is being removed."""
UNFINISHED = "it was never finished"
CRC_READ_SIZE = 2**24
MAX_THREADS = 8


class Entry(NamedTuple):
    """A file as it was sealed."""

    size: int
    crc32: int


Look: TypeAlias = Callable[[epath.Path, dict[str, Entry]], dict[str, Entry | None]]


def seal(folder: epath.Path) -> None:
    """Seals a folder as it stands."""
    write_seal(folder, checksums(folder))


def write_seal(folder: epath.Path, entries: Mapping[str, Entry]) -> None:
    """Seals a folder with what is known of all its files."""
    in_order = {name: entries[name]._asdict() for name in sorted(entries)}
    write_whole(folder / SEAL, json.dumps(in_order, indent=1))


def read_seal(path: epath.Path) -> dict[str, Entry]:
    """The entries of a seal.

    Raises:
        ValueError: the file is no seal; says what it is.
        OSError: it cannot be read.
    """
    entries = {}
    for name, each in read_object(path).items():
        if not (isinstance(each, dict) and each.keys() == {"size", "crc32"}):
            raise ValueError(f"{path.name} is no seal: {str(each)[:40]!r} for {name!r}")
        if any(type(value) is not int for value in each.values()):
            raise ValueError(f"{path.name} is no seal: {str(each)[:40]!r} for {name!r}")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path.name} is no seal: it names {name!r}")
        entries[name] = Entry(each["size"], each["crc32"])
    return entries


def read_object(path: epath.Path) -> dict[str, Any]:
    """A file of ours that holds a JSON object.

    Raises:
        ValueError: it holds something else; says what.
        OSError: it cannot be read.
    """
    data = read_file(path)
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no object but {str(found)[:40]!r}")
    return found


def problem_of(folder: epath.Path, *, look: Look | None = None, free: Collection[str] = ()) -> str | None:
    """What is wrong with a sealed folder, None when every file is as it was sealed; others may stand beside them.

    Args:
        folder: the folder.
        look: says of each file that the seal names what is there, as `found_of` does, which looks at all of them.
        free: files that may have been changed or removed since.
    """
    if not (folder / SEAL).exists():
        return UNFINISHED
    try:
        sealed = read_seal(folder / SEAL)
        if not sealed:
            return f"it cannot be read: {SEAL} names no file"
        sealed = {name: entry for name, entry in sealed.items() if name not in free}
        found = (look or found_of)(folder, sealed)
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return problem_with(sealed, found)


def found_of(folder: epath.Path, entries: Mapping[str, Entry]) -> dict[str, Entry | None]:
    """What is there of files that a seal names; None where nothing is.

    Raises:
        ValueError, OSError: as `checksum`.
    """
    there = [name for name in entries if (folder / name).exists()]
    return dict.fromkeys(entries) | _in_threads(folder, there)


def problem_with(sealed: Mapping[str, Entry], found: Mapping[str, Entry | None]) -> str | None:
    """What differs, in a sentence; None where nothing does."""
    differing = sorted(name for name in sealed if sealed[name] != found[name])
    if not differing:
        return None
    name = differing[0]
    was, now = _describe(sealed[name]), _describe(found[name])
    return f"{len(differing)} files differ from its seal, first {name}: {was} sealed, {now} found"


def _describe(entry: Entry | None) -> str:
    return "nothing" if entry is None else f"{entry.size:,} bytes with CRC-32 {entry.crc32:08x}"


def read_sealed_object(folder: epath.Path, name: str) -> dict[str, Any]:
    """One file of a sealed folder, compared with its seal; the other files are not looked at.

    Raises:
        ValueError, OSError: it is not there, is no JSON object, or is not as it was sealed.
    """
    if read_seal(folder / SEAL).get(name) != checksum(folder / name):
        raise ValueError(f"{name} differs from its seal")
    return read_object(folder / name)


def checksums(folder: epath.Path, *, within: str = "", but: Collection[str] = ()) -> dict[str, Entry]:
    """Size and CRC-32 of every file but the seal, by path.

    Args:
        folder: the folder.
        within: only of what is in this folder of it.
        but: files and folders of it that are left out, by path.
    """
    names = _names(folder, within, {SEAL, *but})
    return _in_threads(folder, names)


def _in_threads(folder: epath.Path, names: Iterable[str]) -> dict[str, Entry]:
    """The sums of files, several at a time: neither reading nor summing needs Python."""
    names = sorted(names)
    with concurrent.futures.ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True))


def checksum(path: epath.Path) -> Entry:
    """Size and CRC-32 of a file.

    Raises:
        ValueError: it is no file, but a pipe, a device or a link to nothing.
        OSError: it cannot be read.
    """
    if not is_file(path):
        raise ValueError(f"{path.name} is no file")
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(CRC_READ_SIZE):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return Entry(size, crc)


def remove_sealed(folder: epath.Path, *, to_the_byte: bool = False) -> None:
    """Removes the files that the seal names, and the folders that are empty then; what else is there stays.

    Killed on the way, the folder is no longer taken for a finished one, and `finish_removing` goes on with it.

    Args:
        folder: a sealed one.
        to_the_byte: keep files that were changed since, and not only those whose size has changed.
    """
    (folder / SEAL).replace(folder / REMOVING)
    finish_removing(folder, to_the_byte=to_the_byte)


def finish_removing(folder: epath.Path, *, to_the_byte: bool = False) -> None:
    """Goes on with a removal that was cut off; without one, nothing happens."""
    try:
        entries = read_seal(folder / REMOVING)
    except (OSError, ValueError):
        return
    parents: dict[str, epath.Path] = {}
    for name, entry in entries.items():
        path = folder / name
        above = [folder.joinpath(*name.split("/")[:depth]) for depth in range(1, name.count("/") + 1)]
        if any(os.path.islink(each) for each in above):
            continue  # A link is not ours, whatever it leads to: we make none.
        parents |= {str(each): each for each in above}
        is_ours = is_file(path) and not os.path.islink(path) and path.stat().length == entry.size
        if is_ours and (not to_the_byte or checksum(path) == entry):
            path.unlink()
    (folder / REMOVING).unlink()
    for each in (*sorted(parents.values(), key=lambda each: -str(each).count("/")), folder):
        if each.is_dir() and not any(each.iterdir()):
            each.rmdir()


def _names(folder: epath.Path, within: str, but: Collection[str]) -> list[str]:
    names: list[str] = []
    for child in (folder / within if within else folder).iterdir():
        name = f"{within}/{child.name}" if within else child.name
        if name not in but:
            names += _names(folder, name, but) if child.is_dir() else [name]
    return names
