"""An export in a bucket: put together on disks, sent, and whole when its seal is there.

    NAME/seal.json                  as of any export; written last
    .NAME.jaxsft-partial/           the next one, while it is sent, and `unfinished-export`, the mark that it is ours
    .NAME.jaxsft-lock               who writes one

In: the folder in the bucket, and files on the disk of each process. Out: the same folder as on a disk. There is no
rename: what was sent is copied into place within the bucket, the seal last. Until it was all sent, what was there
before stays; then what is known to be ours of it is removed, and what is not is set aside.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator

from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.locks import Lock
from jaxsft.disk.seal import SEAL, finish_removing, read_seal, remove_sealed
from jaxsft.disk.writing import set_aside

UNFINISHED_MARK, MARK_TEXT = "unfinished-export", b"An export that jaxsft has not finished.\n"
"""A file in a folder of ours that is being written, and may be removed; and what it says."""


@contextlib.contextmanager
def begun(folder: BucketPath, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other exports to `folder` out, and makes room for what will be sent; on the process that does both.

    Args:
        folder: in the bucket.
        say: is told of a lock that is taken over.

    Raises:
        ConfigError: another one writes there.
        OSError: the bucket cannot be written to; what was there before is untouched.
    """
    lock = Lock(folder.with_name(f".{folder.name}.jaxsft-lock"))
    lock.acquire(say)
    try:
        _finish_copy(folder)
        _make_room(partial_of(folder))
        yield
    finally:
        lock.release()


def partial_of(folder: BucketPath) -> BucketPath:
    """Where an export is sent to."""
    return folder.with_name(f".{folder.name}.jaxsft-partial")


def send(made: pathlib.Path, partial: BucketPath, names: Iterable[str]) -> None:
    """Sends files of this process.

    Raises:
        OSError: one could not be sent.
    """
    for name in names:
        (partial / name).upload(made / name)


def is_unfinished(folder: BucketPath) -> bool:
    """Whether an export was being sent or copied there when its process ended."""
    mark = folder / UNFINISHED_MARK
    return mark.is_file() and mark.read_bytes() == MARK_TEXT


def _make_room(partial: BucketPath) -> None:
    """Leaves nothing where an export is sent to but the mark that it is ours.

    Raises:
        OSError: something is there without the mark.
    """
    if partial.files() and not is_unfinished(partial):
        raise OSError(f"{partial}: is in the way and no unfinished export of jaxsft; move it away")
    _remove(partial)
    (partial / UNFINISHED_MARK).write_bytes(MARK_TEXT)


def _remove(partial: BucketPath) -> None:
    """The mark goes last, so that what is left when this is cut off is known as ours."""
    for each in partial.files():
        if each != partial / UNFINISHED_MARK:
            each.unlink(missing_ok=True)
    (partial / UNFINISHED_MARK).unlink(missing_ok=True)


def _finish_copy(folder: BucketPath) -> None:
    """Removes what a copy that was cut off has put in place, of what was sent then, unless all of it is there."""
    if is_unfinished(folder):
        if (folder / SEAL).exists():  # which is copied last
            (folder / UNFINISHED_MARK).unlink()
            return
        with contextlib.suppress(FileNotFoundError, ValueError):
            for name in read_seal(partial_of(folder) / SEAL):
                (folder / name).unlink(missing_ok=True)
        (folder / UNFINISHED_MARK).unlink()


def put_in_place(folder: BucketPath, say: Callable[[str], None]) -> None:
    """Copies what was sent and sealed into its place, the seal last; what was there before goes first.

    Raises:
        OSError: it could not be done; the checkpoint has the model.
    """
    partial = partial_of(folder)
    finish_removing(folder, to_the_byte=True)  # one that was cut off
    if (folder / SEAL).exists():
        remove_sealed(folder, to_the_byte=True)
    if folder.files():  # An object may stand for the folder itself.
        shown = ", ".join(each.name for each in list(folder.iterdir())[:5])
        beside = set_aside(folder)
        say(f"{folder} held files that this program did not write, or that were changed: now in {beside} ({shown})")
    (folder / UNFINISHED_MARK).write_bytes(MARK_TEXT)
    for name in read_seal(partial / SEAL):
        (partial / name).copy_to(folder / name)
    (partial / SEAL).copy_to(folder / SEAL)
    (folder / UNFINISHED_MARK).unlink()
    _remove(partial)
