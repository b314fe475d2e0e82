"""Which processes have the same folder, and work that is done once for each disk.

In: a folder that exists on every host under one name: one shared disk, or a disk of each host. Out: the process that
works there for all that share it.
"""

import contextlib
import itertools
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from jaxsft.disk.writing import Path, WriteError, writing
from jaxsft.hosts.agreement import Say, share
from jaxsft.hosts.table import Table, num_processes, process_number

T = TypeVar("T")

SAY_EVERY = 10.0
SEEN_SECONDS = 10.0
"""How long what one host has written may be out of sight of another."""


def first_with(folder: Path) -> int:
    """The lowest number of a process that has the same folder as this one; all processes ask at once.

    Each writes an empty file, of a name that was never asked for before, so that no cache of a network's disk says that
    it is not there, and looks for those of the others.

    Raises:
        WriteError: the folder is not there, or cannot be written.
    """
    mine, problem = folder / f".jaxsft-{uuid.uuid4().hex}.txt", None
    try:
        with writing(mine):
            mine.write_bytes(b"")
    except WriteError as error:
        problem = error  # The others do not know, and wait below.
    names = share("looking for a folder on all hosts", None if problem else mine.name, list)
    theirs = [number for number, name in enumerate(names) if name and number < process_number()]
    first = next((number for number in theirs if (folder / names[number]).exists()), process_number())
    share("looking for a folder on all hosts", None, len)  # Nobody removes before all have looked.
    if problem:
        raise problem
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
    return first


def once_per_disk(
    folder: Path,
    what: str,
    *,
    find: Callable[[], T | None],
    claim: Callable[[], None],
    make: Callable[[], T],
    say: Say = lambda text: None,
) -> T:
    """What is to be in a folder, made by one of the processes that share it where it is not there.

    Args:
        folder: of one name on all hosts.
        what: is made, in words.
        find: what is there, whole; None where it is not. Called by every process.
        claim: makes the folder where it is not there. Called by every process unless all have found it.
        make: makes it, or takes what another has made meanwhile.
        say: is told whom this process waits for.
    """
    found = find()
    if share(f"{what}: looking for it", found is not None, all):
        assert found is not None
        return found
    claim()
    if num_processes() == 1:
        return make()
    first, number = first_with(folder), next(_numbers)
    made = Table(f"made/{number}")
    if first != process_number() and found is None:
        begin = said = time.monotonic()
        while made.get(first, seconds=1.0) is None:
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                say(f"{what}: waiting for process {first}, which does it ({said - begin:.0f} s)")
        until = time.monotonic() + SEEN_SECONDS
        while (found := find()) is None and time.monotonic() < until:
            time.sleep(0.5)
    if found is None:
        found = make()
    made.put(process_number(), "")
    return found


_numbers = itertools.count()
