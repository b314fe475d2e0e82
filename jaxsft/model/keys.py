"""Keys and values of whole rows, for kernels that take those of a device's rows in one piece.

In: keys [B, S, K, H] as they lie on the devices along `context`, chunk by chunk in any order (`balance.py`). Out: those
of all devices, in the order of the row. Inside `shard_map`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def whole_rows(x: jax.Array, order: tuple[int, ...], num_devices: int) -> jax.Array:
    """[B, S, K, H] of one device to that of all `num_devices`; their gradients are summed up in float32."""
    return in_order_of_row(_gathered(x, num_devices), order)


def in_order_of_row(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """[B, S, ...], its chunks put where they are in the row; with order (0, 3, 1, 2), the second one is the last."""
    if order == tuple(range(len(order))):
        return x
    chunks = jnp.split(x, len(order), axis=1)
    return jnp.concatenate([chunks[place] for place in np.argsort(order)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, num_devices: int) -> jax.Array:
    return x if num_devices == 1 else jax.lax.all_gather(x, "context", axis=1, tiled=True)


def _reduced(num_devices: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    if num_devices == 1:
        return (gradient,)
    total = jax.lax.psum_scatter(gradient.astype(jnp.float32), "context", scatter_dimension=1, tiled=True)
    return (total.astype(gradient.dtype),)


_gathered.defvjp(lambda x, num_devices: (_gathered(x, num_devices), None), _reduced)
