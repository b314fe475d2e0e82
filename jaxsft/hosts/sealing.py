"""Seals of folders in which several processes write: each sums up and looks at its own share, and all of them agree.

In: a folder that all of them see. Out: one seal over it, written last by process 0, as one process would have written
it; and later on what is no longer as it says, the same on every process.
"""

import json
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from etils import epath

from jaxsft.disk.seal import SEAL, Entry, found_of, problem_of, problem_with, write_seal
from jaxsft.hosts.exchange import done_by_first, gather_texts


def seal_together(folder: epath.Path, sums: Callable[[], Mapping[str, Entry]]) -> None:
    """Seals a folder with what all processes have summed up; every process must call this, in any thread.

    Args:
        folder: of which every file is somebody's.
        sums: the files of this process by their paths in the folder.

    Raises:
        OSError: a file could not be read or the seal not be written, on whichever process; on that one as it was.
    """
    problem: Exception | None = None
    told: dict[str, Any] = {}
    try:
        told["entries"] = {name: [*entry] for name, entry in sums().items()}
    except Exception as error:  # whatever it is, the others must not wait for ever
        problem, told = error, {"problem": _by_whom(str(error) or type(error).__name__)}
    parts = [json.loads(text) for text in gather_texts("seal", json.dumps(told))]
    failed = next((part["problem"] for part in parts if "problem" in part), "")
    if problem is not None:
        raise problem
    if failed:
        raise OSError(failed)
    entries = {name: Entry(*each) for part in parts for name, each in part["entries"].items()}
    done_by_first("sealed", lambda: write_seal(folder, entries))


def problem_together(folder: epath.Path, *, free: Collection[str] = ()) -> str | None:
    """As `problem_of`: each process reads its share of the bytes, and all of them get the same answer."""
    if jax.process_count() == 1:
        return problem_of(folder, free=free)
    this, count = jax.process_index(), jax.process_count()
    found: dict[str, Entry | None] = {}
    sealed: dict[str, Entry] = {}

    def look(folder: epath.Path, entries: dict[str, Entry]) -> dict[str, Entry | None]:
        sealed.update(entries)
        found.update(found_of(folder, {name: entries[name] for name in shares(entries, count)[this]}))
        return dict(entries) | found

    told: dict[str, Any] = {"problem": problem_of(folder, look=look, free=free)}
    if sealed:
        told["seal"] = zlib.crc32(json.dumps(sealed).encode())
        if told["problem"] is not None:
            told["differing"] = {name: entry for name, entry in found.items() if entry != sealed[name]}
    parts = [json.loads(text) for text in gather_texts("verify", json.dumps(told))]
    if len({part.get("seal") for part in parts}) > 1:
        return f"it cannot be read: not every process finds the same {SEAL} there"
    problems = [part["problem"] for part in parts]
    differing = {name: entry and Entry(*entry) for part in parts for name, entry in part.get("differing", {}).items()}
    if differing:
        return problem_with(sealed, dict(sealed) | differing)
    return next((problem for problem in problems if problem is not None), None)


def shares(entries: Mapping[str, Entry], count: int) -> list[list[str]]:
    """The files in `count` shares of about as many bytes, the same on every process: largest first, to the smallest."""
    found: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(entries, key=lambda name: (-entries[name].size, name)):
        least = sizes.index(min(sizes))
        found[least].append(name)
        sizes[least] += entries[name].size
    return found


def _by_whom(text: str) -> str:
    return text if jax.process_count() == 1 else f"process {jax.process_index()}: {text}"
