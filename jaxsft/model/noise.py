"""Random numbers of training, which depend on (seed, step, row, position) and on nothing else.

In: the seed of a run, a step, and the numbers of rows in the whole batch. Out: a key for each row, of that one for each
token, and numbers drawn by them. However a batch is cut over microbatches and devices, and wherever a row's tokens
travel, a token draws the same numbers; so does a run that was interrupted.

Keys are the two words of JAX's threefry keys, uint32 [..., 2], as a mesh cuts them like any other array.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_IMPLEMENTATION = "threefry2x32"


def row_keys(seed: ArrayLike, step: jax.Array, num_rows: int) -> jax.Array:
    """Keys uint32 [B, 2] of the rows of a batch, from row 0 on."""
    of_step = jax.random.fold_in(jax.random.key(seed, impl=_IMPLEMENTATION), step)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(of_step, jnp.arange(num_rows)))


def token_keys(rows: jax.Array, length: int) -> jax.Array:
    """Keys uint32 [B, T, 2] of the tokens of rows with the keys [B, 2]."""
    each = jax.vmap(jax.vmap(_fold, (None, 0)), (0, None))
    return each(rows, jnp.arange(length))


def fold(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Other keys [B, T, 2] for another use: that of a layer, or of a map in it."""
    return _of_each(lambda key: _fold(key, number), keys)


def uniform(keys: jax.Array, size: int) -> jax.Array:
    """float32 [B, T, size], each in [0, 1), of keys [B, T, 2]."""
    return _of_each(lambda key: jax.random.uniform(_wrap(key), (size,)), keys)


EMBEDDINGS = 2**31 - 1
"""What keys are folded with for noise on embeddings; layers have their numbers."""


def noise_scale(segment_ids: jax.Array, positions: jax.Array, *, alpha: float, width: int) -> jax.Array:
    """The largest noise of each token: alpha / sqrt(tokens of its own segment * width), 0 where there is padding.

    Jain et al. 2023 (NEFTune), algorithm 1. The length is that of the segment: by that of the row, which other trainers
    take, the noise of an example would depend on what it is packed or padded with.

    Args:
        segment_ids: int32 [B, T], whole rows in their order.
        positions: int32 [B, T], index within the segment.
        alpha: `loss.neftune_alpha`.
        width: D.

    Returns:
        float32 [B, T]. With segments 1 1 1 2 2 0, alpha 6 and width 3: 2 2 2 2.45 2.45 0.
    """
    length = segment_ids.shape[1]
    places = jnp.arange(length)
    is_end = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    ends = jax.lax.cummin(jnp.where(is_end, places, length), axis=1, reverse=True)
    lengths = ends - (places - positions) + 1
    scale = alpha * jax.lax.rsqrt((jnp.maximum(lengths, 1) * width).astype(jnp.float32))
    return jnp.where(segment_ids > 0, scale, 0.0)


def noisy(hidden: jax.Array, keys: jax.Array, scale: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] plus uniform noise in [-scale, scale), added in float32 and rounded once.

    Args:
        hidden: [B, T, D].
        keys: [B, T, 2], of the tokens.
        scale: float32 [B, T], by `noise_scale`.
    """
    noise = 2.0 * uniform(fold(keys, EMBEDDINGS), hidden.shape[-1]) - 1.0
    return (hidden.astype(jnp.float32) + scale[:, :, None] * noise).astype(hidden.dtype)


def _of_each(function: Callable[[jax.Array], Any], keys: jax.Array) -> Any:
    return jax.vmap(jax.vmap(function))(keys)


def _fold(key: jax.Array, number: jax.Array | int) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(_wrap(key), number))


def _wrap(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key, impl=_IMPLEMENTATION)
