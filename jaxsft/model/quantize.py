"""Weights of four or eight bits: NF4 with double quantisation (QLoRA), and int8 by output channel.

In: a weight [..., O, I] in the order of Hugging Face's linear maps, outputs before inputs. Out: a record of small
arrays with the same leading dims, and from such a record the weight again, to within what the bits can tell.

NF4 (Dettmers et al. 2023, "QLoRA", section 3 and appendix E): 64 neighbours along the inputs share a float32 `absmax`,
and each is the nearest of 16 values times it. The absmax themselves are stored in eight bits: 256 neighbours in the
order of the file share a scale, after the mean of the whole matrix was taken off. Codes and absmax are those of
bitsandbytes to the bit, for each matrix by itself. (On CPU, bitsandbytes 0.50.2 looks up the codes of absmax on a grid
of 65,536 steps, and so finds a neighbour of the nearest value for about one in 500; on GPUs it does not.)

int8 (Dettmers et al. 2022, "LLM.int8()", equation 5, without outliers): a row of inputs shares an absmax, and each
number is a whole multiple of a 127th of it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["nf4", "int8"]

BLOCK = 64
"""Inputs that share an absmax; weights whose number of inputs is no multiple of it are not quantised to NF4."""
SCALE_BLOCK = 256
"""Absmax that share a scale."""

NF4_VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""Code -> value: quantiles of the normal distribution, scaled to [-1, 1], with 0 among them (QLoRA, appendix E)."""


def _dynamic_values() -> np.ndarray:
    """float32 [256], ascending: signed numbers of a variable exponent (Dettmers 2016, "8-Bit Approximations").

    For each of the seven decades 1e-6 ... 1, twice as many numbers as in the one before: the middles of equal steps
    from a tenth to the whole of it; and 0 and 1. The edges are those of PyTorch's linspace to the bit: whole multiples
    of a float32 step, counted from the nearer end and rounded once.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count, first = 2**exponent, np.float32(0.1)
        step, at = np.float64((np.float32(1) - first) / np.float32(count)), np.arange(count + 1)
        edges = np.where(at < (count + 1) // 2, first + step * at, 1 - step * (count - at)).astype(np.float32)
        middles = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


DYNAMIC_VALUES = _dynamic_values()
"""Code -> value of an absmax, in units of its scale."""

SMALLEST = np.finfo(np.float32).tiny
"""Absmax below it, those of zeros among them, count as this one where numbers are divided by them."""


class NF4(NamedTuple):
    """A weight [..., O, I] in 4.13 bits a number."""

    codes: jax.Array
    """uint8 [..., O, I / 2]: two codes, the first of them in the upper half."""
    absmax: jax.Array
    """uint8 [..., O, I / 64]: codes of the blocks' absmax."""
    scales: jax.Array
    """float32 [..., O * I / 64 / 256, rounded up]: of each 256 absmax in the order of the file."""
    offset: jax.Array
    """float32 [...]: the mean of the absmax."""


class Int8(NamedTuple):
    """A weight [..., O, I] in eight bits a number."""

    codes: jax.Array
    """int8 [..., O, I]"""
    absmax: jax.Array
    """float32 [..., O]"""


Quantized = NF4 | Int8

RECORDS: dict[Kind, type[NF4] | type[Int8]] = {"nf4": NF4, "int8": Int8}
"""What each kind of quantisation makes of a weight."""


class Place(NamedTuple):
    """Where codes that are a part of a matrix lie in it; its scales and offset are those of all of it."""

    num_outputs: int
    """Of the matrix."""
    first_row: jax.Array | int = 0
    first_byte: jax.Array | int = 0
    """In a row; its absmax are all there."""


def quantize(weight: jax.Array, kind: Kind) -> Quantized:
    """A weight [..., O, I] of any float dtype; each matrix by itself.

    For example, of nf4: in a row of 64 inputs that are 4.0, -2.0, 0.0, ... with an absmax of 4.0, the first byte is
    0xF2: 1.0 is value 15, and -0.5 is nearest to value 2, -0.525.
    """
    one: Callable[[jax.Array], Any] = {"nf4": _quantize_nf4, "int8": _quantize_int8}[kind]
    for _ in weight.shape[:-2]:
        one = jax.vmap(one)
    return one(weight.astype(jnp.float32))


def dequantize(quantized: Quantized, dtype: jnp.dtype, *, place: Place | None = None) -> jax.Array:
    """The weight [..., O, I], computed in float32 and rounded once; or some of its rows, or columns, in their place."""
    if isinstance(quantized, NF4):
        return _dequantize_nf4(quantized, dtype, place)
    return _dequantize_int8(quantized).astype(dtype)


def is_quantizable(num_inputs: int, kind: Kind) -> bool:
    """Whether rows of so many inputs are made of whole blocks."""
    return kind != "nf4" or num_inputs % BLOCK == 0


# NF4.


def _quantize_nf4(weight: jax.Array) -> NF4:
    """Of one matrix [O, I]."""
    num_outputs, num_inputs = weight.shape
    blocks = weight.reshape(num_outputs, num_inputs // BLOCK, BLOCK)
    absmax = jnp.abs(blocks).max(axis=-1)
    scaled = jnp.clip(blocks * (1.0 / jnp.maximum(absmax, SMALLEST))[..., None], -1.0, 1.0)
    codes = sum((scaled > middle).astype(jnp.uint8) for middle in _middles(NF4_VALUES))
    codes = codes.reshape(num_outputs, num_inputs // 2, 2)
    return NF4(codes[..., 0] << 4 | codes[..., 1], *_quantize_absmax(absmax))


def _quantize_absmax(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes uint8 like absmax [O, I / 64], scales, and the offset."""
    flat = absmax.reshape(-1)
    offset = _mean(flat)
    centred = jnp.pad(flat - offset, (0, -flat.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scales = jnp.abs(centred).max(axis=-1)
    scaled = jnp.clip(centred * (1.0 / jnp.maximum(scales, SMALLEST))[:, None], -1.0, 1.0)
    codes = jnp.searchsorted(jnp.asarray(_middles(DYNAMIC_VALUES)), scaled).astype(jnp.uint8)
    return codes.reshape(-1)[: flat.size].reshape(absmax.shape), scales, offset


def _middles(values: np.ndarray) -> np.ndarray:
    """Of values in ascending order: up to each, and with it, numbers are those of the lower one."""
    return (values[:-1] + values[1:]) / np.float32(2)


def _mean(numbers: jax.Array) -> jax.Array:
    """Of float32 [n], as halves that are added to each other: the same to the bit however the compiler and a mesh cut
    the work, which sums of JAX's do not promise."""
    total = jnp.pad(numbers, (0, 2 ** (numbers.size - 1).bit_length() - numbers.size))
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    return total[0] / numbers.size


def _dequantize_nf4(packed: NF4, dtype: jnp.dtype, place: Place | None) -> jax.Array:
    *leading, num_rows, num_bytes = packed.codes.shape
    # A factor for each byte, as a mesh may cut a row of bytes in the middle of a block.
    factors = jnp.repeat(dequantize_absmax(packed, place), BLOCK // 2, axis=-1)
    if place is not None and factors.shape[-1] != num_bytes:
        factors = jax.lax.dynamic_slice_in_dim(factors, place.first_byte, num_bytes, axis=-1)
    halves = packed.codes >> 4, packed.codes & 15
    pairs = jnp.stack([(_nf4_value(codes) * factors).astype(dtype) for codes in halves], axis=-1)
    return pairs.reshape(*leading, num_rows, num_bytes * 2)


def dequantize_absmax(packed: NF4, place: Place | None = None) -> jax.Array:
    """float32 [..., O, I / 64], or some of its rows in their place."""
    *leading, num_rows, num_blocks = packed.absmax.shape
    num_outputs = num_rows if place is None else place.num_outputs
    scales = jnp.repeat(packed.scales, SCALE_BLOCK, axis=-1)[..., : num_outputs * num_blocks]
    scales = scales.reshape(*leading, num_outputs, num_blocks)
    if place is not None and num_rows != num_outputs:
        scales = jax.lax.dynamic_slice_in_dim(scales, place.first_row, num_rows, axis=-2)
    return jnp.asarray(DYNAMIC_VALUES)[packed.absmax] * scales + packed.offset[..., None, None]


def _nf4_value(codes: jax.Array) -> jax.Array:
    """float32, of codes 0 to 15: by their bits, as tables are slow to look up on TPUs and CPUs."""
    values: list[jax.Array | np.float32] = list(NF4_VALUES)
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    (value,) = values
    return value  # type: ignore[return-value]


# int8.

INT8_MOST = 127


def _quantize_int8(weight: jax.Array) -> Int8:
    """Of one matrix [O, I]."""
    absmax = jnp.abs(weight).max(axis=-1)
    factors = 1.0 / jnp.maximum(absmax, SMALLEST) * INT8_MOST
    return Int8(jnp.round(weight * factors[:, None]).astype(jnp.int8), absmax)


def _dequantize_int8(packed: Int8) -> jax.Array:
    return packed.codes.astype(jnp.float32) * packed.absmax[..., None] * np.float32(1 / INT8_MOST)
