"""Parts of weights from a mesh into host memory, on every process: a layer, or some rows. For what is small."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def of_layer(value: jax.Array, layer: tuple[int, ...]) -> np.ndarray:
    """float32: one layer of stacked ones, or all of an array where `layer` is empty."""
    return _to_host(_pick(value, layer[0]) if layer else value).astype(np.float32)


def rows_of(table: jax.Array, ids: Sequence[int]) -> np.ndarray:
    """float32 [len(ids), D] of a table [V, D]."""
    return _to_host(_take(table, jnp.array(ids))).astype(np.float32)


@jax.jit
def _pick(value: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)


@jax.jit
def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def _to_host(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
