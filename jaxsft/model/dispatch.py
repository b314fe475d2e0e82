"""Tokens to their experts and back: choices in blocks of one expert each, forward and backward, on any mesh.

In: tokens, the experts that each has chosen, with scores. Out: the scored sum of these experts' outputs.

Nothing is dropped and nothing has a capacity. Choices are sorted by expert and cut into blocks of one expert each; a
loop runs as many blocks as the choices fill, each a few plain matmuls, and its gradients are computed by a second such
loop. So work and memory go by what was chosen, on every kind of device. `jax.lax.ragged_dot` has that in the forward
pass on TPUs; XLA multiplies every choice by every expert in its weight gradients there, and in all of it on CPUs and
on GPUs (jax 0.10.2).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.mesh import COPY_AXES, DIM_AXES, cut_axes, free_axes, partition_spec
from jaxsft.model.products import cast, precision
from jaxsft.model.quantized import QuantizedExperts

MAX_BLOCK = 512
"""Rows of a block at most: enough for a matmul to hide the reading of its weights."""
MIN_BLOCK = 8

WEIGHTS_AT_ONCE = 2**25
"""Numbers of the experts' weights that are gathered at once, where their width is cut: 64 MiB in bfloat16, and 128 MiB
for their gradients in float32. Larger experts are gathered one by one."""

Gating = Callable[[jax.Array, jax.Array], jax.Array]
"""(gate, up) -> what the down projection is given, elementwise."""


class ExpertWeights(NamedTuple):
    """The weights of all experts in their stored dtype, or quantised, of one layer."""

    gate: Any
    """[E, D, F], as is `up`: a jax.Array or `QuantizedExperts`."""
    up: Any
    down: Any
    """[E, F, D]"""
    gate_bias: jax.Array | None
    """[E, F], as is `up_bias`; None where the experts have no biases."""
    up_bias: jax.Array | None
    down_bias: jax.Array | None
    """[E, D]"""
    gate_a: jax.Array | None = None
    """[E, D, R], as is `up_a`: adapters, scaled, of the maps that have one; their own weights have no gradient then."""
    gate_b: jax.Array | None = None
    """[E, R, F], as is `up_b`."""
    up_a: jax.Array | None = None
    up_b: jax.Array | None = None
    down_a: jax.Array | None = None
    """[E, F, R]"""
    down_b: jax.Array | None = None
    """[E, R, D]"""


WEIGHT_AXES = (
    *("e d f", "e d f", "e f d", "e f", "e f", "e d"),
    *("e d r", "e r f", "e d r", "e r f", "e f r", "e r d"),
)

WIDTH_AXES = cut_axes("e d")[1]
"""Those that cut the width of the weights."""


def _map_weights(f: Callable, *trees: Any) -> ExpertWeights:
    """`f(axes, *weights)` of each weight that there is."""
    parts: list[Any] = [
        None if each[0] is None else f(axes, *each) for axes, *each in zip(WEIGHT_AXES, *trees, strict=True)
    ]
    return ExpertWeights(*parts)


def experts_of_tokens(
    x: jax.Array,
    chosen: jax.Array,
    scores: jax.Array,
    weights: ExpertWeights,
    *,
    gating: Gating,
    is_trained: tuple[bool, ...] = (True,) * 6,
) -> jax.Array:
    """The weighted sum over each token's chosen experts, added up in float32 and cast back once.

    On a mesh each device computes the experts that it holds, for the tokens of all devices along `expert`: these are
    gathered, and the sums scattered back. (Sending each token only to where it is needed is less to send where top_k
    is below the size of that axis, but needs room for the case that all tokens choose the experts of one device.)

    Args:
        x: [B, T, D].
        chosen: int32 [B, T, top_k], no expert twice for a token; E stands for none.
        scores: float32 [B, T, top_k].
        weights: of all experts.
        gating: see `Gating`.
        is_trained: of gate, up, down and their biases, whether a gradient is made; by adapters it always is.
    """
    return _experts(_Kind(gating, is_trained), (x, chosen, scores, weights))


def fill_up(x: jax.Array, is_token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, T, D] and is_token [B, T] with padding until the mesh cuts them evenly.

    Batches of training are; a few rows or a single position, as in generation, need not be.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x, is_token
    fill = [
        (0, -size % math.prod(mesh.shape[axis] for axis in free_axes(DIM_AXES[letter])))
        for letter, size in zip("bt", is_token.shape, strict=True)
    ]
    return jnp.pad(x, (*fill, (0, 0))), jnp.pad(is_token, fill)


def choose(probabilities: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The largest [B, T, top_k] of probabilities [B, T, E], and whose they are; of equal ones, the first."""

    def local(probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(probabilities, top_k)
        return values, ids

    if jax.sharding.get_abstract_mesh().empty:
        return local(probabilities)
    # Left to the partitioner, the probabilities of all tokens would be gathered on every device.
    tokens = partition_spec("b t d")
    return jax.shard_map(local, in_specs=tokens, out_specs=(tokens, tokens))(probabilities)


def choose_by(preferences: jax.Array, scores: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The scores [B, T, top_k] of those that are preferred most, and whose they are; `choose` prefers by scores.

    Args:
        preferences: [B, T, E]; no gradient goes through them.
        scores: [B, T, E].
        top_k: how many are chosen.
    """

    def local(preferences: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = jax.lax.top_k(preferences, top_k)[1]
        return jnp.take_along_axis(scores, ids, axis=-1), ids

    preferences = jax.lax.stop_gradient(preferences)
    if jax.sharding.get_abstract_mesh().empty:
        return local(preferences, scores)
    tokens = partition_spec("b t d")
    return jax.shard_map(local, in_specs=(tokens, tokens), out_specs=(tokens, tokens))(preferences, scores)


Inputs = tuple[jax.Array, jax.Array, jax.Array, ExpertWeights]
"""x, chosen, scores and weights."""


class _Kind(NamedTuple):
    """What is known when a program is traced."""

    gating: Gating
    is_trained: tuple[bool, ...]

    def trained(self, weights: Any) -> ExpertWeights:
        """Those that have a gradient; None in place of the others."""
        own = [each if wanted else None for each, wanted in zip(weights[:6], self.is_trained, strict=True)]
        return ExpertWeights(*[*own, *weights[6:]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(kind: _Kind, inputs: Inputs) -> jax.Array:
    return _over_mesh(functools.partial(_local, kind.gating), inputs, kind)


def _experts_forward(kind: _Kind, inputs: Inputs) -> tuple[jax.Array, Inputs]:
    return _experts(kind, inputs), inputs


def _experts_backward(kind: _Kind, inputs: Inputs, y_gradient: jax.Array) -> Any:
    local = functools.partial(_local_gradients, kind, free_axes(COPY_AXES))
    x_gradient, scores_gradient, weights_gradient = _over_mesh(local, inputs, kind, y_gradient)
    return ((x_gradient, None, scores_gradient, weights_gradient),)


_experts.defvjp(_experts_forward, _experts_backward)


def _over_mesh(local: Callable, inputs: Inputs, kind: _Kind, y_gradient: jax.Array | None = None) -> Any:
    """Runs `local` on each device's own experts, with the tokens of all that share them."""
    after = inputs[0] if y_gradient is None else y_gradient
    weights = _map_weights(
        lambda _, weight: weight.after(after, "b t d") if isinstance(weight, QuantizedExperts) else weight, inputs[-1]
    )
    arrays = (*inputs[:3], weights) if y_gradient is None else (*inputs[:3], weights, y_gradient)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays, on_mesh=False)
    tokens = partition_spec("b t d")
    weight_specs = _map_weights(
        lambda axes, weight: weight.specs() if isinstance(weight, QuantizedExperts) else partition_spec(axes), weights
    )
    in_specs: tuple[Any, ...] = (tokens, tokens, tokens, weight_specs)
    if y_gradient is None:
        out_specs: Any = tokens
    else:
        in_specs += (tokens,)
        out_specs = (tokens, tokens, kind.trained(weight_specs))
    return jax.shard_map(
        functools.partial(local, on_mesh=True), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*arrays)


def _local(
    gating: Gating, x: jax.Array, chosen: jax.Array, scores: jax.Array, weights: ExpertWeights, *, on_mesh: bool
) -> jax.Array:
    """One device's part of the forward pass."""
    shape, num_tokens = x.shape, x.shape[0] * x.shape[1]
    x, chosen, scores = _gather(x, chosen, scores, weights, on_mesh=on_mesh)
    plan = make_plan(chosen, weights.gate.shape[0], axis_size=x.shape[0] // num_tokens)

    def add_group(group: _Group, y: jax.Array) -> jax.Array:
        def add_block(i: jax.Array, y: jax.Array) -> jax.Array:
            expert, token, choice = block_of(plan, i)
            of_expert = _select(group.maps, expert - group.start)
            down = _down(gating(*_gate_and_up(of_expert, _rows(x, token))).astype(x.dtype), of_expert)
            score = scores.reshape(-1).at[choice].get(mode="fill", fill_value=0)
            return y.at[token].add(score[:, None] * down, mode="drop", unique_indices=True)

        return jax.lax.fori_loop(group.first_block, group.end_block, add_block, y)

    y = _over_groups(add_group, jnp.zeros(x.shape, jnp.float32), weights, plan, x.dtype, on_mesh=on_mesh)
    return _scatter(y, on_mesh=on_mesh).reshape(shape).astype(x.dtype)


def _local_gradients(
    kind: _Kind,
    copy_axes: tuple[str, ...],
    x: jax.Array,
    chosen: jax.Array,
    scores: jax.Array,
    weights: ExpertWeights,
    y_gradient: jax.Array,
    *,
    on_mesh: bool,
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """One device's part of the backward pass: gradients by x, scores and weights; gate and up are computed again.

    Those by weights are sums over all devices along `copy_axes` and those that cut the width.
    """
    shapes, num_tokens, dtype = (x.shape, scores.shape), x.shape[0] * x.shape[1], x.dtype
    x, chosen, scores = _gather(x, chosen, scores, weights, on_mesh=on_mesh)
    y_gradient = _gather_tokens(y_gradient, on_mesh=on_mesh)
    plan = make_plan(chosen, weights.gate.shape[0], axis_size=x.shape[0] // num_tokens)

    def add_group(group: _Group, carry: Any) -> Any:
        def add_block(i: jax.Array, carry: Any) -> Any:
            x_gradient, scores_gradient, sums = carry
            expert, token, choice = block_of(plan, i)
            of_expert = _select(group.maps, expert - group.start)
            rows, row_gradient = _rows(x, token), _rows(y_gradient, token)
            score = scores.reshape(-1).at[choice].get(mode="fill", fill_value=0)[:, None]
            of_rows, score_gradient, parts = _block_gradients(kind, of_expert, rows, score, row_gradient)
            return (
                x_gradient.at[token].add(of_rows, mode="drop", unique_indices=True),
                scores_gradient.at[choice].set(score_gradient, mode="drop", unique_indices=True),
                jax.tree.map(lambda total, part: total.at[expert - group.start].add(part), sums, parts),
            )

        x_gradient, scores_gradient, weights_gradient = carry
        nothing = jax.tree.map(lambda each: jnp.zeros(each.shape, jnp.float32), kind.trained(group.maps))
        carry = x_gradient, scores_gradient, nothing
        carry = jax.lax.fori_loop(group.first_block, group.end_block, add_block, carry)
        x_gradient, scores_gradient, sums = carry
        if on_mesh:
            sums = _map_weights(functools.partial(_reduce_over_rows, copy_axes), sums)
        return x_gradient, scores_gradient, _put(weights_gradient, sums, group.start)

    of_tokens = jnp.zeros(x.shape, jnp.float32), jnp.zeros(scores.size, jnp.float32)
    carry = *of_tokens, jax.tree.map(jnp.zeros_like, kind.trained(weights))
    gradients = _over_groups(add_group, carry, weights, plan, dtype, on_mesh=on_mesh)
    x_gradient, scores_gradient, weights_gradient = gradients
    scores_gradient = scores_gradient.reshape(scores.shape)
    x_gradient, scores_gradient = (_scatter(each, on_mesh=on_mesh) for each in (x_gradient, scores_gradient))
    return x_gradient.reshape(shapes[0]).astype(dtype), scores_gradient.reshape(shapes[1]), weights_gradient


_Parts = tuple[jax.Array | None, jax.Array | None]


def _block_gradients(
    kind: _Kind, of_expert: ExpertWeights, rows: jax.Array, score: jax.Array, row_gradient: jax.Array
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """What a block gives: gradients by its rows [C, D], by their scores [C], and by the weights of its expert."""
    dtype, matmul = rows.dtype, _matmul(rows.dtype)
    inner, gating_gradient = jax.vjp(kind.gating, *_gate_and_up(of_expert, rows))

    # y = score * (inner @ down + bias), so that its gradient by the score needs no second down projection.
    inner_gradient = matmul("cd,fd->cf", row_gradient, of_expert.down)
    scored = score * row_gradient
    down_parts: _Parts = (None, None)
    up_parts: _Parts = (None, None)
    gate_parts: _Parts = (None, None)
    if of_expert.down_a is not None and of_expert.down_b is not None:
        by_low = matmul("cd,rd->cr", row_gradient, of_expert.down_b)
        inner_gradient += matmul("cr,fr->cf", by_low.astype(dtype), of_expert.down_a)
        down_parts = _adapter_gradients(of_expert.down_a, inner.astype(dtype), score * by_low, scored.astype(dtype))
    score_gradient = jnp.sum(inner * inner_gradient, axis=-1)
    if of_expert.down_bias is not None:
        score_gradient += jnp.sum(row_gradient * of_expert.down_bias, axis=-1)
    gate_gradient, up_gradient = (each.astype(dtype) for each in gating_gradient(score * inner_gradient))
    of_rows = matmul("cf,df->cd", gate_gradient, of_expert.gate)
    of_rows += matmul("cf,df->cd", up_gradient, of_expert.up)
    if of_expert.gate_a is not None and of_expert.gate_b is not None:
        by_low = matmul("cf,rf->cr", gate_gradient, of_expert.gate_b)
        of_rows += matmul("cr,dr->cd", by_low.astype(dtype), of_expert.gate_a)
        gate_parts = _adapter_gradients(of_expert.gate_a, rows, by_low, gate_gradient)
    if of_expert.up_a is not None and of_expert.up_b is not None:
        by_low = matmul("cf,rf->cr", up_gradient, of_expert.up_b)
        of_rows += matmul("cr,dr->cd", by_low.astype(dtype), of_expert.up_a)
        up_parts = _adapter_gradients(of_expert.up_a, rows, by_low, up_gradient)
    makers: tuple[Callable[[], jax.Array], ...] = (
        lambda: matmul("cd,cf->df", rows, gate_gradient),
        lambda: matmul("cd,cf->df", rows, up_gradient),
        lambda: matmul("cf,cd->fd", inner.astype(dtype), scored.astype(dtype)),
        lambda: gate_gradient.sum(axis=0, dtype=jnp.float32),
        lambda: up_gradient.sum(axis=0, dtype=jnp.float32),
        lambda: scored.sum(axis=0, dtype=jnp.float32),
    )
    own = [None if each is None else make() for each, make in zip(kind.trained(of_expert)[:6], makers, strict=True)]
    return of_rows, score_gradient, ExpertWeights(*[*own, *gate_parts, *up_parts, *down_parts])


def _adapter_gradients(
    a: jax.Array, inputs: jax.Array, by_low: jax.Array, by_outputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """By A and by B, of `inputs` [C, I] @ A @ B, from the gradients by `inputs` @ A [C, R] and by all of it [C, O]."""
    matmul, dtype = _matmul(inputs.dtype), inputs.dtype
    low = matmul("ci,ir->cr", inputs, a).astype(dtype)
    return matmul("ci,cr->ir", inputs, by_low.astype(dtype)), matmul("cr,co->ro", low, by_outputs)


def _matmul(dtype: jnp.dtype) -> Callable:
    return functools.partial(jnp.einsum, precision=precision(dtype), preferred_element_type=jnp.float32)


def _put(weights: ExpertWeights, some: ExpertWeights, start: jax.Array) -> ExpertWeights:
    """Weights of which some are those of the experts from `start` on."""

    def put(weight: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(weight, part.astype(weight.dtype), start, 0)

    return jax.tree.map(put, weights, some)


def _gate_and_up(of_expert: ExpertWeights, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [C, F] each."""
    gate = _mapped(rows, of_expert.gate, of_expert.gate_bias, of_expert.gate_a, of_expert.gate_b)
    return gate, _mapped(rows, of_expert.up, of_expert.up_bias, of_expert.up_a, of_expert.up_b)


def _down(inner: jax.Array, of_expert: ExpertWeights) -> jax.Array:
    """float32 [C, D]."""
    return _mapped(inner, of_expert.down, of_expert.down_bias, of_expert.down_a, of_expert.down_b)


def _mapped(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, a: jax.Array | None, b: jax.Array | None
) -> jax.Array:
    """float32 [C, O] of x [C, I]: `x weight + x A B + bias`."""
    matmul = _matmul(x.dtype)
    y = matmul("ci,io->co", x, weight)
    if a is not None and b is not None:
        y += matmul("cr,ro->co", matmul("ci,ir->cr", x, a).astype(x.dtype), b)
    return y if bias is None else y + bias


def _select(maps: ExpertWeights, expert: jax.Array) -> ExpertWeights:
    return jax.tree.map(lambda each: jax.lax.dynamic_index_in_dim(each, expert, keepdims=False), maps)


def _rows(x: jax.Array, token: jax.Array) -> jax.Array:
    return x.at[token].get(mode="fill", fill_value=0)


# What goes where over the mesh.


def _gather(
    x: jax.Array, chosen: jax.Array, scores: jax.Array, weights: ExpertWeights, *, on_mesh: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [M, ...] of all devices along `expert`, what they chose in numbers of this device's experts from 0 on."""
    x, chosen, scores = (_gather_tokens(each, on_mesh=on_mesh) for each in (x, chosen, scores))
    if not on_mesh:
        return x, chosen, scores
    num_local = weights.gate.shape[0]
    local = chosen - jax.lax.axis_index("expert") * num_local
    return x, jnp.where((local >= 0) & (local < num_local), local, num_local), scores


class _Group(NamedTuple):
    """Experts of this device that are worked with together, and their blocks."""

    maps: ExpertWeights
    """In all their width."""
    start: jax.Array
    """int32 []: the first of them."""
    first_block: jax.Array
    end_block: jax.Array


def _over_groups(
    add: Callable, carry: Any, weights: ExpertWeights, plan: "Plan", dtype: jnp.dtype, *, on_mesh: bool
) -> Any:
    """`add(group, carry)` of each group of experts in turn.

    Every device takes part in what is gathered, so groups are equally many and large everywhere.
    """
    num_experts = weights.gate.shape[0]
    count = _group_size(weights) if on_mesh else num_experts
    ends = jnp.concatenate([jnp.zeros_like(plan.block_ends, shape=1), plan.block_ends])

    def add_group(number: jax.Array | int, carry: Any) -> Any:
        start = jnp.asarray(number * count)
        some = jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, start, count), weights)
        return add(_Group(_whole(some, dtype, on_mesh=on_mesh), start, ends[start], ends[start + count]), carry)

    if count == num_experts:
        return add_group(0, carry)
    return jax.lax.fori_loop(0, num_experts // count, add_group, carry)


def _group_size(weights: ExpertWeights) -> int:
    """How many of this device's experts are gathered at once: all where they are small, or not cut by their width."""
    num_experts, sizes = weights.gate.shape[0], jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes[axis] for axis in WIDTH_AXES)
    if ways == 1:
        return num_experts
    numbers = ways * (weights.gate.size + weights.up.size + weights.down.size)
    most = max(WEIGHTS_AT_ONCE * num_experts // numbers, 1)
    return max(size for size in range(1, num_experts + 1) if num_experts % size == 0 and size <= most)


def _whole(weights: ExpertWeights, dtype: jnp.dtype, *, on_mesh: bool) -> ExpertWeights:
    """Weights in the dtype of the matmuls, and biases, gathered over the devices that cut their width."""
    biases, over = weights[3:6], WIDTH_AXES if on_mesh else ()

    def in_dtype(weight: jax.Array | QuantizedExperts | None) -> jax.Array | None:
        if isinstance(weight, QuantizedExperts):
            return weight.numbers(dtype, over=over)
        return None if weight is None else cast(weight, dtype)

    is_whole = [isinstance(each, QuantizedExperts) for each in weights]
    maps = ExpertWeights(*map(in_dtype, weights))
    maps = ExpertWeights(*maps[:3], *biases, *maps[6:])
    if not on_mesh:
        return maps

    def gather(axes: str, weight: jax.Array, is_whole: bool) -> jax.Array:
        letters = axes.split()
        if is_whole or "d" not in letters:
            return weight
        return jax.lax.all_gather(weight, WIDTH_AXES, axis=letters.index("d"), tiled=True)

    maps = _map_weights(gather, maps, is_whole)
    if maps.down_bias is None:
        return maps
    # The parts of F are summed up over `tensor`; the bias belongs to one of them.
    return maps._replace(down_bias=jnp.where(jax.lax.axis_index("tensor") == 0, maps.down_bias, 0))


def _gather_tokens(each: jax.Array, *, on_mesh: bool) -> jax.Array:
    """[B, T, ...] -> [M, ...]"""
    each = each.reshape(-1, each.shape[-1])
    return jax.lax.all_gather(each, "expert", axis=0, tiled=True) if on_mesh else each


def _scatter(each: jax.Array, *, on_mesh: bool) -> jax.Array:
    """The other way: sums over all experts and all of F, of this device's tokens."""
    if not on_mesh:
        return each
    return jax.lax.psum(jax.lax.psum_scatter(each, "expert", scatter_dimension=0, tiled=True), "tensor")


def _reduce_over_rows(copy_axes: tuple[str, ...], axes: str, gradient: jax.Array) -> jax.Array:
    """The gradient of a weight, summed over all rows and cut by its width as the weight is."""
    letters = axes.split()
    if "d" in letters:
        gradient = jax.lax.psum_scatter(gradient, WIDTH_AXES, scatter_dimension=letters.index("d"), tiled=True)
    else:
        gradient = jax.lax.psum(gradient, WIDTH_AXES)
    if "r" in letters and "f" not in letters:
        gradient = jax.lax.psum(gradient, "tensor")  # each device there has it by its own part of F
    return jax.lax.psum(gradient, copy_axes)


# Choices in blocks.


class Plan(NamedTuple):
    """Choices sorted by expert, those of each expert cut into blocks of C (the last one may be filled in part)."""

    order: jax.Array
    """int32 [M * top_k]: choices (m * top_k + i) by expert."""
    starts: jax.Array
    """int32 [E]: where the choices of an expert begin in `order`."""
    counts: jax.Array
    """int32 [E]"""
    block_ends: jax.Array
    """int32 [E]: number of blocks of this expert and those before it."""
    top_k: int
    block_size: int

    @property
    def num_blocks(self) -> jax.Array:
        return self.block_ends[-1]


def make_plan(chosen: jax.Array, num_experts: int, *, axis_size: int = 1) -> Plan:
    """The plan of choices int32 [M, top_k] among `num_experts` here, of `axis_size` times as many in all; E is none.

    Worked example: 3 tokens that choose experts (0, 2), (2, 3), (2, 0) of 3 (3 is none), in blocks of 2:
    order 0 5 1 2 4 3, starts 0 2 2, counts 2 0 3, block_ends 1 1 3.
    """
    chosen, top_k = chosen.reshape(-1), chosen.shape[-1]
    block_size = block_rows(chosen.size, num_experts * axis_size)
    order = jnp.argsort(chosen, stable=True)
    bounds = jnp.searchsorted(chosen[order], jnp.arange(num_experts + 1))
    counts = jnp.diff(bounds)
    return Plan(
        order=order,
        starts=bounds[:-1],
        counts=counts,
        block_ends=jnp.cumsum(-(-counts // block_size)),
        top_k=top_k,
        block_size=block_size,
    )


def block_rows(num_choices: int, num_experts: int) -> int:
    """C for so many choices among so many experts.

    Half of a block is empty per expert on average: a quarter of the work at most where choices are even.
    """
    return min(MAX_BLOCK, max(MIN_BLOCK, 2 ** ((num_choices // num_experts // 2).bit_length() - 1)))


def block_of(plan: Plan, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(expert [], tokens [C], choices [C]) of block i; tokens and choices beyond the last are out of range."""
    expert = jnp.searchsorted(plan.block_ends, i, side="right")
    count, slots = plan.counts[expert], jnp.arange(plan.block_size)
    num_before = plan.block_ends[expert] - -(-count // plan.block_size)
    at = (i - num_before) * plan.block_size + slots
    beyond = plan.order.size + slots  # all different, since the scatter is promised unique indices
    choice = jnp.where(at < count, plan.order[plan.starts[expert] + at], beyond)
    return expert, jnp.where(at < count, choice // plan.top_k, beyond), choice
