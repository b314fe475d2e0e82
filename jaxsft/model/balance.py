"""Rows cut over `context`, in an order that gives every device the same work of causal attention.

In: arrays [B, T, ...] in the order of the row. Out: the same in pairs from both ends, and back. A query attends to all
tokens before it, so the last device would have most of the work. Of twice as many chunks as devices, each device takes
one from the front and one from the back:

    row            0 1 | 2 3 | 4 5 | 6 7      devices are divided by |
    balanced       0 7 | 1 6 | 2 5 | 3 4

Every chunk is sent to its device at once. What is done token by token needs no order, and attention is told it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsft.mesh import is_cut_evenly, partition_spec


@jax.tree_util.register_static
class Order(tuple[int, ...]):
    """Which chunk of a row lies in each place. Known when a program is traced, it has no leaves."""


def balanced_order(num_rows: int, length: int) -> Order | None:
    """Which chunk of the row lies in each place: 2 for each device along `context`, (0, 7, 1, 6, 2, 5, 3, 4) for 4.

    None where rows stay as they are: positions are not cut, or not evenly into twice as many chunks as devices.
    """
    size = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    if size == 1 or length % (2 * size) or not is_cut_evenly((num_rows, length), "b t"):
        return None
    return Order(chunk for device in range(size) for chunk in (device, 2 * size - 1 - device))


def balance(x: jax.Array, axes: str) -> jax.Array:
    """From the order of the row, where device c has chunks 2c and 2c + 1; the letters of the dims are `axes`."""
    return _moved(_to_balanced, x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def restore(x: jax.Array, axes: str) -> jax.Array:
    """The way back from `balance`."""
    return _moved(_to_row, x, axes)


# Left to `shard_map`, gradients would be divided and added up over the axes that do not cut the array.
restore.defvjp(lambda x, axes: (restore(x, axes), None), lambda axes, _, gradient: (balance(gradient, axes),))


def _moved(local: Callable, x: jax.Array, axes: str) -> jax.Array:
    size = jax.sharding.get_abstract_mesh().shape["context"]
    spec = partition_spec(axes)
    return jax.shard_map(functools.partial(local, size), in_specs=spec, out_specs=spec, check_vma=False)(x)


def _to_balanced(size: int, x: jax.Array) -> jax.Array:
    # Every device gets one chunk of an even number and one of an odd number: d and 2 * size - 1 - d.
    even, odd = (
        jax.lax.ppermute(part, "context", [(c, d) for c, d in enumerate(of_chunk)])
        for part, of_chunk in zip(jnp.split(x, 2, axis=1), _devices(size), strict=True)
    )
    return jnp.concatenate(_swapped_on_odd_devices(even, odd), axis=1)


def _to_row(size: int, x: jax.Array) -> jax.Array:
    parts = _swapped_on_odd_devices(*jnp.split(x, 2, axis=1))
    even, odd = (
        jax.lax.ppermute(part, "context", [(d, c) for c, d in enumerate(of_chunk)])
        for part, of_chunk in zip(parts, _devices(size), strict=True)
    )
    return jnp.concatenate([even, odd], axis=1)


def _devices(size: int) -> list[list[int]]:
    """The device that takes the even chunk, and the one that takes the odd chunk, of each device in the row's order."""
    return [[min(chunk, 2 * size - 1 - chunk) for chunk in range(first, 2 * size, 2)] for first in (0, 1)]


def _swapped_on_odd_devices(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    is_odd = jax.lax.axis_index("context") % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
