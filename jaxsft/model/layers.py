"""The parts of a decoder layer: linear maps, the RMS norm, rotary positions, the gated MLP.

Weights are born here, each with the letters of its dims as `axes`; `mesh.py` turns letters into shardings and
`families/` turns them into Hugging Face layouts. The layers of a model are stacked: a weight is made with a leading
dim `l`, and what runs inside the scan over layers is the same module with that dim taken off.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.mesh import constrain

Sizes = Mapping[str, int]
"""Letter of a dim to its size."""


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Matmul precision of operands of `dtype`: float32 means float32 here, also where hardware would round to less."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """`x @ weight + bias`, its dims named by letters: `"d -> n h"` maps [B, T, D] to [B, T, N, H]."""

    def __init__(self, dims: str, sizes: Sizes, *, bias: bool, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Weight `"l d n h"` drawn from normal(std), bias `"l n h"` of zeros, both stored in `dtype`."""
        inputs, outputs = (side.split() for side in dims.split("->"))
        x, y, weight = (" ".join(letters) for letters in (["b", "t", *inputs], ["b", "t", *outputs], inputs + outputs))
        self.einsum = f"{x}, {weight} -> {y}"
        axes = f"l {weight}"
        shape = tuple(sizes[letter] for letter in axes.split())
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes=axes)
        axes = " ".join(["l", *outputs])
        shape = tuple(sizes[letter] for letter in axes.split())
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum(self.einsum, x, self.weight[...].astype(x.dtype), precision=precision(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, in float32, cast back once."""

    def __init__(self, axes: str, sizes: Sizes, *, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones([sizes[letter] for letter in axes.split()], dtype), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_float = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_float), axis=-1, keepdims=True)
        normed = x_float * jax.lax.rsqrt(mean_square + self.eps) * self.weight[...].astype(jnp.float32)
        return normed.astype(x.dtype)


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, sizes: Sizes, *, bias: bool, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_proj = Linear("d -> f", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear("d -> f", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear("f -> d", sizes, bias=bias, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(constrain(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x), "b t f"))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the base, and how its frequencies are rescaled for a longer context than pretraining's."""

    theta: float
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dims, float32 [H/2].

    Rounded to float32 step by step as in transformers' modeling_rope_utils, as an error of 1e-7 in a frequency is one
    of 1e-3 radians at position 10,000. The power alone is taken in float64 and rounded: torch's is correctly rounded,
    numpy's in float32 is not. And torch divides a number by an array by multiplying with the reciprocal.

    `llama3` leaves wavelengths below original_max_position / high_freq_factor alone, divides the frequencies of those
    above original_max_position / low_freq_factor by `factor`, and blends in between.
    """
    one, factor = np.float32(1), np.float32(rope.factor)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = one / np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)
    if rope.scaling == "linear":
        return frequencies / factor
    if rope.scaling == "llama3":
        wavelengths = one / frequencies * np.float32(2 * math.pi)
        low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
        blend = (one / wavelengths * np.float32(original) - np.float32(low)) / np.float32(high - low)
        blended = (one - blend) * frequencies / factor + blend * frequencies
        unscaled, is_long = wavelengths < np.float32(original / high), wavelengths > np.float32(original / low)
        return np.where(unscaled, frequencies, np.where(is_long, frequencies / factor, blended))
    return frequencies


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of the last dim by their angles, in float32, cast back once.

    Args:
        x: [B, T, N, H] or [B, T, K, H].
        cos: float32 [B, T, 1, H/2], as is `sin`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
