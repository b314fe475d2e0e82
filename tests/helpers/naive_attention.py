"""Attention by its formula, to compare with: dense scores, repeated key/value heads, one softmax."""

import jax.numpy as jnp
import numpy as np


def naive(q, k, v, segment_ids, positions, scale=None, window=None, soft_cap=None, sinks=None):
    """Arguments as those of `attention`, of queries and keys of the same tokens."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (scale or 1 / np.sqrt(q.shape[-1]))
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = positions[:, :, None] - positions[:, None, :]
    allowed = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance >= 0) & (distance < (window or 1e9))
    nothing = jnp.full((1, q.shape[2], 1, 1), -jnp.inf) if sinks is None else sinks[None, :, None, None]
    highest = jnp.maximum(scores.max(-1, keepdims=True), nothing)
    weights = jnp.where(allowed[:, None], jnp.exp(scores - highest), 0)
    total = weights.sum(-1, keepdims=True) + jnp.exp(nothing - highest)
    return jnp.einsum("bnts,bsnh->btnh", weights / total, v)
