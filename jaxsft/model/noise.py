"""Noise on embeddings in training (NEFTune): the same for a token however its batch is cut.

In: embeddings of rows, and a key for each row. Out: embeddings with noise. What a key is made of decides what the noise
depends on; here it is drawn for a place of a row, by its key and the number of the place alone.
"""

import jax
import jax.numpy as jnp

from jaxsft.mesh import constrain


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
    ends = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, places, length), axis=1, reverse=True)
    lengths = last - (places - positions) + 1
    scale = alpha * jax.lax.rsqrt((jnp.maximum(lengths, 1) * width).astype(jnp.float32))
    return jnp.where(segment_ids > 0, scale, 0.0)


def noisy(hidden: jax.Array, keys: jax.Array, scale: jax.Array, places: jax.Array) -> jax.Array:
    """Embeddings plus uniform noise in [-scale, scale], added in float32 and rounded once.

    Args:
        hidden: [B, T, D].
        keys: [B], PRNG keys.
        scale: float32 [B, T], by `noise_scale`.
        places: int32 [B, T], where in its row each token stands.
    """

    def of_token(key: jax.Array, place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, place)
        return jax.random.uniform(key, hidden.shape[-1:], jnp.float32, minval=-1.0, maxval=1.0)

    noise = constrain(jax.vmap(jax.vmap(of_token, in_axes=(None, 0)))(keys, places), "b t d")
    return (hidden.astype(jnp.float32) + scale[:, :, None] * noise).astype(hidden.dtype)
