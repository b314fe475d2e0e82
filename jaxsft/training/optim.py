"""Schedules and optimizers.

In: the `optim` section and the number of steps. Out: a schedule `step -> learning rate`, and an optax transformation
that turns a gradient into a direction; the step multiplies the direction by the negative learning rate, so that the
learning rate is a function of the step alone, whatever the optimizer has counted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxsft.config import OptimConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Steps of warm-up: as given, or the given share of all steps, rounded up."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(num_steps, -int(-config.warmup_ratio * num_steps // 1))


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Learning rate of step i (from 0), of `num_steps` steps in all.

    Warm-up rises linearly: step i of W has (i + 1) / W of the peak, so that no step is wasted on a rate of 0. What
    follows runs from the peak at step W to `final_ratio` of it after the last step, which would be step `num_steps`:
    so the last batch is learnt from as well. On a line, on half a cosine, or (wsd) after staying at the peak, on a line
    over the last `decay_ratio` of all steps; constant stays at the peak.

    Worked example: peak 1, linear, 2 steps of warm-up, 6 steps, final_ratio 0: 0.5, 1, 1, 0.75, 0.5, 0.25.
    """
    warmup = warmup_steps(config, num_steps)
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, num_steps - round(config.decay_ratio * num_steps))

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        # The share of the way down that is left: near the end it is exact, and 1 minus the share that is done is not.
        left = jnp.clip((num_steps - step) / max(num_steps - decay_start, 1), 0.0, 1.0)
        height = {
            "constant": jnp.ones_like(left),
            "linear": left,
            "wsd": left,
            "cosine": jnp.square(jnp.sin(0.5 * jnp.pi * left)),
        }[config.schedule]
        return config.learning_rate * rise * (config.final_ratio + (1 - config.final_ratio) * height)

    return schedule


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The transformation of `config.name`: gradient (already clipped) to direction of steepest ascent."""
    return OPTIMIZERS[config.name](config)


def _adamw(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019): Adam's direction plus `weight_decay` times the parameter."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    return optax.chain(
        _with_moment_dtype(adam, jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {"adamw": _adamw}


def is_decayed(params: Any) -> Any:
    """True for matrices; norms and biases are not decayed: seen per layer, they have one dim, or are named bias."""

    def of_param(path: Any, param: Any) -> Any:
        num_dims = len(param.get_metadata("axes").replace("l", " ").split())
        is_bias = any(getattr(key, "key", None) == "bias" for key in path)
        return param.replace(num_dims > 1 and not is_bias)

    return jax.tree_util.tree_map_with_path(of_param, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


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
