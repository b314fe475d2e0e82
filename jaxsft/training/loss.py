"""Masked next-token loss, in chunks of trained tokens, without ever holding `[B, T, V]` logits.

In: final hidden states, the unembedding, targets and their weights. Out: sums only; the one division is in the step.
Rows may be cut over the mesh and the vocabulary over `tensor`; logits are never gathered.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsft.mesh import ROW_AXES, on_cpu, on_one_device, partition_spec
from jaxsft.model.layers import Logits, precision

LOGITS_PER_CHUNK = 2**25
"""Logits held at once by one device: 128 MiB in float32. On a CPU down to a quarter, for chunks of an eighth of the
tokens: matmuls of few positions are nearly as fast there, and of the last chunk less is wasted."""


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


@jax.named_scope("loss")
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
    loss_sum, correct_sum = _loss(logits, hidden, unembedding, targets, loss_weights)
    return LossSums(loss_sum, loss_weights.sum(), correct_sum, jnp.count_nonzero(loss_weights).astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(logits: Logits, *arrays: jax.Array) -> Any:
    return _over_mesh(logits, *arrays, with_gradients=False)


def _loss_forward(logits: Logits, *arrays: jax.Array) -> Any:
    hidden, unembedding, *_ = arrays
    sums, *gradients = _over_mesh(logits, *arrays, with_gradients=True)
    # Zero-sized stand-ins carry the dtypes that the cotangents must have.
    return sums, (*gradients, jnp.zeros(0, hidden.dtype), jnp.zeros(0, unembedding.dtype))


def _loss_backward(logits: Logits, residuals: Any, cotangents: Any) -> Any:
    hidden_gradient, unembedding_gradient, hidden_like, unembedding_like = residuals
    scale = cotangents[0]
    return (
        (scale * hidden_gradient).astype(hidden_like.dtype),
        (scale * unembedding_gradient).astype(unembedding_like.dtype),
        None,
        None,
    )


_loss.defvjp(_loss_forward, _loss_backward)


def _over_mesh(
    logits: Logits,
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    with_gradients: bool,
) -> Any:
    """Runs `_local` on each device's own tokens and vocabulary, and reduces once after the last chunk.

    Left to the partitioner, the reduction of the unembedding's gradient would sit inside the loop over chunks.
    """
    unembedding = unembedding.astype(hidden.dtype)
    if on_one_device():
        return _local(logits, hidden, unembedding, targets, weights, with_gradients=with_gradients, on_mesh=False)
    rows, hidden_spec, sums = partition_spec("b t"), partition_spec("b t d"), (PartitionSpec(), PartitionSpec())
    return jax.shard_map(
        functools.partial(_local, logits, with_gradients=with_gradients, on_mesh=True),
        in_specs=(hidden_spec, PartitionSpec("tensor", None), rows, rows),
        out_specs=(sums, hidden_spec, partition_spec("v d")) if with_gradients else sums,
        check_vma=False,
    )(hidden, unembedding, targets, weights)


def _local(
    of_products: Logits,
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    with_gradients: bool,
    on_mesh: bool,
) -> Any:
    """One device's part: (loss sum, correct sum), and their gradients by hidden and unembedding when asked for."""
    over_vocabulary = functools.partial(jax.lax.psum, axis_name="tensor") if on_mesh else lambda x: x
    shape, (vocab_size, width) = hidden.shape, unembedding.shape
    hidden, targets, weights = hidden.reshape(-1, width), targets.reshape(-1), weights.reshape(-1)
    num_tokens, exact = targets.size, precision(hidden.dtype)
    chunk = LOGITS_PER_CHUNK // vocab_size
    if on_cpu():
        chunk = min(chunk, max(chunk // 4, num_tokens // 8))
    chunk = min(num_tokens, max(128, chunk // 128 * 128))
    first_id = jax.lax.axis_index("tensor") * vocab_size if on_mesh else 0

    # Trained positions first: SFT trains a part of the tokens, and only the chunks that hold some are computed.
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -num_tokens % chunk), constant_values=num_tokens)
    num_chunks = -(-jnp.count_nonzero(weights) // chunk)

    def add_chunk(i: jax.Array, carry: Any) -> Any:
        (loss_sum, correct_sum), gradients = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        x, target, weight = (array.at[at].get(mode="fill", fill_value=0) for array in (hidden, targets, weights))
        products = jnp.einsum("cd,vd->cv", x, unembedding, precision=exact, preferred_element_type=jnp.float32)
        logits = of_products(products, first_id=first_id)
        maximum = logits.max(axis=-1)
        if on_mesh:
            maximum = jax.lax.pmax(maximum, "tensor")
        exponentials = jnp.exp(logits - maximum[:, None])
        normaliser = over_vocabulary(exponentials.sum(axis=-1))
        local_target = target - first_id
        is_here = (local_target >= 0) & (local_target < vocab_size)
        local_target = jnp.where(is_here, local_target, 0)
        target_logit = jnp.take_along_axis(logits, local_target[:, None], axis=-1)[:, 0]
        target_logit = over_vocabulary(jnp.where(is_here, target_logit, 0.0))
        nll = jnp.log(normaliser) + maximum - target_logit
        # A chunk is filled up with positions of weight 0, whose targets may be anything.
        loss_sum += jnp.sum(jnp.where(weight == 0, 0.0, weight * nll))
        # The target is right where it alone has the largest logit: where all are equal, nothing was answered.
        num_largest = over_vocabulary(jnp.sum(logits == maximum[:, None], axis=-1))
        correct_sum += jnp.sum(weight * ((target_logit == maximum) & (num_largest == 1)))
        if with_gradients:
            # d nll / d logits = softmax(logits) - onehot(target), times d logits / d products
            onehot = (jnp.arange(vocab_size) == local_target[:, None]) & is_here[:, None]
            logits_gradient = exponentials * (weight / normaliser)[:, None] - weight[:, None] * onehot
            logits_gradient = (logits_gradient * of_products.slope(logits)).astype(x.dtype)
            hidden_gradient, unembedding_gradient = gradients
            x_gradient = jnp.einsum(
                "cv,vd->cd", logits_gradient, unembedding, precision=exact, preferred_element_type=jnp.float32
            )
            hidden_gradient = hidden_gradient.at[at].set(x_gradient, mode="drop", unique_indices=True)
            unembedding_gradient += jnp.einsum(
                "cv,cd->vd", logits_gradient, x, precision=exact, preferred_element_type=jnp.float32
            )
            gradients = hidden_gradient, unembedding_gradient
        return (loss_sum, correct_sum), gradients

    zero = jnp.zeros((), jnp.float32)
    gradients = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(unembedding.shape, jnp.float32))
    carry = (zero, zero), (gradients if with_gradients else ())
    sums, gradients = jax.lax.fori_loop(0, num_chunks, add_chunk, carry)
    if on_mesh:
        sums = jax.lax.psum(sums, (*ROW_AXES, "context"))
    if not with_gradients:
        return sums
    hidden_gradient, unembedding_gradient = gradients
    if on_mesh:
        hidden_gradient = jax.lax.psum(hidden_gradient, "tensor")
        unembedding_gradient = jax.lax.psum_scatter(unembedding_gradient, "fsdp", scatter_dimension=1, tiled=True)
        unembedding_gradient = jax.lax.psum(unembedding_gradient, ("data", "expert", "context"))
    return sums, hidden_gradient.reshape(shape), unembedding_gradient
