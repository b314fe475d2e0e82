"""Tables of embeddings: a row for each token or position, looked up, and the gradient of that.

In: ids [B, T]. Out: their rows [B, T, D]. The table of an output projection is one too; the loss multiplies by it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.mesh import AXES, COPY_AXES, DIM_AXES, constrain, free_axes, partition_spec
from jaxsft.model.adapter import Adapter
from jaxsft.model.architecture import DecoderConfig


class Embedding(nnx.Module):
    """A table with a row [D] for each token or position, of embeddings or of an output projection."""

    def __init__(self, axes: str, rows: int, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Random rows; those from `rows` on only fill up the table, and are zeros."""
        shape = tuple(config.sizes[letter] for letter in axes.split())
        table = config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)
        self.weight = nnx.Param(jnp.where(jnp.arange(shape[0])[:, None] < rows, table, 0), axes=axes)
        self.adapter: Adapter | None = None

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows [B, T, D] of ids [B, T], in `dtype`; an id outside is clamped."""
        rows = _rows_of(self.weight, ids, dtype)
        return rows if self.adapter is None else self.adapter.looked_up(rows, _rows_of(self.adapter.a, ids, dtype))

    @property
    def projection(self) -> jax.Array:
        """The table [V, D] as an output projection: in its stored dtype, and in float32 with what an adapter adds.

        That is a second table while the loss is computed, and its gradient a third.
        """
        if self.adapter is None:
            return self.weight[...]
        return constrain(self.weight[...].astype(jnp.float32) + self.adapter.added().T, "v d")


def _rows_of(table: nnx.Variable, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    axes = table.get_metadata("axes")
    width = axes.split()[-1]
    # Looked up where the table lies, and only then cut by positions, and by rows: in one step, from one axis to two or
    # from two axes to one, it would all be replicated.
    return constrain(constrain(_look_up(axes, dtype, table[...], ids), f"u p {width}"), f"u t {width}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(axes: str, dtype: jnp.dtype, table: jax.Array, ids: jax.Array) -> jax.Array:
    """`table[ids]` in `dtype`, whose gradient is summed over tokens in float32, whatever the dtypes.

    In bfloat16 a frequent token would soon add nothing to the sum of those before: of 16,384, 7% arrived.
    """
    if free_axes(AXES) == AXES:
        return table[ids].astype(dtype)
    # By hand as well: where some axes are, XLA's partitioner of gathers aborts (jax 0.10.2).

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        """A row is on one of the devices that the table is cut over; the others have zeros."""
        rows = table.at[_here(axes, ids, len(table))].get(mode="fill", fill_value=0)
        return jax.lax.psum(rows.astype(dtype), DIM_AXES[axes[0]])

    of_table, of_ids, of_rows = (partition_spec(each) for each in (axes, "u p", f"u p {axes.split()[-1]}"))
    ids = jnp.clip(ids, 0, len(table) - 1)
    return jax.shard_map(local, in_specs=(of_table, of_ids), out_specs=of_rows, check_vma=False)(table, ids)


def _look_up_forward(axes: str, dtype: jnp.dtype, table: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
    # A stand-in [V, 0] carries the rows and the dtype that the gradient must have.
    return _look_up(axes, dtype, table, ids), (ids, jnp.zeros((len(table), 0), table.dtype))


def _look_up_backward(axes: str, dtype: jnp.dtype, kept: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    ids, like = kept
    if free_axes(AXES) == AXES:
        sums = jnp.zeros((len(like), gradient.shape[-1]), jnp.float32)
        return sums.at[ids].add(gradient.astype(jnp.float32), mode="clip").astype(like.dtype), None

    def local(ids: jax.Array, gradient: jax.Array) -> jax.Array:
        num_rows = len(like) // math.prod(mesh.shape[axis] for axis in DIM_AXES[axes[0]])
        sums = jnp.zeros((num_rows, gradient.shape[-1]), jnp.float32)
        sums = sums.at[_here(axes, ids, num_rows)].add(gradient.astype(jnp.float32), mode="drop")
        return jax.lax.psum(sums, copy_axes)

    mesh, copy_axes = jax.sharding.get_abstract_mesh(), free_axes(COPY_AXES)
    of_table, of_ids, of_rows = (partition_spec(each) for each in (axes, "u p", f"u p {axes.split()[-1]}"))
    ids = jnp.clip(ids, 0, len(like) - 1)
    sums = jax.shard_map(local, in_specs=(of_ids, of_rows), out_specs=of_table, check_vma=False)(ids, gradient)
    return sums.astype(like.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _here(axes: str, ids: jax.Array, num_rows: int) -> jax.Array:
    """The numbers that some rows have among the `num_rows` of this device; `num_rows` stands for all that are not."""
    over = DIM_AXES[axes[0]]
    ids = ids - num_rows * jax.lax.axis_index(over) if over else ids
    return jnp.where((ids >= 0) & (ids < num_rows), ids, num_rows)
