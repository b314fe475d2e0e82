"""Trained positions in chunks: which positions the loss computes at once, those that are not trained left out.

In: the weights of a device's positions. Out: their order and how they are cut. SFT trains a part of the tokens; what
costs time in the loss is done for these alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.mesh import on_cpu

LOGITS_PER_CHUNK = 2**25
"""Logits held at once by one device: 128 MiB in float32. On a CPU down to a quarter, for chunks of an eighth of the
tokens: matmuls of few positions are nearly as fast there, and of the last chunk less is wasted."""


class Chunks(NamedTuple):
    """Positions in the order in which they are computed, C at once; only so many chunks as hold a trained one."""

    order: jax.Array
    """int32, a multiple of C: the trained positions, then the others, then numbers beyond the last."""
    size: int
    """C."""
    number: jax.Array
    """int32 []: chunks that hold a trained position."""


def trained_first(weights: jax.Array, vocab_size: int) -> Chunks:
    """Of positions with weights float32 [N], each of which has logits [V]."""
    num_tokens = weights.size
    size = chunk_size(num_tokens, vocab_size)
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -num_tokens % size), constant_values=num_tokens)
    return Chunks(order, size, -(-jnp.count_nonzero(weights) // size))


def chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits are held at once: a multiple of 128, unless there are fewer."""
    size = LOGITS_PER_CHUNK // vocab_size
    if on_cpu():
        size = min(size, max(size // 4, num_tokens // 8))
    return min(num_tokens, max(128, size // 128 * 128))
