"""Seals: what a finished folder holds, to the byte, and whether it still does.

In: a folder. Out: a file beside the others that names them all, and later on what is no longer as it says.

    seal.json       size and CRC-32 of every other file, by path; written last

A folder without a seal was never finished; one whose files differ from it is damaged. What a seal names, and is as it
says, is known to be ours: nothing else is ever removed with the folder.
"""

import json
import os
import zlib
from typing import Any, NamedTuple

from etils import epath

from jaxsft.disk.writing import is_file, read_file, write_whole

SEAL = "seal.json"
REMOVING = "removing.json"
"""The name of a seal while its folder is being removed."""
UNFINISHED = "it was never finished"
CRC_READ_SIZE = 2**24


class Entry(NamedTuple):
    """A file as it was sealed."""

    size: int
    crc32: int


def seal(folder: epath.Path, *, but: str | None = None) -> None:
    """Seals a folder as it stands, but for a file that will be gone when it is finished."""
    entries = {name: each._asdict() for name, each in checksums(folder).items() if name != but}
    write_whole(folder / SEAL, json.dumps(entries, indent=1))


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


def problem_of(folder: epath.Path) -> str | None:
    """What is wrong with a sealed folder, None when every file is as it was sealed; others may stand beside them."""
    if not (folder / SEAL).exists():
        return UNFINISHED
    try:
        sealed = read_seal(folder / SEAL)
        if not sealed:
            return f"it cannot be read: {SEAL} names no file"
        found = {name: checksum(folder / name) if (folder / name).exists() else None for name in sealed}
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
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


def checksums(folder: epath.Path) -> dict[str, Entry]:
    """Size and CRC-32 of every file but the seal, by path."""
    found = {str(path.relative_to(folder)): checksum(path) for path in sorted(_files(folder))}
    found.pop(SEAL, None)
    return found


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


def _files(folder: epath.Path) -> list[epath.Path]:
    files = []
    for child in folder.iterdir():
        files += _files(child) if child.is_dir() else [child]
    return files
