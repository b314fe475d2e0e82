"""Schedule-free AdamW: gradients are taken at one point, and the model is the average of another.

In: gradients at the parameters, which are y. Out: directions of y, and a state with z, the sequence that AdamW moves.
The model that is evaluated and exported is x, the average of z; y = (1 - beta1) z + beta1 x, so x is kept in the two.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.optimizer import LeafwiseState, Optimizer, Weight, leafwise, with_decay
from jaxsft.training.optimizers.params import replaced


class Averaging(NamedTuple):
    """What is counted."""

    num_steps: jax.Array
    """int32: steps that were taken."""
    weight_sum: jax.Array
    """float32: of the weights of all steps, the squares of the largest learning rates so far."""
    largest_rate: jax.Array
    """float32: the largest learning rate so far."""


class ScheduleFree(NamedTuple):
    """Of a parameter."""

    z: Any
    """float32."""
    second: Any
    """The second moment."""


def schedule_free_adamw(config: OptimConfig) -> Optimizer:
    """Schedule-free AdamW (Defazio et al., 2024, arXiv 2405.15682), as in the authors' AdamWScheduleFree.

    With u the gradient at y over the root of the corrected second moment, plus decay times y, and rate r:
    z' = z - r u, and x' = (1 - c) x + c z', where c is the largest rate so far, squared, over the sum of such squares.
    From y' = (1 - beta1) z' + beta1 x' follows y' = y - r ((1 - beta1 (1 - c)) u + c / r (y - z)).
    """
    dtype = jnp.dtype(config.moment_dtype)

    def init(param: Any) -> ScheduleFree:
        # Of float32 parameters as well a copy: z parts from y at the second step.
        return ScheduleFree(
            param.replace(param.get_value().astype(jnp.float32)), param.replace(jnp.zeros(param.shape, dtype))
        )

    def update(weight: Weight, old: ScheduleFree, counted: Averaging) -> tuple[jax.Array, ScheduleFree]:
        second = config.beta2 * old.second.astype(jnp.float32) + (1 - config.beta2) * jnp.square(weight.gradient)
        corrected = second / (1 - config.beta2 ** counted.num_steps.astype(jnp.float32))
        u = with_decay(weight.gradient / (jnp.sqrt(corrected) + config.epsilon), weight.value, weight.decay)
        # A rate of 0, as after the end of a schedule, moves nothing.
        share = jnp.where(counted.weight_sum > 0, jnp.square(counted.largest_rate) / counted.weight_sum, 0.0)
        per_rate = jnp.where(weight.rate > 0, share / weight.rate, 0.0)
        direction = (1 - config.beta1 * (1 - share)) * u + per_rate * (weight.value.astype(jnp.float32) - old.z)
        return direction, ScheduleFree(old.z - weight.rate * u, second.astype(dtype))

    return leafwise(config, scalars=_nothing_counted, next_scalars=_next, init=init, update=update)


def _nothing_counted() -> Averaging:
    return Averaging(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def _next(counted: Averaging, learning_rate: jax.Array) -> Averaging:
    largest = jnp.maximum(counted.largest_rate, learning_rate)
    return Averaging(counted.num_steps + 1, counted.weight_sum + jnp.square(largest), largest)


def averaged(params: Any, state: LeafwiseState, *, beta1: float) -> Any:
    """x of y and z, in the dtype of the parameters."""

    def of_leaf(path: str, param: Any) -> jax.Array:
        y, z = param.get_value().astype(jnp.float32), state.leaves[path].z.get_value()
        return (y + (1 - beta1) / beta1 * (y - z)).astype(param.get_value().dtype)

    return replaced(params, of_leaf)


def is_averaging(opt_state: Any) -> bool:
    """Whether a state is that of a schedule-free optimizer."""
    return isinstance(opt_state, LeafwiseState) and isinstance(opt_state.scalars, Averaging)
