"""Rotary positions: frequencies of all the ways to stretch a context, and the rotation of queries and keys.

In: positions, and a `Rope` that a family has read. Out: queries and keys, turned by the angles of their positions.

A model may have several (`Rope` records): one for its local layers, another for its global ones. Frequencies are
rounded to float32 step by step as in transformers' modeling_rope_utils, as an error of 1e-7 in a frequency is one of
1e-3 radians at position 10,000. The power alone is taken in float64 and rounded: torch's is correctly rounded, numpy's
in float32 is not. And torch divides a number by an array by multiplying with the reciprocal.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn the first `dim` dims of a head."""

    dim: int
    theta: float
    scaling: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    interleaved: bool = False
    """Pairs are (2i, 2i + 1), not (i, i + dim / 2)."""
    backwards: bool = False
    """Pairs are turned the other way."""
    factor: float = 1.0
    original_max_position: int = 0
    """Positions of the pretraining before the context was stretched."""
    attention_factor: float = 1.0
    """Multiplies cos and sin, and so scores by its square."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether an example's own length changes its frequencies."""
        return self.scaling in ("dynamic", "longrope")

    def changes_at(self, lengths: np.ndarray) -> np.ndarray:
        """Whether the token that makes examples so long changes the angles of all the tokens before it."""
        if self.scaling == "longrope":
            return lengths == self.original_max_position + 1
        return (lengths > self.original_max_position) & (self.scaling == "dynamic")


class Rotation(NamedTuple):
    """Angles of the tokens of some rows: float32 [B, T, 1, dim / 2] each, times the attention factor."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each pair of dims, float32 [dim / 2]; of a short example, where its length matters.

    `llama3` leaves wavelengths below original_max_position / high_freq_factor alone, divides the frequencies of those
    above original_max_position / low_freq_factor by `factor`, and blends in between. `yarn` (Peng et al., 2023) blends
    linearly between pairs that turn `beta_fast` and `beta_slow` times in the original context. `longrope` (Ding et al.,
    2024) divides each pair by a number of its own, another one for long examples.
    """
    one, factor = np.float32(1), np.float32(rope.factor)
    powers = _powers(rope)
    frequencies = one / powers
    if rope.scaling == "linear":
        return frequencies / factor
    if rope.scaling == "longrope":
        return one / (np.array(rope.short_factors, np.float32) * powers)
    if rope.scaling == "yarn":
        keep = one - _yarn_ramp(rope)
        return one / (factor * powers) * (one - keep) + frequencies * keep
    if rope.scaling == "llama3":
        wavelengths = one / frequencies * np.float32(2 * math.pi)
        low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
        blend = (one / wavelengths * np.float32(original) - np.float32(low)) / np.float32(high - low)
        blended = (one - blend) * frequencies / factor + blend * frequencies
        unscaled, is_long = wavelengths < np.float32(original / high), wavelengths > np.float32(original / low)
        return np.where(unscaled, frequencies, np.where(is_long, frequencies / factor, blended))
    return frequencies


def _powers(rope: Rope) -> np.ndarray:
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)


def _yarn_ramp(rope: Rope) -> np.ndarray:
    """From 0 (pairs that turn often, left alone) to 1 (pairs that turn seldom, divided by `factor`)."""

    def pair_that_turns(times: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 * (low == high)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1)


def rotation(rope: Rope, positions: jax.Array, lengths: jax.Array | None = None) -> Rotation:
    """The angles of tokens at int32 [B, T] positions.

    Args:
        rope: how positions turn.
        positions: int32 [B, T].
        lengths: int32 [B, T], the length of each token's own example; asked for where `depends_on_length`. transformers
            takes the longest of a batch instead, by which an example's loss would depend on its neighbours.
    """
    frequencies = jnp.asarray(rope_frequencies(rope))
    if rope.depends_on_length:
        assert lengths is not None
        lengths = lengths[:, :, None, None]
        if rope.scaling == "longrope":
            long = np.float32(1) / (np.array(rope.long_factors, np.float32) * _powers(rope))
            frequencies = jnp.where(lengths > rope.original_max_position, long, frequencies)
        else:
            # theta * stretch^(dim / (dim - 2)), the NTK-aware base of the longer context.
            ratio = jnp.maximum(lengths, rope.original_max_position) / rope.original_max_position
            stretch = rope.factor * ratio - (rope.factor - 1)
            exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(max(rope.dim - 2, 1))
            frequencies = frequencies / stretch**exponents
    if rope.backwards:
        frequencies = -frequencies
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)


def example_lengths(segment_ids: jax.Array, kv_segment_ids: jax.Array, kv_positions: jax.Array) -> jax.Array:
    """The length of each token's segment as far as keys show it: int32 [B, T], of rows of S keys."""
    same = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return jnp.max(jnp.where(same, kv_positions[:, None, :] + 1, 0), axis=-1)


def rotate(x: jax.Array, rotation: Rotation, *, interleaved: bool = False) -> jax.Array:
    """Rotates pairs of dims by their angles, in float32, cast back once; dims beyond the rotated ones stay.

    Args:
        x: [B, T, N, H] or [B, T, K, H].
        rotation: of its tokens; its last dim is the number of pairs.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + dim / 2).
    """
    cos, sin = rotation
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    both = (first * cos - second * sin, second * cos + first * sin)
    turned = jnp.stack(both, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(both, axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
