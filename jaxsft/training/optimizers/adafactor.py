"""Adafactor: of a matrix, only the mean squares of its rows and of its columns are kept.

In: gradients with the axes of their parameters. Out: directions, and statistics whose axes are letters of the
parameter: of `"l d n h"`, rows `"l d"` and columns `"l n h"`. Rows are inputs, columns outputs, each layer and expert
by itself, so that no layer's update depends on another layer's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.optimizer import Optimizer, Weight, leafwise, with_decay
from jaxsft.training.optimizers.params import axes_without, matrix

DECAY_POWER = 0.8
LEAST_SQUARE = 1e-30
LARGEST_ROOT_MEAN_SQUARE = 1.0


class Factored(NamedTuple):
    """Mean squares of a weight that is a matrix, float32."""

    rows: Any
    columns: Any


def adafactor(config: OptimConfig) -> Optimizer:
    """Adafactor (Shazeer and Stern, 2018) at a given learning rate, as transformers' Trainer runs it.

    At step t, from 1, squares decay by 1 - t^-0.8. The direction is the gradient over the root of
    rows * columns / mean(rows), divided by its root mean square where that is above 1, plus decay. There is no first
    moment, and the learning rate is not multiplied by the size of the parameter.
    """
    return leafwise(
        config,
        scalars=lambda: jnp.zeros((), jnp.int32),
        next_scalars=lambda count, rate: count + 1,
        init=_init,
        update=_update,
    )


def _init(param: Any) -> Factored | nnx.Variable:
    def zeros(without: tuple[int, ...] = ()) -> nnx.Variable:
        shape = [size for dim, size in enumerate(param.shape) if dim not in without]
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes_without(param.get_metadata("axes"), without))

    found = matrix(param.get_metadata("axes"))
    return zeros() if found is None else Factored(rows=zeros(without=found[1]), columns=zeros(without=found[0]))


def _update(weight: Weight, old: Any, count: jax.Array) -> tuple[jax.Array, Any]:
    decay = 1.0 - count.astype(jnp.float32) ** -DECAY_POWER
    square, found = jnp.square(weight.gradient) + LEAST_SQUARE, matrix(weight.axes)
    if found is None:
        new: Any = decay * old + (1 - decay) * square
        direction = weight.gradient * jax.lax.rsqrt(new)
        dims = tuple(dim for dim, letter in enumerate(weight.axes.split()) if letter != "l")
    else:
        inputs, outputs = found
        rows = decay * old.rows + (1 - decay) * square.mean(outputs)
        columns = decay * old.columns + (1 - decay) * square.mean(inputs)
        new, dims = Factored(rows, columns), inputs + outputs
        rows, columns = jnp.expand_dims(rows, outputs), jnp.expand_dims(columns, inputs)
        shares = jax.lax.rsqrt(rows / rows.mean(inputs, keepdims=True)) * jax.lax.rsqrt(columns)
        direction = weight.gradient * shares
    root = jnp.sqrt(jnp.square(direction).mean(dims, keepdims=True))
    return with_decay(direction / jnp.maximum(1.0, root / LARGEST_ROOT_MEAN_SQUARE), weight.value, weight.decay), new
