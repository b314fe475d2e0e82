"""An export in a bucket: put together on this disk, sent, and whole when its seal is there.

    NAME/seal.json                  as of any export; written last
    .NAME.jaxsft-partial/           the next one, while it is sent
    .NAME.jaxsft-lock               who writes one

In: the folder in the bucket. Out: the same folder as on a disk. There is no rename: what was sent is copied into place
within the bucket, the seal last. Until it was all sent, what was there before stays; then what is known to be ours of
it is removed, and what is not is set aside.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator

from etils import epath

from jaxsft.disk.buckets import BucketError, BucketPath
from jaxsft.disk.locks import Lock
from jaxsft.disk.seal import SEAL, finish_removing, read_seal, remove_sealed, seal
from jaxsft.disk.writing import set_aside, write_error

UNFINISHED_MARK, MARK_TEXT = "unfinished-export", b"An export that jaxsft has not finished.\n"
"""A file in a folder of ours that is being written, and may be removed; and what it says."""


@contextlib.contextmanager
def sent(folder: BucketPath, say: Callable[[str], None], *, writes: bool) -> Iterator[pathlib.Path]:
    """A folder on this disk to write to, which is sealed and sent to `folder` if nothing fails.

    Args:
        folder: in the bucket.
        say: is told where files went that are not known to be ours.
        writes: whether this process is the one that writes; the others get an empty folder.

    Raises:
        WriteError: this disk has no room for it.
        OSError: it could not be sent; what was there before is untouched, or the checkpoint has it.
        ConfigError: another process writes there.
    """
    lock = Lock(folder.with_name(f".{folder.name}.jaxsft-lock")) if writes else None
    with tempfile.TemporaryDirectory(prefix="jaxsft-export-") as made, contextlib.ExitStack() as held:
        if lock is not None:
            lock.acquire(say)
            held.callback(lock.release)
        aside = pathlib.Path(made)
        try:
            yield aside
            if writes:
                seal(epath.Path(aside))
        except BucketError:
            raise
        except OSError as error:
            raise write_error(aside, error.strerror or str(error)) from error
        if lock is not None:
            lock.check()
            _send(aside, folder, say)


def is_unfinished(folder: BucketPath) -> bool:
    """Whether an export was being copied there when its process ended."""
    mark = folder / UNFINISHED_MARK
    return mark.is_file() and mark.read_bytes() == MARK_TEXT


def _send(made: pathlib.Path, folder: BucketPath, say: Callable[[str], None]) -> None:
    names = [str(path.relative_to(made)) for path in sorted(made.rglob("*")) if path.is_file() and path.name != SEAL]
    partial = folder.with_name(f".{folder.name}.jaxsft-partial")
    if is_unfinished(folder):  # a copy that was cut off, of what was sent then
        with contextlib.suppress(FileNotFoundError, ValueError):
            for name in read_seal(partial / SEAL):
                (folder / name).unlink(missing_ok=True)
        (folder / UNFINISHED_MARK).unlink()
    partial.rmtree()
    for name in (*names, SEAL):
        (partial / name).upload(made / name)
    finish_removing(folder, to_the_byte=True)  # one that was cut off
    if (folder / SEAL).exists():
        remove_sealed(folder, to_the_byte=True)
    if folder.exists():
        shown = ", ".join(each.name for each in list(folder.iterdir())[:5])
        beside = set_aside(folder)
        say(f"{folder} held files that this program did not write, or that were changed: now in {beside} ({shown})")
    (folder / UNFINISHED_MARK).write_bytes(MARK_TEXT)
    for name in names:
        (partial / name).copy_to(folder / name)
    (partial / SEAL).copy_to(folder / SEAL)
    (folder / UNFINISHED_MARK).unlink()
    partial.rmtree()
