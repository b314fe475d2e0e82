"""Prepared data in a bucket: what one host has prepared, others fetch; all read their own copy, which is mapped.

    CACHE/jaxsft-prepared/jaxsft.txt    the mark, as in a cache on a disk; see `cache.py`
    CACHE/jaxsft-prepared/KEY/...       the files of prepared data; seal.json is written last

In: the place in the bucket, and the folder of the same key on this disk. Out: a copy here that is whole to the byte, or
one there. Hosts that send the same at once write the same bytes. Nothing in the bucket is removed but the seal of what
is damaged there, so that it is sent again.
"""

import contextlib
import pathlib
from collections.abc import Callable

from jaxsft.batches import cache
from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.writing import place, writing


def remote(configured: str | None) -> BucketPath | None:
    """Where prepared data stand in a bucket, if `data.cache` is one.

    Raises:
        ConfigError: there is no such kind of bucket, or its package is not installed.
    """
    found = place(configured, "data.cache") if configured is not None else None
    return found / "jaxsft-prepared" if isinstance(found, BucketPath) else None


def fetch(there: BucketPath, folder: pathlib.Path, say: Callable[[str], None]) -> cache.Found | None:
    """Prepared data of a bucket, copied into the place for them on this disk; None where they are not there, or not
    whole.

    Raises:
        OSError: the bucket cannot be reached.
        ConfigError, WriteError: as for what is prepared here.
    """
    if not (there / cache.SEAL).exists():
        return None
    say(f"fetching {there}")
    cache.claim(folder.parent)
    cache.check_replaceable(folder, say)
    with cache.building(folder) as building:
        try:
            for name in cache.SEALED:
                (there / name).download(building / name)
            (there / cache.SEAL).download(building / cache.SEAL)
        except FileNotFoundError:
            say(f"{there}: prepared data that are not whole; they are prepared anew")
            _unseal(there)
            return None
        found = cache.load(building)
        if found is None:
            say(f"{there}: prepared data that are damaged; they are prepared anew")
            _unseal(there)
            return None
        cache.put_in_place(building, folder)
    return cache.load(folder) or found


def _unseal(there: BucketPath) -> None:
    with contextlib.suppress(OSError):  # A bucket that may only be read.
        if (there.parent / cache.MARK).exists():
            (there / cache.SEAL).unlink(missing_ok=True)


def send(folder: pathlib.Path, there: BucketPath, say: Callable[[str], None]) -> None:
    """Copies prepared data into the bucket, unless they are there; the seal last.

    Raises:
        ConfigError: something is in their place that has no mark of ours.
        WriteError: they could not be written.
    """
    place = there.parent
    with writing(there):
        sealed = (folder / cache.SEAL).read_bytes()
        if (there / cache.SEAL).exists() and (there / cache.SEAL).read_bytes() == sealed:
            return
        mark = place / cache.MARK
        if not mark.exists():
            if place.exists() and not mark.exists():  # Another host may have sent it just now.
                raise ConfigError(
                    f"{place}: exists and was not made by jaxsft, which would keep prepared data there; move it away, "
                    "or give another place as data.cache"
                )
            mark.write_bytes(cache.MARK_TEXT.encode())
        say(f"sending the prepared data to {there}")
        for name in cache.SEALED:
            (there / name).upload(folder / name)
        (there / cache.SEAL).write_bytes(sealed)
