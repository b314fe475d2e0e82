"""The arrays of a checkpoint in a bucket: an object for each part of an array that a device holds.

    state/ocdbt.process_0/NUMBER.0-64_128-256    rows 0 to 63, columns 128 to 255 of the array of that number; its bytes

In: arrays by name, on any mesh; their numbers are those of the sorted names. Out: the same, on any mesh. Each process
writes what its devices hold, of copies the first, and reads what its devices need, by ranges of bytes. Nothing is
renamed. What the arrays are called, and which there are, is in `meta.json`; whether the bytes are as they were written
is for the seal to say.
"""

import concurrent.futures
import math
from typing import Any

import jax
import numpy as np

from jaxsft.disk.buckets import BucketPath
from jaxsft.training.arrays import part_of

Box = tuple[tuple[int, int], ...]
"""First and last (not included) index of each dim."""

THREADS = 16
"""Requests under way at once."""


class BucketArrays:
    """Writes arrays in the background, those of one folder at a time, and reads them; as `ArrayFolders`."""

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="bucket")
        self._writing: list[concurrent.futures.Future[None]] = []

    def save(self, folder: BucketPath, leaves: dict[str, jax.Array]) -> None:
        """Begins to write; returns when the arrays are copied and may be donated."""
        own = folder / part_of(jax.process_index())
        copies = {
            own / f"{number}.{_text(_box(shard.index, leaves[name].shape))}": np.array(shard.data)
            for number, name in enumerate(sorted(leaves))
            for shard in leaves[name].addressable_shards
            if shard.replica_id == 0
        }
        self._writing = [self._threads.submit(_write, path, values) for path, values in copies.items()]

    def wait(self) -> None:
        """Returns when this process has written all that its devices hold.

        Raises:
            OSError: something could not be written.
        """
        writing, self._writing = self._writing, []
        for each in writing:
            each.result()

    def restore(self, folder: BucketPath, abstract: dict[str, Any]) -> dict[str, jax.Array]:
        """The arrays that have the shapes, dtypes and shardings of `abstract`.

        Raises:
            OSError: something could not be read.
            ValueError: a part of an array is not there, or of another size.
        """
        stored: dict[int, dict[Box, BucketPath]] = {}
        for path in folder.files():
            number, mark, box = path.name.partition(".")
            if mark and number.isdecimal():  # others may stand beside what was sealed
                stored.setdefault(int(number), {})[_parsed(box)] = path
        reads: dict[str, dict[Box, concurrent.futures.Future[np.ndarray]]] = {}
        for number, name in enumerate(sorted(abstract)):
            leaf = abstract[name]
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            boxes = {_box(index, leaf.shape) for index in indices}
            parts = stored.get(number, {})
            reads[name] = {box: self._threads.submit(_read, parts, box, np.dtype(leaf.dtype)) for box in boxes}
        return {name: _on_devices(abstract[name], reads.pop(name)) for name in abstract}

    def close(self) -> None:
        self._threads.shutdown()


def _on_devices(leaf: Any, reads: dict[Box, "concurrent.futures.Future[np.ndarray]"]) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return reads[_box(index, leaf.shape)].result()

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part, dtype=leaf.dtype)


def _write(path: BucketPath, values: np.ndarray) -> None:
    path.write_bytes(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _read(parts: dict[Box, BucketPath], box: Box, dtype: np.dtype) -> np.ndarray:
    """The values in a box, from the parts that overlap with it; of each, the rows of the first dim that are needed."""
    out = np.empty([last - first for first, last in box], dtype)
    filled = 0
    for stored, path in parts.items():
        both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, stored, strict=True))
        if any(first >= last for first, last in both):
            continue
        row = math.prod(last - first for first, last in stored[1:]) * dtype.itemsize
        start, stop = (both[0][0] - stored[0][0], both[0][1] - stored[0][0]) if both else (0, 1)
        data = path.read_range(start * row, (stop - start) * row)
        if len(data) != (stop - start) * row:
            raise ValueError(f"{path}: {len(data):,} bytes from {start * row:,} on, expected {(stop - start) * row:,}")
        rest = [last - first for first, last in stored[1:]]
        values = np.frombuffer(data, dtype).reshape([stop - start, *rest] if both else [])
        inside = tuple(slice(a - c, b - c) for (a, b), (c, _) in list(zip(both, stored, strict=True))[1:])
        place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, box, strict=True))
        out[place] = values[(slice(None), *inside)] if both else values
        filled += math.prod(last - first for first, last in both)
    if filled != out.size:
        raise ValueError(f"of an array, {filled:,} numbers of {out.size:,} are there at {_text(box)}")
    return out


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def _text(box: Box) -> str:
    """Worked example: ((0, 64), (128, 256)) is "0-64_128-256"; that of a single number is ""."""
    return "_".join(f"{first}-{last}" for first, last in box)


def _parsed(text: str) -> Box:
    bounds = [each.partition("-") for each in text.split("_")] if text else []
    return tuple((int(first), int(last)) for first, _, last in bounds)
