"""The arrays of a state in a folder: the one module that knows Orbax.

In: arrays by name, on any mesh. Out: a folder in which each process has written what its devices hold, and from which
each reads, on any other mesh, what its devices need. Orbax itself notices neither flipped bytes nor an empty folder.
"""

import functools
import logging
import re
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

FILE_BYTES = 2**26
"""About the size of a file, and the most that is read for any part of an array: small enough to be shared out among
processes, large enough for a bucket."""


class ArrayFolders:
    """Writes arrays in the background, one folder at a time, and reads them."""

    def __init__(self) -> None:
        # Compressed, trained weights are 8% smaller, and take three times as long to write.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        # What stands in the way is known here before; looking again would be too early on processes other than 0.
        self._orbax = ocp.AsyncCheckpointer(
            handler, file_options=ocp.options.FileOptions(skip_sync_file_validations=True)
        )
        _quieten()

    def save(self, folder: epath.Path, leaves: dict[str, jax.Array]) -> None:
        """Begins to write; returns when the arrays are copied and may be donated. No process waits for another.

        Raises:
            OSError, ValueError: it could not be begun.
        """
        self._orbax.save(folder, args=ocp.args.PyTreeSave(leaves, ocdbt_target_data_file_size=FILE_BYTES))

    def wait(self) -> None:
        """Returns when all processes have written all.

        Raises:
            Exception: whatever went wrong; `reason` says what of it is worth telling.
        """
        self._orbax.wait_until_finished()

    def restore(self, folder: epath.Path, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays that have the shapes, dtypes and shardings of `abstract`; folders of earlier versions as well.

        Raises:
            Exception: whatever Orbax makes of it.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._orbax.restore(folder, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args))

    def close(self) -> None:
        self._orbax.close()


def part_of(process: int) -> str:
    """The folder within that of the arrays which only this process writes into."""
    return f"ocdbt.process_{process}"


def reason(said: str) -> str:
    """What the system said, out of the words of the library that Orbax writes with.

    That puts places before it and attributes behind it, of which the system's number is one:
    `Failed to write 9 bytes to file 7: File too large [tensorstore_spec='...'] [os_error_code='27']`.
    """
    said = " ".join(said.split())
    if "[os_error_code=" not in said:
        return said
    return re.split(r" \[\w+='", said, maxsplit=1)[0].rpartition(": ")[2].strip()


@functools.cache
def _quieten() -> None:
    """Where a write fails, Orbax logs tracebacks, and the library that it writes with others still after that.

    What they say is in the error that is raised; it is shown in one line.
    """
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    # Of several writes that fail, one is waited for; of the others Python says that nobody asked.
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and "[os_error_code=" in str(record.exc_info[1]))
    )
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
