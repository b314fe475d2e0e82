"""What an optimizer is, and the two ways to make one: of an optax transformation, or of a function of one weight.

In: the section `optim`. Out: an `Optimizer`: the state to begin with, and two functions that the step calls, of which
one moves the parameters and the other the state, so that each can be written over what it was (`training/step.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.params import by_path, decays, matrix, rate_factors, replaced
from jaxsft.training.rounding import key_of, round_at_random


class Given(NamedTuple):
    """What a step gives to its optimizer."""

    summed: Any
    """float32 gradients of the loss sum, like the parameters; times `factor` they are those of the mean, clipped. The
    product is made where it is used, so that it is never written to memory."""
    factor: jax.Array
    learning_rate: jax.Array
    """float32 scalar, outside of all groups."""
    key: jax.Array
    """Of this step, for what is rounded at random."""
    weight_decay: ArrayLike | None = None
    """float32 scalar, outside of all groups; None: as the config has it, as a constant of the program."""


class Optimizer(NamedTuple):
    """An entry of the table of optimizers."""

    init: Callable[[Any], Any]
    """parameters -> the state before the first step."""
    move: Callable[[Given, Any, Any], Any]
    """(given, state, parameters) -> the parameters after the step."""
    advance: Callable[[Given, Any, Any], Any]
    """(given, state, parameters) -> the state after the step, of the state and the parameters before it."""


def by_optax(config: OptimConfig, transformation: optax.GradientTransformation) -> Optimizer:
    """An optimizer of a transformation of gradients into directions of steepest ascent, without rate and decay.

    Its moments are kept in `config.moment_dtype`; the decay of each parameter is added to its direction.
    """
    inner = optax.chain(_with_moment_dtype(transformation, jnp.dtype(config.moment_dtype)), _decayed(config))

    def update(given: Given, state: Any, params: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda g: g * given.factor, given.summed)
        return inner.update(gradients, state, params, weight_decay=_usual_decay(config, given))

    def move(given: Given, state: Any, params: Any) -> Any:
        directions, factors = by_path(update(given, state, params)[0]), by_path(rate_factors(config, params))

        def of_leaf(path: str, param: Any) -> jax.Array:
            rate = _rate(given, factors[path].get_value())
            return _stepped(config, param.get_value(), rate, directions[path].get_value(), key_of(given.key, path))

        return replaced(params, of_leaf)

    return Optimizer(inner.init, move, lambda given, state, params: update(given, state, params)[1])


class Weight(NamedTuple):
    """What a leafwise optimizer is told of a parameter, or of one layer of it."""

    axes: str
    """Letters of the dims of `value`."""
    value: jax.Array
    gradient: jax.Array
    """float32."""
    rate: jax.Array
    """Its learning rate."""
    decay: Any
    """A number, a float32 scalar, or None: no decay."""


class LeafwiseState(NamedTuple):
    """The state of an optimizer that treats each parameter by itself."""

    scalars: Any
    leaves: dict[str, Any]
    """By the path of the parameter: a pytree of Variables, those of stacked layers with `l` first."""


def leafwise(
    config: OptimConfig,
    *,
    scalars: Callable[[], Any],
    next_scalars: Callable[[Any, jax.Array], Any],
    init: Callable[[Any], Any],
    update: Callable[[Weight, Any, Any], tuple[jax.Array, Any]],
) -> Optimizer:
    """An optimizer of a function of one weight. What is held besides the state is of one layer of one matrix.

    Args:
        config: decay and groups.
        scalars: what is counted, before the first step.
        next_scalars: the same after a step, of what it was and the learning rate.
        init: the state of a parameter, from its Variable.
        update: (weight, its state as arrays, next scalars) -> its direction, decay included, and its next state. It is
            given whole parameters, and of matrices stacked over layers one layer, `l` taken off the axes.
    """

    def first(params: Any) -> LeafwiseState:
        return LeafwiseState(scalars(), {path: init(param) for path, param in by_path(params).items()})

    def weights(given: Given, params: Any) -> dict[str, Callable[[Any, Any], Weight]]:
        all_decays, factors = (
            by_path(decays(config, params, usual=_usual_decay(config, given))),
            by_path(rate_factors(config, params)),
        )

        def weight_of(path: str, axes: str) -> Callable[[Any, Any], Weight]:
            rate, decay = _rate(given, factors[path].get_value()), all_decays[path].get_value()
            return lambda value, summed: Weight(axes, value, summed * given.factor, rate, decay)

        return {path: weight_of(path, _looped_axes(param)) for path, param in by_path(params).items()}

    def move(given: Given, state: LeafwiseState, params: Any) -> Any:
        gradients, weight_of = by_path(given.summed), weights(given, params)
        counted = next_scalars(state.scalars, given.learning_rate)

        def of_leaf(path: str, param: Any) -> jax.Array:
            def of_layer(layer: Any, value: jax.Array, summed: jax.Array, kept: Any) -> jax.Array:
                weight = weight_of[path](value, summed)
                key = jax.random.fold_in(key_of(given.key, path), layer)
                return _stepped(config, value, weight.rate, update(weight, kept, counted)[0], key)

            summed, kept = gradients[path].get_value(), _arrays(state.leaves[path])
            return _over_layers(of_layer, param, param.get_value(), summed, kept)

        return replaced(params, of_leaf)

    def advance(given: Given, state: LeafwiseState, params: Any) -> LeafwiseState:
        gradients, weight_of = by_path(given.summed), weights(given, params)
        counted, leaves = next_scalars(state.scalars, given.learning_rate), {}
        for path, param in by_path(params).items():

            def of_layer(layer: Any, kept: Any, value: jax.Array, summed: jax.Array, path: str = path) -> Any:
                return update(weight_of[path](value, summed), kept, counted)[1]

            summed, old = gradients[path].get_value(), state.leaves[path]
            new = _over_layers(of_layer, param, _arrays(old), param.get_value(), summed)
            leaves[path] = jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(new))
        return LeafwiseState(counted, leaves)

    return Optimizer(first, move, advance)


def _over_layers(function: Callable[..., Any], param: Any, kept: Any, *others: Any) -> Any:
    """`function(layer, kept, *others)` in the place of `kept`: of all at once, or, of stacked matrices, one by one.

    The loop writes each layer over what it was.
    """
    if _looped_axes(param) == param.get_metadata("axes"):
        return function(0, kept, *others)

    def of_layer(layer: jax.Array, kept: Any) -> Any:
        args = [jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), x) for x in (kept, *others)]
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0),
            kept,
            function(layer, *args),
        )

    return jax.lax.fori_loop(0, param.shape[0], of_layer, kept)


def _looped_axes(param: Any) -> str:
    """The axes of what `update` is given of a parameter."""
    axes = param.get_metadata("axes")
    return axes[2:] if axes.startswith("l ") and matrix(axes) is not None else axes


def _arrays(state: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.get_value(), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _rate(given: Given, factor: float) -> jax.Array:
    return given.learning_rate if factor == 1 else given.learning_rate * factor


def _stepped(config: OptimConfig, old: jax.Array, rate: jax.Array, direction: jax.Array, key: jax.Array) -> jax.Array:
    """A parameter minus rate times direction, computed in float32 and rounded once to its dtype."""
    new = old.astype(jnp.float32) - rate * direction
    if config.stochastic_rounding and old.dtype == jnp.bfloat16:
        return round_at_random(new, key)
    return new.astype(old.dtype)


def with_decay(direction: jax.Array, param: jax.Array, decay: Any) -> jax.Array:
    """The direction of one parameter plus its decay times the parameter, in float32."""
    return direction if decay is None else direction + decay * param.astype(jnp.float32)


def _usual_decay(config: OptimConfig, given: Given) -> Any:
    return config.weight_decay if given.weight_decay is None else given.weight_decay


def _decayed(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    def update(directions: Any, state: Any, params: Any, *, weight_decay: Any) -> Any:
        values, all_decays = by_path(params), by_path(decays(config, params, usual=weight_decay))

        def of_leaf(path: str, direction: Any) -> jax.Array:
            return with_decay(direction.get_value(), values[path].get_value(), all_decays[path].get_value())

        return replaced(directions, of_leaf), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _with_moment_dtype(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Keeps float moments in `dtype`, and computes with them in float32 (optax lets only the first one be chosen)."""

    def cast(tree: Any, to: jnp.dtype) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(updates, cast(state, jnp.dtype(jnp.float32)), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
