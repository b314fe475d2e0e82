"""Copies of weights from one layout and dtype to another, at the speed of the memory.

numpy alone walks through the memory with large steps where one of two arrays is transposed, and its loops for bfloat16
hold up all other threads.
"""

import itertools
import math
import threading

import ml_dtypes
import numpy as np

TILE_ROWS, TILE_COLUMNS, TILE_PAD = 128, 1024, 16
"""Transposed at once. The padding keeps the elements of a column from all falling into one set of the cache."""

_scratch = threading.local()


def copy(out: np.ndarray, source: np.ndarray, num_rows: int) -> None:
    """`out[...] = source`, cast, where one of the two may have the order of its rows and columns in memory swapped.

    Args:
        out: any view.
        source: of the same shape, any view.
        num_rows: so many of the dims are seen as rows, the others as columns.
    """
    shape = (math.prod(out.shape[:num_rows]), math.prod(out.shape[num_rows:]))
    flat_out, flat_source = _flat(out, shape), _flat(source, shape)
    if flat_out is None or flat_source is None or 1 in shape:
        cast(out, source)
    elif flat_out.strides[0] < flat_out.strides[1] and flat_source.strides[0] >= flat_source.strides[1]:
        _transpose(flat_out, flat_source)
    elif flat_out.strides[0] >= flat_out.strides[1] and flat_source.strides[0] < flat_source.strides[1]:
        _transpose(flat_out.T, flat_source.T)
    else:
        cast(flat_out, flat_source)


def _flat(view: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """A view of another shape; None where there is none without a copy."""
    flat = view.reshape(shape)
    return flat if np.may_share_memory(flat, view) else None


def _transpose(out: np.ndarray, source: np.ndarray) -> None:
    """Both [R, C]; rows of `source` lie together, and columns of `out`."""
    tile = getattr(_scratch, "tile", None)
    if tile is None or tile.dtype != out.dtype:
        tile = _scratch.tile = np.empty((TILE_ROWS, TILE_COLUMNS + TILE_PAD), out.dtype)
    for row, column in itertools.product(range(0, source.shape[0], TILE_ROWS), range(0, source.shape[1], TILE_COLUMNS)):
        part = (slice(row, row + TILE_ROWS), slice(column, column + TILE_COLUMNS))
        piece = source[part]
        held = tile[: piece.shape[0], : piece.shape[1]]
        cast(held, piece)
        as_bits(out[part])[...] = as_bits(held)


def cast(out: np.ndarray, source: np.ndarray) -> None:
    """`out[...] = source`, by operations that numpy has fast loops for and that let other threads run."""
    if out.dtype == source.dtype:
        as_bits(out)[...] = as_bits(source)
    elif (source.dtype, out.dtype) == (ml_dtypes.bfloat16, np.float32):
        # A bfloat16 is the upper half of a float32.
        bits = as_bits(out)
        bits[...] = as_bits(source)
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = source


def as_bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return values.view(f"u{values.dtype.itemsize}")
