"""AdamW whose two moments take a byte each: blocks of a weight share a scale, and a code has ever finer steps.

In: gradients with the axes of their parameters. Out: directions as AdamW's, and a state of codes (the parameter's
axes) and float32 scales (its axes, `c` in place of the letter that blocks go along). Blocks lie along one dim of one
layer's weight, so that none straddles layers, experts or heads; the dim is one that meshes cut seldom or in few parts.

The moments are decoded, moved by the gradient and used in float32, and then coded again, as in Dettmers et al., 2022
(arXiv 2110.02861). Of the second moment the root is what is coded: it is as large as the first moment's elements, so
that both codes reach as far down, and what is not 0 never becomes 0, by which would be divided.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.params import by_path, decayed, replaced, size_per_layer

LEAST_SIZE = 4096
"""Numbers of one layer from which on a weight has codes."""

LARGEST_BLOCK, LEAST_BLOCK = 128, 32


class Coded(NamedTuple):
    """A moment in bytes: `decode(codes) * scales`, the scale that of the block."""

    codes: nnx.Variable
    scales: nnx.Variable


class EightBitState(NamedTuple):
    """By the path of the parameter; a moment that has no codes is a float32 Variable."""

    count: jax.Array
    """int32 scalar: steps that were taken."""
    first: dict[str, Coded | nnx.Variable]
    second: dict[str, Coded | nnx.Variable]
    """As its root where it is coded."""


def adamw8bit(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW with moments in 8 bits, for weights of 4,096 numbers a layer or more; see `encode` for the error."""

    def init(params: Any) -> EightBitState:
        leaves = by_path(params)
        first = {path: _zeros(param, jnp.int8) for path, param in leaves.items()}
        second = {path: _zeros(param, jnp.uint8) for path, param in leaves.items()}
        return EightBitState(jnp.zeros((), jnp.int32), first, second)

    def update(gradients: Any, state: EightBitState, params: Any = None) -> tuple[Any, EightBitState]:
        count = state.count + 1
        corrections = [1 - beta ** count.astype(jnp.float32) for beta in (config.beta1, config.beta2)]
        directions, first, second = {}, {}, {}
        for path, variable in by_path(gradients).items():
            gradient = variable.get_value()
            m = config.beta1 * _decoded(state.first[path]) + (1 - config.beta1) * gradient
            old = _decoded(state.second[path])
            old = jnp.square(old) if isinstance(state.second[path], Coded) else old
            v = config.beta2 * old + (1 - config.beta2) * jnp.square(gradient)
            directions[path] = m / corrections[0] / (jnp.sqrt(v / corrections[1]) + config.epsilon)
            first[path] = _coded(m, state.first[path])
            second[path] = _coded(jnp.sqrt(v) if isinstance(state.second[path], Coded) else v, state.second[path])
        return replaced(gradients, lambda path, _: directions[path]), EightBitState(count, first, second)

    return optax.chain(optax.GradientTransformation(init, update), decayed(config))


def block_of(axes: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The dim that blocks go along, and their size; None for what has no codes.

    Heads' dims are uncut, MLP widths cut by `tensor` only, and along the width of the model lies a token's row: the
    first of these that the weight has, in blocks of its largest divisor up to 128. `"l d n h"` with heads of 64 has
    blocks of 64, `"l f d"` with an MLP of 1,536 blocks of 128.
    """
    letters = axes.split()
    if size_per_layer(axes, shape) < LEAST_SIZE or len(letters) < 2:
        return None
    for dim in (letters.index(letter) for letter in "hfd" if letter in letters):
        block = max(size for size in range(1, LARGEST_BLOCK + 1) if shape[dim] % size == 0)
        if block >= LEAST_BLOCK:
            return dim, block
    return None


def _zeros(param: Any, dtype: Any) -> Coded | nnx.Variable:
    axes, shape = param.get_metadata("axes"), param.shape
    found = block_of(axes, shape)
    if found is None:
        return param.replace(jnp.zeros(shape, jnp.float32))
    dim, block = found
    letters, sizes = axes.split(), list(shape)
    letters[dim], sizes[dim] = "c", shape[dim] // block
    scales = nnx.Param(jnp.zeros(sizes, jnp.float32), axes=" ".join(letters))
    return Coded(param.replace(jnp.zeros(shape, dtype)), scales)


def _decoded(moment: Coded | nnx.Variable) -> jax.Array:
    if not isinstance(moment, Coded):
        return moment.get_value()
    codes, scales = moment.codes.get_value(), moment.scales.get_value()
    num_segments = 8 if codes.dtype == jnp.uint8 else 7
    dim = moment.scales.get_metadata("axes").split().index("c")
    sign = jnp.sign(codes.astype(jnp.float32))
    values = sign * decode(jnp.abs(codes.astype(jnp.int32)), num_segments)
    return (_in_blocks(values, dim, scales.shape[dim]) * jnp.expand_dims(scales, dim + 1)).reshape(codes.shape)


def _coded(x: jax.Array, old: Coded | nnx.Variable) -> Coded | nnx.Variable:
    if not isinstance(old, Coded):
        return old.replace(x)
    dim, dtype = old.scales.get_metadata("axes").split().index("c"), old.codes.get_value().dtype
    blocks = _in_blocks(x, dim, old.scales.get_value().shape[dim])
    scales = jnp.abs(blocks).max(dim + 1, keepdims=True)
    shares = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)
    if dtype == jnp.uint8:
        codes = jnp.maximum(encode(shares, 8), (blocks > 0).astype(jnp.int32))
    else:
        codes = encode(shares, 7) * jnp.sign(blocks).astype(jnp.int32)
    return Coded(old.codes.replace(codes.astype(dtype).reshape(x.shape)), old.scales.replace(scales.squeeze(dim + 1)))


def _in_blocks(x: jax.Array, dim: int, num_blocks: int) -> jax.Array:
    return x.reshape(*x.shape[:dim], num_blocks, -1, *x.shape[dim + 1 :])


def encode(share: jax.Array, num_segments: int) -> jax.Array:
    """The nearest code, int32 in [0, 2^num_segments), of numbers in [0, 1]; see `decode`.

    What it stands for is off by at most 4.5 / 2^j of the number, where the number is between 10^(j - s) and
    10^(j - s + 1), s = num_segments; numbers below 10^(1 - s) are off by at most half of that. With 7 segments, of the
    first moment, that is 7% of a number at a tenth of the block's largest, 0.7% near it; with 8 half of that.
    """
    numbers = 1 + share / 10.0 ** (1 - num_segments)
    for segment in range(1, num_segments):
        power = 10.0 ** (segment - num_segments)
        numbers = jnp.where(share >= power, 2.0**segment / 9 * (share / power + 8), numbers)
    return jnp.clip(jnp.round(numbers), 1, 2**num_segments).astype(jnp.int32) - 1


def decode(codes: jax.Array, num_segments: int) -> jax.Array:
    """float32 numbers in [0, 1] of codes: 0 for 0, else a line from each power of ten to the next.

    With n = code + 1 between 2^j and 2^(j + 1), the number is 10^(j - num_segments) * (9 n / 2^j - 8): as many steps
    between a tenth and 1 as below. It is the dynamic code of Dettmers et al. with numbers at the ends of its intervals
    rather than in their middles, so that 0 and both 1 and -1 are among them.
    """
    numbers = codes.astype(jnp.float32) + 1
    values = jnp.zeros_like(numbers)
    for segment in range(1, num_segments + 1):
        power = 10.0 ** (segment - num_segments)
        line = np.float32(9 * power / 2**segment) * numbers - np.float32(8 * power)
        values = jnp.where(numbers >= 2**segment, line, values)
    return values
