"""Adafactor: of a matrix, only the mean squares of its rows and of its columns are kept.

In: gradients with the axes of their parameters. Out: directions, and statistics whose axes are letters of the
parameter: of `"l d n h"`, rows `"l d"` and columns `"l n h"`. Rows are inputs, columns outputs, each layer and expert
by itself, so that no layer's update depends on another layer's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.params import axes_without, by_path, decayed, matrix, replaced

DECAY_POWER = 0.8
LEAST_SQUARE = 1e-30
LARGEST_ROOT_MEAN_SQUARE = 1.0


class Factored(NamedTuple):
    """Of a weight that is a matrix."""

    rows: nnx.Variable
    columns: nnx.Variable


class AdafactorState(NamedTuple):
    """float32 throughout."""

    count: jax.Array
    """int32 scalar: steps that were taken."""
    squares: dict[str, Factored | nnx.Variable]
    """By the path of the parameter; whole where it is no matrix."""


def adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018) at a given learning rate, as transformers' Trainer runs it.

    At step t, from 1, squares decay by 1 - t^-0.8. The direction is the gradient over the root of
    rows * columns / mean(rows), divided by its root mean square where that is above 1, plus decay. There is no first
    moment, and the learning rate is not multiplied by the size of the parameter.
    """
    return optax.chain(optax.GradientTransformation(_init, _update), decayed(config))


def _init(params: Any) -> AdafactorState:
    def zeros(param: Any, without: tuple[int, ...] = ()) -> nnx.Variable:
        shape = [size for dim, size in enumerate(param.shape) if dim not in without]
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes_without(param.get_metadata("axes"), without))

    squares: dict[str, Factored | nnx.Variable] = {}
    for path, param in by_path(params).items():
        found = matrix(param.get_metadata("axes"))
        if found is None:
            squares[path] = zeros(param)
        else:
            inputs, outputs = found
            squares[path] = Factored(zeros(param, outputs), zeros(param, inputs))
    return AdafactorState(jnp.zeros((), jnp.int32), squares)


def _update(gradients: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
    count = state.count + 1
    decay = 1.0 - count.astype(jnp.float32) ** -DECAY_POWER
    directions, squares = {}, {}
    for path, gradient in by_path(gradients).items():
        axes, value = gradient.get_metadata("axes"), gradient.get_value()
        directions[path], squares[path] = _of_leaf(value, axes, state.squares[path], decay)
    return replaced(gradients, lambda path, _: directions[path]), AdafactorState(count, squares)


def _of_leaf(gradient: jax.Array, axes: str, old: Any, decay: jax.Array) -> tuple[jax.Array, Any]:
    square, found = jnp.square(gradient) + LEAST_SQUARE, matrix(axes)

    def moved(kept: nnx.Variable, new: jax.Array) -> nnx.Variable:
        return kept.replace(decay * kept.get_value() + (1 - decay) * new)

    if found is None:
        new: Any = moved(old, square)
        direction = gradient * jax.lax.rsqrt(new.get_value())
        clipped_over = tuple(dim for dim, letter in enumerate(axes.split()) if letter != "l")
    else:
        inputs, outputs = found
        new = Factored(moved(old.rows, square.mean(outputs)), moved(old.columns, square.mean(inputs)))
        rows, columns = (
            jnp.expand_dims(kept.get_value(), gone) for kept, gone in zip(new, (outputs, inputs), strict=True)
        )
        direction = gradient * jax.lax.rsqrt(rows / rows.mean(inputs, keepdims=True)) * jax.lax.rsqrt(columns)
        clipped_over = inputs + outputs
    root = jnp.sqrt(jnp.square(direction).mean(clipped_over, keepdims=True))
    return direction / jnp.maximum(1.0, root / LARGEST_ROOT_MEAN_SQUARE), new
