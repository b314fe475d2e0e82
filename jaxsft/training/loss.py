"""Masked next-token loss, in chunks of trained tokens, without ever holding `[B, T, V]` logits.

In: final hidden states, the unembedding, targets and their weights. Out: sums only; the one division is in the step.
Rows may be cut over the mesh and the vocabulary over `tensor`; logits are never gathered. Where each device holds the
whole width of its rows of the table, as on one device, it uses them all at once; a large table whose width is cut is
gathered block by block (`loss_in_blocks.py`). What is minimised is the loss, or what `objective.py` makes of it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsft.config import LossConfig
from jaxsft.mesh import COPY_AXES, TOKEN_AXES, WIDTH_AXES, free_axes, on_one_device, partition_spec
from jaxsft.model.layers import Logits
from jaxsft.model.products import precision
from jaxsft.training import loss_in_blocks
from jaxsft.training.chunks import trained_first
from jaxsft.training.objective import PLAIN, Objective, Seen, factors, is_token, logit_sum, sums_of


class LossSums(NamedTuple):
    """What a loss returns; every entry adds up over microbatches, devices, processes and steps.

    float32 scalars (`jax.Array`) inside jit, plain floats once they are on the host.
    """

    loss_sum: Any
    """sum of weight * nll, in nats."""
    weight_sum: Any
    """sum of weights."""
    correct_sum: Any
    """sum of the weights of targets whose logit is larger than all others; a tie is no hit."""
    trained_tokens: Any
    """number of targets with a non-zero weight."""


def next_token_loss(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, loss_weights: jax.Array, *, logits: Logits
) -> LossSums:
    """Cross-entropy of the targets under softmax(logits(hidden @ unembedding.T)), weighted and summed.

    loss_sum = sum_t w_t * (logsumexp_v(l_tv) - l_t,target), where l_tv = logits(h_t . u_v). The gradients of one chunk
    are computed together with its value, so nothing of size V is kept for the backward pass; positions of weight 0 cost
    nothing.

    Args:
        hidden: [B, T, D], any float dtype; its dtype is the dtype of the matmuls, accumulation is float32.
        unembedding: [V, D].
        targets: int32 [B, T], already shifted; entries of weight 0 are ignored.
        loss_weights: float32 [B, T].
        logits: scale, soft cap and size of the vocabulary; rows of the table beyond it are in no sum.
    """
    return next_token_objective(hidden, unembedding, targets, loss_weights, logits=logits, loss=PLAIN)[1]


@jax.named_scope("loss")
def next_token_objective(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array,
    *,
    logits: Logits,
    loss: LossConfig,
) -> tuple[jax.Array, LossSums]:
    """What is to be minimised, sum_t w_t * `objective.values`, float32 []; and the sums of `next_token_loss`.

    Gradients are those of the first. Where `loss` asks for nothing, it is the loss sum itself, and computed as that.
    """
    objective = Objective(loss, logits)
    objective_sum, correct_sum, *rest = _loss(objective, hidden, unembedding, targets, loss_weights)
    loss_sum = jax.lax.stop_gradient(rest[0]) if rest else objective_sum
    sums = LossSums(loss_sum, loss_weights.sum(), correct_sum, jnp.count_nonzero(loss_weights).astype(jnp.float32))
    return objective_sum, sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(objective: Objective, *arrays: jax.Array) -> Any:
    return _over_mesh(objective, *arrays, with_gradients=False)


def _loss_forward(objective: Objective, *primals: Any) -> Any:
    arrays = [each.value for each in primals]
    hidden, unembedding, *_ = arrays
    # The gradient by a table that is not trained would be as large as the table.
    is_frozen = not primals[1].perturbed
    sums, *gradients = _over_mesh(objective, *arrays, with_gradients=True, is_frozen=is_frozen)
    # Zero-sized stand-ins carry the dtypes that the cotangents must have.
    return sums, (*gradients, jnp.zeros(0, hidden.dtype), jnp.zeros(0, unembedding.dtype))


def _loss_backward(objective: Objective, residuals: Any, cotangents: Any) -> Any:
    hidden_gradient, unembedding_gradient, hidden_like, unembedding_like = residuals
    scale = cotangents[0]
    by_table = None
    if unembedding_gradient is not None:
        by_table = (scale * unembedding_gradient).astype(unembedding_like.dtype)
    return (scale * hidden_gradient).astype(hidden_like.dtype), by_table, None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _over_mesh(
    objective: Objective,
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    with_gradients: bool,
    is_frozen: bool = False,
) -> Any:
    """Runs `_local` on each device's own tokens and vocabulary, and reduces once after the last chunk.

    Left to the partitioner, the reduction of the unembedding's gradient would sit inside the loop over chunks.
    """
    unembedding = unembedding.astype(hidden.dtype)
    if on_one_device():
        return _local(
            objective, hidden, unembedding, targets, weights, with_gradients=with_gradients, is_frozen=is_frozen
        )
    hidden_spec, rows, table = partition_spec("b t d"), partition_spec("b t"), partition_spec("v d")
    local: Callable[..., Any] = functools.partial(_local, on_mesh=True)
    table_spec = PartitionSpec("tensor", None)
    if is_in_blocks(unembedding):
        local, table_spec = loss_in_blocks.loss_in_blocks, table
    sums = (PartitionSpec(),) * (2 if objective.loss.is_plain else 3)
    options: dict[str, Any] = {
        "with_gradients": with_gradients,
        "is_frozen": is_frozen,
        "token_axes": free_axes(TOKEN_AXES),
    }
    return jax.shard_map(
        functools.partial(local, objective, **options),
        in_specs=(hidden_spec, table_spec, rows, rows),
        out_specs=(sums, hidden_spec, None if is_frozen else table) if with_gradients else sums,
        check_vma=False,
    )(hidden, unembedding, targets, weights)


def is_in_blocks(unembedding: Any) -> bool:
    """Whether the vocabulary is gone over in blocks: where the table's width is cut, and a device's rows are many.

    Held whole, as on one device, the table is used whole: its logits are computed once.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    is_cut = any(shape[axis] > 1 for axis in WIDTH_AXES)
    return is_cut and unembedding.size // shape["tensor"] > loss_in_blocks.TABLE_AT_ONCE


def _local(
    objective: Objective,
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    with_gradients: bool,
    is_frozen: bool,
    on_mesh: bool = False,
    token_axes: tuple[str, ...] = (),
) -> Any:
    """One device's part: (objective sum, correct sum), and gradients of the first by hidden and unembedding if asked.

    Sums are those of all devices along `token_axes`. Behind them comes the loss sum, where it is not the objective's.
    The gradient by an unembedding that `is_frozen` is None.
    """
    of_products = objective.logits
    shape, (vocab_size, width) = hidden.shape, unembedding.shape
    hidden, targets, weights = hidden.reshape(-1, width), targets.reshape(-1), weights.reshape(-1)
    exact = precision(hidden.dtype)
    first_id = jax.lax.axis_index("tensor") * vocab_size if on_mesh else 0
    order, chunk, num_chunks = trained_first(weights, vocab_size)

    def add_chunk(i: jax.Array, carry: Any) -> Any:
        sums, gradients = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        x, target, weight = (array.at[at].get(mode="fill", fill_value=0) for array in (hidden, targets, weights))
        products = jnp.einsum("cd,vd->cv", x, unembedding, precision=exact, preferred_element_type=jnp.float32)
        softmax = _softmax(of_products(products, first_id=first_id), target, first_id, on_mesh=on_mesh)
        total = _over_vocabulary(logit_sum(softmax.logits), on_mesh=on_mesh) if objective.needs_logit_sum else None
        seen = Seen(softmax.maximum, softmax.normaliser, softmax.target_logit, total)
        is_right = _is_right(softmax, on_mesh=on_mesh)
        sums = tuple(map(operator.add, sums, sums_of(objective, seen, weight, is_right)))
        if with_gradients:
            of_logits = _gradient(objective, softmax, seen, weight) * of_products.slope(softmax.logits)
            gradients = _add_gradients(gradients, at, of_logits.astype(x.dtype), x, unembedding)
        return sums, gradients

    zero = jnp.zeros((), jnp.float32)
    of_table = None if is_frozen else jnp.zeros(unembedding.shape, jnp.float32)
    gradients = (jnp.zeros(hidden.shape, jnp.float32), of_table)
    carry = (zero,) * (2 if objective.loss.is_plain else 3), (gradients if with_gradients else ())
    sums, gradients = jax.lax.fori_loop(0, num_chunks, add_chunk, carry)
    if on_mesh:
        sums = jax.lax.psum(sums, token_axes)
    if not with_gradients:
        return sums
    hidden_gradient, unembedding_gradient = gradients
    if on_mesh:
        hidden_gradient = jax.lax.psum(hidden_gradient, "tensor")
    if on_mesh and not is_frozen:
        unembedding_gradient = jax.lax.psum_scatter(unembedding_gradient, WIDTH_AXES, scatter_dimension=1, tiled=True)
        copy_axes = tuple(axis for axis in token_axes if axis in COPY_AXES)
        unembedding_gradient = jax.lax.psum(unembedding_gradient, copy_axes)
    return sums, hidden_gradient.reshape(shape), unembedding_gradient


class _Softmax(NamedTuple):
    """What the loss of a chunk and its gradient have in common; C tokens, V rows of the vocabulary on this device."""

    logits: jax.Array
    """[C, V]."""
    maximum: jax.Array
    """[C], the largest logit of the whole vocabulary."""
    exponentials: jax.Array
    """[C, V], exp(logits - maximum)."""
    normaliser: jax.Array
    """[C], the sum of the exponentials over the whole vocabulary."""
    is_here: jax.Array
    """[C], whether the target is one of this device's rows."""
    local_target: jax.Array
    """[C], which of them; 0 where it is another device's."""
    target_logit: jax.Array
    """[C]."""


def _softmax(logits: jax.Array, target: jax.Array, first_id: jax.Array | int, *, on_mesh: bool) -> _Softmax:
    """Of logits [C, V] and targets [C]; column 0 of the logits is that of token `first_id`."""
    maximum = logits.max(axis=-1)
    if on_mesh:
        maximum = jax.lax.pmax(maximum, "tensor")
    exponentials = jnp.exp(logits - maximum[:, None])
    normaliser = _over_vocabulary(exponentials.sum(axis=-1), on_mesh=on_mesh)
    local_target = target - first_id
    is_here = (local_target >= 0) & (local_target < logits.shape[-1])
    local_target = jnp.where(is_here, local_target, 0)
    target_logit = jnp.take_along_axis(logits, local_target[:, None], axis=-1)[:, 0]
    target_logit = _over_vocabulary(jnp.where(is_here, target_logit, 0.0), on_mesh=on_mesh)
    return _Softmax(logits, maximum, exponentials, normaliser, is_here, local_target, target_logit)


def _over_vocabulary(x: jax.Array, *, on_mesh: bool) -> jax.Array:
    """The sum over the devices that hold parts of the vocabulary."""
    return jax.lax.psum(x, "tensor") if on_mesh else x


def _is_right(softmax: _Softmax, *, on_mesh: bool) -> jax.Array:
    """[C], whether the target alone has the largest logit: where all logits are equal, nothing was answered."""
    at_maximum = jnp.sum(softmax.logits == softmax.maximum[:, None], axis=-1)
    num_largest = _over_vocabulary(at_maximum, on_mesh=on_mesh)
    is_right = (softmax.target_logit == softmax.maximum) & (num_largest == 1)
    # Over devices, the maximum may have passed over a NaN, as it does on CPUs.
    return is_right & ~jnp.isnan(softmax.normaliser) if on_mesh else is_right


def _gradient(objective: Objective, softmax: _Softmax, seen: Seen, weight: jax.Array) -> jax.Array:
    """d (weight * objective) / d logits, [C, V]; of the loss: weight * (softmax(logits) - onehot(target))."""
    vocab_size = softmax.logits.shape[-1]
    onehot = (jnp.arange(vocab_size) == softmax.local_target[:, None]) & softmax.is_here[:, None]
    of_softmax, of_target, of_tokens = factors(objective, seen, weight)
    gradient = softmax.exponentials * (of_softmax / softmax.normaliser)[:, None] - of_target[:, None] * onehot
    return gradient if of_tokens is None else gradient - of_tokens[:, None] * is_token(softmax.logits)


def _add_gradients(gradients: Any, at: jax.Array, of_products: jax.Array, x: jax.Array, unembedding: jax.Array) -> Any:
    """Adds what a chunk gives, by the gradient of its products [C, V], to those by hidden and by the unembedding.

    `x` [C, D] stood at the positions `at` [C] of the flattened hidden states; each position is in one chunk only.
    """
    hidden_gradient, unembedding_gradient = gradients
    einsum = functools.partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    x_gradient = einsum("cv,vd->cd", of_products, unembedding)
    hidden_gradient = hidden_gradient.at[at].set(x_gradient, mode="drop", unique_indices=True)
    if unembedding_gradient is None:
        return hidden_gradient, None
    return hidden_gradient, unembedding_gradient + einsum("cv,cd->vd", of_products, x)
