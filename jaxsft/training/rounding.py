"""Rounding to bfloat16 up or down at random, so that the mean of what is written is what was computed.

In: float32 numbers and a key. Out: bfloat16 numbers. The same key rounds the same number alike on every mesh.
"""

import zlib

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 numbers around it, the nearer one the likelier; what is one stays it.

    A number a quarter of the way up from one to the next is rounded up in a quarter of all cases: 16 random bits are
    added below the bits that stay. Infinities and NaN stay what they are.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def step_key(seed: ArrayLike, step: jax.Array) -> jax.Array:
    """The key of a step, from 0, of a run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def key_of(step_key: jax.Array, path: str) -> jax.Array:
    """The key of a parameter at a step, by its path, so that others come and go without changing it."""
    return jax.random.fold_in(step_key, zlib.crc32(path.encode()))
