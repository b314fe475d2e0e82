"""Copies of weights from one layout and dtype to another, at the speed of the memory.

In: two arrays. Out: the one holds the numbers of the other, cast and in its own order.

numpy alone walks through the memory with large steps where one of two arrays is transposed, and its loops for bfloat16
hold up all other threads.
"""

import functools
import math

import jax
import ml_dtypes
import numpy as np

TURNED_BYTES = 1 << 21
"""Transposed at once, so that what is transposed is still in the cache when it is cast."""


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
    step = max(1, TURNED_BYTES // (source.shape[0] * source.itemsize))
    for column in range(0, source.shape[1], step):
        columns = slice(column, column + step)
        cast(out[:, columns].T, _turned(source[:, columns]))


def _turned(rows: np.ndarray) -> np.ndarray:
    """[C, R] of [R, C], whose own rows lie together."""
    cpu = _cpu()
    if cpu is None:
        return np.ascontiguousarray(as_bits(rows).T).view(rows.dtype)
    # XLA's copy from the host transposes several times as fast as numpy does.
    return np.asarray(jax.device_put(as_bits(rows).T, cpu)).view(rows.dtype)


@functools.cache
def _cpu() -> jax.Device | None:
    """None where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def cast(out: np.ndarray, source: np.ndarray) -> None:
    """`out[...] = source`, by operations that numpy has fast loops for and that let other threads run."""
    if out.dtype == source.dtype:
        as_bits(out)[...] = as_bits(source)
    elif (source.dtype, out.dtype) == (ml_dtypes.bfloat16, np.float32):
        # A bfloat16 is the upper half of a float32.
        np.left_shift(as_bits(source), np.uint32(16), out=as_bits(out))
    else:
        out[...] = source


INFINITE = {
    np.dtype(np.float32): 0x7F800000,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
}
"""The bits of infinity: without the sign, those of every number are below them, and those of NaN above."""


def is_finite(values: np.ndarray) -> bool:
    """Whether all of the values are numbers. numpy's own test is slow for bfloat16, and holds up other threads."""
    infinite = INFINITE[values.dtype]
    sign = as_bits(values).dtype.type(~(1 << 8 * values.dtype.itemsize - 1) & (1 << 8 * values.dtype.itemsize) - 1)
    return not values.size or int((as_bits(values) & sign).max()) < infinite


def as_bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return values.view(f"u{values.dtype.itemsize}")
