"""One tensor of a file from the weights that lie in it, wherever the mesh has them.

In: weights as they lie on the devices. Out: the tensor in host memory, in its dtype and in the shape of its factors.
Devices bring the dims in the order of the file and cast, where they can do it exactly as the host does.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxsft.config import ConfigError
from jaxsft.folders.weights.copying import copy
from jaxsft.folders.weights.layout import Box, Weight, is_quantized
from jaxsft.folders.weights.stored import StoredTensor, read_whole
from jaxsft.model.quantized import unpacked_layer

GATHER_BYTES = 1 << 24


class Part(NamedTuple):
    """One weight of ours, or one index of its split dims, as a part of a tensor."""

    weight: Weight
    variable: nnx.Variable
    at: tuple[int, ...]
    original: StoredTensor | None = None
    """Of a quantised weight, the tensor that it was read from: what was quantised is written as it was."""


def put_together(parts: Sequence[Part], dtype: np.dtype, *, keeps: bool) -> np.ndarray | None:
    """A tensor in the shape of its factors, from the weights that lie in it; None on processes that do not keep it.

    Raises:
        OSError, ConfigError: it could not be read or cast; when all of it was gathered, since others gather it too.
    """
    factors = parts[0].weight.factors
    num_rows = len(factors) - len(parts[0].weight.dims[-1])
    shape = [factor.size for factor in factors]
    whole: np.ndarray | None = None
    failed: OSError | ConfigError | None = None
    for part in parts:
        weight = part.weight
        assert [factor.size for factor in weight.factors] == shape, weight.path
        if part.original is not None:
            if keeps and failed is None:
                whole = np.empty(shape, dtype) if whole is None else whole
                all_of_ours = weight.in_file(tuple((0, size) for size in weight.shape[weight.split :]))
                region = tuple(slice(*bounds) for bounds in all_of_ours)
                try:
                    copy(whole[region], _read(part)[region], num_rows)
                except (OSError, ConfigError) as error:
                    failed = error
            continue
        for box, values in _gather(part, dtype):
            if not keeps or failed is not None:
                continue
            if values.dtype == dtype and values.size == math.prod(shape):
                whole = values.reshape(shape)  # All there is of it, as it must be.
                continue  # Others may still gather rows of the vocabulary that are not written.
            whole = np.empty(shape, dtype) if whole is None else whole
            place = whole[tuple(slice(*bounds) for bounds in weight.in_file(box))]
            source = values[tuple(None if factor.letter is None else slice(None) for factor in weight.factors)]
            copy(place, source, num_rows)
            try:
                refuse_overflow(place, source, weight.path)
            except ConfigError as error:
                failed = error
    if failed is not None:
        raise failed
    return whole


def _read(part: Part) -> np.ndarray:
    """The tensor of a file, in the shape of its factors."""
    assert part.original is not None
    return read_whole(part.original).reshape([factor.size for factor in part.weight.factors])


def _gather(part: Part, dtype: np.dtype) -> Iterator[tuple[Box, np.ndarray]]:
    """A part of a tensor, as boxes of our dims that together are all of it, on every process.

    The values of a box have their dims in the order of the file, and `dtype` where the devices can cast them exactly as
    the host does. No device ever holds more than its shard and twice GATHER_BYTES (of one process: twice a layer of its
    shard): of the first dim that may be cut over devices, each of them gives as many of its indices at a time, and
    those of other processes travel.
    """
    weight, value = part.weight, part.variable.get_value()
    layer, expert = part.at[:1], part.at[1:]
    if is_quantized(part.variable):  # of random weights, which are in no file
        value, layer = unpacked_layer(part.variable.get_metadata("quantized"), layer[0]), (0,)
    assert len(expert) <= 1 and (not layer or weight.axes[0] == "l"), weight.path
    shape = weight.shape[weight.split :]
    order = tuple(int(dim) for dim in np.argsort(weight.to_ours))
    into = dtype if (value.dtype, dtype) in CAST_ON_DEVICES else value.dtype
    local = value.sharding.shard_shape(value.shape)[len(layer)]
    parts = value.shape[len(layer)] // local
    step = local
    if not value.is_fully_addressable:
        step = max(1, GATHER_BYTES // (parts * math.prod(value.shape[len(layer) + 1 :]) * value.dtype.itemsize))
    # An expert is one index within one shard.
    starts = [expert[0] % local] if expert else range(0, local, step)
    for start in starts:
        size = 1 if expert else min(step, local - start)
        chunk = _pick(value, layer, start, parts=parts, size=size, of_one=bool(expert), order=order, into=into.name)
        for bounds, piece in _pieces(chunk).items():
            for number in range(*bounds[0]):
                if expert and number != expert[0] // local:
                    continue
                at = number * local + start
                ours = [bounds[1 + order.index(dim)] for dim in range(len(order))]
                if not expert:
                    ours[0] = (at, at + size)
                # The state may have more rows of the vocabulary than are written.
                box = tuple((first, min(last, most)) for (first, last), most in zip(ours, shape, strict=True))
                if all(first < last for first, last in box):
                    values = np.asarray(piece).view(into)[number - bounds[0][0]]
                    yield box, values[tuple(slice(0, box[dim][1] - box[dim][0]) for dim in order)]


CAST_ON_DEVICES = {
    (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)),
    (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)),
}
"""By whole numbers: compiled for CPU, a cast of XLA would take numbers below the normal ones for zeros."""


@functools.partial(jax.jit, static_argnames=("parts", "size", "of_one", "order", "into"))
def _pick(
    value: jax.Array,
    layer: tuple[int, ...],
    start: int,
    *,
    parts: int,
    size: int,
    of_one: bool,
    order: tuple[int, ...],
    into: str,
) -> jax.Array:
    """[parts, ...]: of each of the parts that the first dim (of a layer) is cut into, some indices, or one alone.

    The dims behind the first are in `order`. Works on the bits of the numbers, since adding zeros to numbers, as a
    gather may do, can change their bits.
    """
    bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")
    for at in layer:
        bits = jax.lax.dynamic_index_in_dim(bits, at, keepdims=False)
    chunk = jax.lax.dynamic_slice_in_dim(bits.reshape(parts, -1, *bits.shape[1:]), start, size, axis=1)
    chunk = chunk[:, 0] if of_one else chunk
    return cast_bits(chunk, value.dtype, np.dtype(into)).transpose(0, *(1 + dim for dim in order))


def cast_bits(bits: jax.Array, dtype: np.dtype, into: np.dtype) -> jax.Array:
    """The bits of numbers of `dtype` as those of the nearest numbers of `into`, for the pairs of `CAST_ON_DEVICES`."""
    if dtype == into:
        return bits
    if dtype.itemsize == 2:
        return bits.astype(np.uint32) << 16  # A bfloat16 is the upper half of a float32.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # Of two that are as near, the even one.
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return jnp.where(is_nan, ((bits >> 16) & 0x8000) | 0x7FC0, nearest).astype(np.uint16)


def _pieces(chunk: jax.Array) -> dict[Box, Any]:
    """The shards of an array, each once; where other processes hold some of them, all of it."""
    if not chunk.is_fully_addressable:
        return {tuple((0, size) for size in chunk.shape): multihost_utils.process_allgather(chunk, tiled=True)}
    indices = [
        tuple(each.indices(size)[:2] for each, size in zip(shard.index, chunk.shape, strict=True))
        for shard in chunk.addressable_shards
    ]
    return {bounds: shard.data for bounds, shard in zip(indices, chunk.addressable_shards, strict=True)}


def refuse_overflow(written: np.ndarray, values: np.ndarray, path: str) -> None:
    """Raises a ConfigError where a number became infinite as it was cast to float16."""
    if written.dtype == np.float16 and np.any(np.isinf(written) & np.isfinite(values)):
        raise ConfigError(
            f"{path}: has numbers that float16 cannot hold (65504 at most); export as bfloat16 or float32 "
            "(model.export_dtype)"
        )
