"""The loss over a mesh that cuts the table: block after block of the vocabulary, so that no device ever holds it all.

In: one device's tokens, and its part of the unembedding. Out: its part of the sums, and of the gradients. Each block of
rows is gathered over the mesh, used by all trained positions, and let go; its gradient is reduced to the parts that
devices keep before the next block begins. The softmax must have seen every block before a gradient can be made: the
blocks are gone over twice, and their logits computed twice, a third more than the matmuls of the whole table.

Every device takes part in the gathering and reducing of every block, so their number is static. Devices have different
numbers of trained tokens: loops over these are within a block, and hold nothing that other devices take part in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.mesh import COPY_AXES, WIDTH_AXES
from jaxsft.model.products import precision
from jaxsft.training.chunks import trained_first
from jaxsft.training.objective import Objective, Seen, factors, is_token, logit_sum, sums_of

TABLE_AT_ONCE = 2**25
"""Numbers of the table that a device holds at once: 64 MiB in bfloat16, and 128 MiB for their gradient in float32. A
smaller table is one block, and a larger one at least `MIN_BLOCKS`."""

MIN_BLOCKS = 8


def block_rows(num_rows: int, width: int) -> int:
    """Rows of a block, of a table with `num_rows` on this device: as even as whole tiles of 128 allow.

    The last block begins earlier than it would, where the rows are no multiple: with 44 rows in blocks of 6, it is rows
    38 to 43, of which it takes the last two.
    """
    tile = 128 if num_rows >= 128 * MIN_BLOCKS else 1
    most = max(min(num_rows // MIN_BLOCKS, TABLE_AT_ONCE // width) // tile, 1) * tile
    num_blocks = -(-num_rows // most)
    return tile * -(-num_rows // (num_blocks * tile))


class _Softmax(NamedTuple):
    """Of each of N positions: what the rows of the vocabulary that were gone over say."""

    maximum: jax.Array
    """float32 [N], the largest logit."""
    normaliser: jax.Array
    """float32 [N], the sum of exp(logit - maximum)."""
    num_largest: jax.Array
    """int32 [N], how many logits are the largest."""
    target_logit: jax.Array
    """float32 [N], 0 where the target was not among them."""
    logit_sum: jax.Array | None
    """float32 [N], of tokens; None where nothing asks for it."""

    @property
    def seen(self) -> Seen:
        """What it says when the whole vocabulary was gone over."""
        return Seen(self.maximum, self.normaliser, self.target_logit, self.logit_sum)


class _Tokens(NamedTuple):
    """Positions in the order of their chunks; beyond the last, zeros of weight 0."""

    x: jax.Array
    """[N, D]"""
    target: jax.Array
    """int32 [N], as a row of this device's part of the vocabulary."""
    weight: jax.Array
    """float32 [N]"""


class _Block(NamedTuple):
    """Some rows of this device's part of the vocabulary."""

    rows: jax.Array
    """[C, D], whole."""
    start: jax.Array
    """int32 []: the first one."""
    begins: jax.Array
    """int32 []: the first one that is not of the block before."""

    def holds(self, target: jax.Array) -> jax.Array:
        """Whether targets [N] are among the rows that this block, and no other, takes."""
        return (target >= self.begins) & (target < self.start + self.rows.shape[0])


def loss_in_blocks(
    objective: Objective,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    with_gradients: bool,
    is_frozen: bool = False,
    token_axes: tuple[str, ...],
) -> Any:
    """One device's part, within `shard_map`, of what `loss._local` gives: sums, and gradients by hidden and by `table`.

    Args:
        objective: what is minimised, and what becomes of a product of hidden state and row.
        hidden: [B, T, D], of this device.
        table: [V, D], of this device: the rows of `tensor`, and of each the part of the width that it keeps, in the
            dtype of `hidden`.
        targets: int32 [B, T], of the whole vocabulary.
        weights: float32 [B, T].
        with_gradients: see above; that by `table` has its shape.
        is_frozen: it is None, as the table is not trained.
        token_axes: sums are those of all devices along these.
    """
    of_products = objective.logits
    shape, (num_rows, _) = hidden.shape, table.shape
    first_id = jax.lax.axis_index("tensor") * num_rows
    count = block_rows(num_rows, shape[-1])
    chunks = trained_first(weights.reshape(-1), count)
    flat = hidden.reshape(-1, shape[-1]), targets.reshape(-1) - first_id, weights.reshape(-1)
    tokens = _Tokens(*(each.at[chunks.order].get(mode="fill", fill_value=0) for each in flat))
    exact = precision(hidden.dtype)

    def over_blocks(add: Callable, carry: Any) -> Any:
        """`add(block, carry)` of each block."""

        def add_block(i: jax.Array, carry: Any) -> Any:
            start = jnp.minimum(i * count, num_rows - count)
            rows = jax.lax.dynamic_slice_in_dim(table, start, count)
            rows = jax.lax.all_gather(rows, WIDTH_AXES, axis=1, tiled=True)
            return add(_Block(rows, start, i * count), carry)

        return jax.lax.fori_loop(0, -(-num_rows // count), add_block, carry)

    def over_chunks(add: Callable, carry: Any) -> Any:
        """`add(place, tokens, carry)` of each chunk, which begins at `place`."""

        def add_chunk(i: jax.Array, carry: Any) -> Any:
            place = i * chunks.size
            return add(place, _cut(tokens, place, chunks.size), carry)

        return jax.lax.fori_loop(0, chunks.number, add_chunk, carry)

    def logits_of(block: _Block, x: jax.Array) -> jax.Array:
        """float32 [N, C]; the lowest float for rows that are of the block before."""
        products = jnp.einsum("cd,vd->cv", x, block.rows, precision=exact, preferred_element_type=jnp.float32)
        logits = of_products(products, first_id=first_id + block.start)
        if num_rows % count == 0:
            return logits
        is_new = block.start + jnp.arange(count) >= block.begins
        return jnp.where(is_new, logits, jnp.finfo(jnp.float32).min)

    def see(block: _Block, softmax: _Softmax) -> _Softmax:
        def see_chunk(place: jax.Array, some: _Tokens, softmax: _Softmax) -> _Softmax:
            before = _cut(softmax, place, chunks.size)
            seen = _seen(before, logits_of(block, some.x), some.target - block.start, block.holds(some.target))
            return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place, 0), softmax, seen)

        return over_chunks(see_chunk, softmax)

    softmax = _over_tensor(over_blocks(see, _nothing_seen(chunks.order.size, objective)))
    sums = jax.lax.psum(_sums(objective, softmax, tokens.weight), token_axes)
    if not with_gradients:
        return sums

    def add_gradients(block: _Block, gradients: Any) -> Any:
        hidden_gradient, table_gradient = gradients
        einsum = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)

        def add_chunk(place: jax.Array, some: _Tokens, gradients: Any) -> Any:
            hidden_gradient, rows_gradient = gradients
            logits = logits_of(block, some.x)
            of_logits = _gradient(objective, logits, _cut(softmax, place, chunks.size), some, block)
            of_product = (of_logits * of_products.slope(logits)).astype(some.x.dtype)
            added = _cut(hidden_gradient, place, chunks.size) + einsum("cv,vd->cd", of_product, block.rows)
            hidden_gradient = jax.lax.dynamic_update_slice_in_dim(hidden_gradient, added, place, 0)
            if not is_frozen:
                rows_gradient += einsum("cv,cd->vd", of_product, some.x)
            return hidden_gradient, rows_gradient

        no_gradient = None if is_frozen else jnp.zeros(block.rows.shape, jnp.float32)
        hidden_gradient, rows_gradient = over_chunks(add_chunk, (hidden_gradient, no_gradient))
        if is_frozen:
            return hidden_gradient, None
        rows_gradient = jax.lax.psum_scatter(rows_gradient, WIDTH_AXES, scatter_dimension=1, tiled=True)
        rows_gradient += _cut(table_gradient, block.start, count)
        return hidden_gradient, jax.lax.dynamic_update_slice_in_dim(table_gradient, rows_gradient, block.start, 0)

    nothing = jnp.zeros(tokens.x.shape, jnp.float32), None if is_frozen else jnp.zeros(table.shape, jnp.float32)
    by_place, table_gradient = over_blocks(add_gradients, nothing)
    by_place = jax.lax.psum(by_place, "tensor")
    hidden_gradient = jnp.zeros(flat[0].shape, jnp.float32)
    hidden_gradient = hidden_gradient.at[chunks.order].set(by_place, mode="drop", unique_indices=True)
    copy_axes = tuple(axis for axis in token_axes if axis in COPY_AXES)
    by_table = None if is_frozen else jax.lax.psum(table_gradient, copy_axes)
    return sums, hidden_gradient.reshape(shape), by_table


def _cut(tree: Any, start: jax.Array, count: int) -> Any:
    return jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, start, count), tree)


def _nothing_seen(num_tokens: int, objective: Objective) -> _Softmax:
    zeros, none = jnp.zeros(num_tokens, jnp.float32), jnp.zeros(num_tokens, jnp.int32)
    no_sum = zeros if objective.needs_logit_sum else None
    return _Softmax(jnp.full(num_tokens, jnp.finfo(jnp.float32).min), zeros, none, zeros, no_sum)


def _seen(before: _Softmax, logits: jax.Array, target: jax.Array, is_here: jax.Array) -> _Softmax:
    """With logits [N, C] more, among which the targets [N] are, where they are here."""
    maximum = jnp.maximum(before.maximum, logits.max(axis=-1))
    normaliser = before.normaliser * jnp.exp(before.maximum - maximum)
    normaliser += jnp.exp(logits - maximum[:, None]).sum(axis=-1)
    num_largest = jnp.where(before.maximum == maximum, before.num_largest, 0)
    num_largest += jnp.sum(logits == maximum[:, None], axis=-1, dtype=jnp.int32)
    target_logit = jnp.take_along_axis(logits, jnp.where(is_here, target, 0)[:, None], axis=-1)[:, 0]
    target_logit = before.target_logit + jnp.where(is_here, target_logit, 0.0)
    total = None if before.logit_sum is None else before.logit_sum + logit_sum(logits)
    return _Softmax(maximum, normaliser, num_largest, target_logit, total)


def _over_tensor(softmax: _Softmax) -> _Softmax:
    """Of the whole vocabulary, each device having gone over its part."""
    maximum = jax.lax.pmax(softmax.maximum, "tensor")
    return _Softmax(
        maximum,
        jax.lax.psum(softmax.normaliser * jnp.exp(softmax.maximum - maximum), "tensor"),
        jax.lax.psum(jnp.where(softmax.maximum == maximum, softmax.num_largest, 0), "tensor"),
        jax.lax.psum(softmax.target_logit, "tensor"),
        None if softmax.logit_sum is None else jax.lax.psum(softmax.logit_sum, "tensor"),
    )


def _sums(objective: Objective, softmax: _Softmax, weight: jax.Array) -> tuple[jax.Array, ...]:
    """`sums_of` positions [N]; of those of weight 0, nothing need have been seen."""
    is_right = (softmax.target_logit == softmax.maximum) & (softmax.num_largest == 1)
    is_right &= ~jnp.isnan(softmax.normaliser)  # the maximum over devices may have passed over a NaN
    return sums_of(objective, softmax.seen, weight, is_right)


def _gradient(objective: Objective, logits: jax.Array, softmax: _Softmax, tokens: _Tokens, block: _Block) -> jax.Array:
    """d (weight * objective) / d logits, [N, C]; of the loss: weight * (softmax(logits) - onehot(target))."""
    is_target = (block.start + jnp.arange(logits.shape[-1]) == tokens.target[:, None]) & block.holds(tokens.target)[
        :, None
    ]
    exponentials = jnp.exp(logits - softmax.maximum[:, None])
    of_softmax, of_target, of_tokens = factors(objective, softmax.seen, tokens.weight)
    gradient = exponentials * (of_softmax / softmax.normaliser)[:, None] - of_target[:, None] * is_target
    return gradient if of_tokens is None else gradient - of_tokens[:, None] * is_token(logits)
