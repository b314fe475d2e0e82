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
from flax import nnx

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.optimizer import Optimizer, Weight, leafwise, with_decay
from jaxsft.training.optimizers.params import sides, size_per_layer

LEAST_SIZE = 4096
"""Numbers of one layer from which on a weight has codes; norms and biases never have."""

LARGEST_BLOCK, LEAST_BLOCK = 128, 32


class Coded(NamedTuple):
    """A moment in bytes: `decode(codes) * scales`, the scale that of the block."""

    codes: Any
    scales: Any


class Moments(NamedTuple):
    """Of a parameter: float32, or `Coded`, the second one as its root."""

    first: Any
    second: Any


def adamw8bit(config: OptimConfig) -> Optimizer:
    """AdamW with moments in 8 bits, for weights of 4,096 numbers a layer or more; see `encode` for the error."""

    def init(param: Any) -> Moments:
        return Moments(_zeros(param, jnp.int8), _zeros(param, jnp.uint8))

    def update(weight: Weight, old: Moments, count: jax.Array) -> tuple[jax.Array, Moments]:
        gradient, block = weight.gradient, block_of(weight.axes, weight.value.shape)
        if block is not None:
            old = Moments(_decoded(old.first, block), jnp.square(_decoded(old.second, block)))
        m = config.beta1 * old.first + (1 - config.beta1) * gradient
        v = config.beta2 * old.second + (1 - config.beta2) * jnp.square(gradient)
        corrections = [1 - beta ** count.astype(jnp.float32) for beta in (config.beta1, config.beta2)]
        direction = m / corrections[0] / (jnp.sqrt(v / corrections[1]) + config.epsilon)
        new = Moments(m, v) if block is None else Moments(_signed(m, block), _unsigned(jnp.sqrt(v), block))
        return with_decay(direction, weight.value, weight.decay), new

    return leafwise(
        config,
        scalars=lambda: jnp.zeros((), jnp.int32),
        next_scalars=lambda count, rate: count + 1,
        init=init,
        update=update,
    )


class Block(NamedTuple):
    """Numbers that share a scale."""

    dim: int
    """That they lie along."""
    size: int


def block_of(axes: str, shape: tuple[int, ...]) -> Block | None:
    """The blocks of a parameter, or of one layer of it; None for what has no codes.

    Heads' dims are uncut, MLP widths cut by `tensor` only, and along the width of the model lies a token's row: the
    first of these that the weight has, in blocks of its largest divisor up to 128. `"l d n h"` with heads of 64 has
    blocks of 64, `"l f d"` with an MLP of 1,536 blocks of 128.
    """
    letters = axes.split()
    if len(sides(axes)) < 2 or size_per_layer(axes, shape) < LEAST_SIZE:
        return None
    for dim in (letters.index(letter) for letter in "hfd" if letter in letters):
        size = max(size for size in range(1, LARGEST_BLOCK + 1) if shape[dim] % size == 0)
        if size >= LEAST_BLOCK:
            return Block(dim, size)
    return None


def _zeros(param: Any, dtype: Any) -> Coded | nnx.Variable:
    axes, shape = param.get_metadata("axes"), param.shape
    block = block_of(axes, shape)
    if block is None:
        return param.replace(jnp.zeros(shape, jnp.float32))
    letters, sizes = axes.split(), list(shape)
    letters[block.dim], sizes[block.dim] = "c", shape[block.dim] // block.size
    scales = nnx.Param(jnp.zeros(sizes, jnp.float32), axes=" ".join(letters))
    return Coded(param.replace(jnp.zeros(shape, dtype)), scales)


def _decoded(moment: Coded, block: Block) -> jax.Array:
    num_segments = 8 if moment.codes.dtype == jnp.uint8 else 7
    codes = moment.codes.astype(jnp.int32)
    values = jnp.sign(codes).astype(jnp.float32) * decode(jnp.abs(codes), num_segments)
    return (_in_blocks(values, block) * jnp.expand_dims(moment.scales, block.dim + 1)).reshape(codes.shape)


def _signed(x: jax.Array, block: Block) -> Coded:
    shares, scales = _shares(x, block)
    codes = encode(shares, 7) * jnp.sign(_in_blocks(x, block)).astype(jnp.int32)
    return Coded(codes.astype(jnp.int8).reshape(x.shape), scales)


def _unsigned(x: jax.Array, block: Block) -> Coded:
    """What is not 0 gets a code above 0."""
    shares, scales = _shares(x, block)
    codes = jnp.maximum(encode(shares, 8), (shares > 0).astype(jnp.int32))
    return Coded(codes.astype(jnp.uint8).reshape(x.shape), scales)


def _shares(x: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
    """The sizes of numbers as shares of their block's largest, in blocks, and the largest."""
    sizes = jnp.abs(_in_blocks(x, block))
    scales = sizes.max(block.dim + 1)
    divisors = jnp.where(scales > 0, scales, 1.0)
    return sizes / jnp.expand_dims(divisors, block.dim + 1), scales


def _in_blocks(x: jax.Array, block: Block) -> jax.Array:
    return x.reshape(*x.shape[: block.dim], -1, block.size, *x.shape[block.dim + 1 :])


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
