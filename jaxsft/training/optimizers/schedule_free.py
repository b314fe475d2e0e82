"""Schedule-free AdamW: gradients are taken at one point, and the model is the average of another.

In: gradients at the parameters, which are y. Out: directions of y, and a state with z, the sequence that AdamW moves.
The model that is evaluated and exported is x, the average of z; y = (1 - beta1) z + beta1 x, so x is kept in the two.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.params import by_path, decays, rate_factors, replaced, with_decay


class ScheduleFreeState(NamedTuple):
    """Like the parameters, but for the scalars."""

    count: jax.Array
    """int32: steps that were taken."""
    weight_sum: jax.Array
    """float32: of the weights of all steps, the squares of the largest learning rates so far."""
    largest_rate: jax.Array
    """float32: the largest learning rate so far."""
    z: Any
    """float32."""
    nu: Any
    """The second moment."""


def schedule_free_adamw(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Schedule-free AdamW (Defazio et al., 2024, arXiv 2405.15682), as in the authors' AdamWScheduleFree.

    With u the gradient at y over the root of the corrected second moment, plus decay times y, and rate r:
    z' = z - r u, and x' = (1 - c) x + c z', where c is the largest rate so far, squared, over the sum of such squares.
    From y' = (1 - beta1) z' + beta1 x' follows y' = y - r ((1 - beta1 (1 - c)) u + c / r (y - z)).
    """
    dtype = jnp.dtype(config.moment_dtype)

    def init(params: Any) -> ScheduleFreeState:
        # Of float32 parameters as well a copy: z parts from y at the second step.
        z = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        nu = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        zero = jnp.zeros((), jnp.float32)
        return ScheduleFreeState(jnp.zeros((), jnp.int32), zero, zero, z, nu)

    def update(
        gradients: Any, state: ScheduleFreeState, params: Any = None, *, learning_rate: jax.Array
    ) -> tuple[Any, ScheduleFreeState]:
        count = state.count + 1
        largest = jnp.maximum(state.largest_rate, learning_rate)
        weight_sum = state.weight_sum + jnp.square(largest)
        # A rate of 0, as after the end of a schedule, moves nothing.
        share = jnp.where(weight_sum > 0, jnp.square(largest) / weight_sum, 0.0)
        correction = 1.0 - config.beta2 ** count.astype(jnp.float32)
        ys, zs, nus = by_path(params), by_path(state.z), by_path(state.nu)
        all_decays, factors = by_path(decays(config, params)), by_path(rate_factors(config, params))
        directions, new_z, new_nu = {}, {}, {}
        for path, variable in by_path(gradients).items():
            gradient, z = variable.get_value(), zs[path].get_value()
            nu = config.beta2 * nus[path].get_value().astype(jnp.float32) + (1 - config.beta2) * jnp.square(gradient)
            rate = learning_rate * factors[path].get_value()
            y = ys[path].get_value().astype(jnp.float32)
            u = with_decay(gradient / (jnp.sqrt(nu / correction) + config.epsilon), y, all_decays[path].get_value())
            towards_z = jnp.where(rate > 0, share / rate, 0.0) * (y - z)
            directions[path] = (1 - config.beta1 * (1 - share)) * u + towards_z
            new_z[path], new_nu[path] = z - rate * u, nu.astype(dtype)
        z = replaced(state.z, lambda path, _: new_z[path])
        nu = replaced(state.nu, lambda path, _: new_nu[path])
        return replaced(gradients, lambda path, _: directions[path]), ScheduleFreeState(
            count, weight_sum, largest, z, nu
        )

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(params: Any, z: Any, beta1: float) -> Any:
    """x of y and z, in the dtype of the parameters."""

    def of_leaf(y: jax.Array, z: jax.Array) -> jax.Array:
        y32 = y.astype(jnp.float32)
        return (y32 + (1 - beta1) / beta1 * (y32 - z)).astype(y.dtype)

    return jax.tree.map(of_leaf, params, z)
