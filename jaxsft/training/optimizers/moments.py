"""AdamW, Lion and SGD: optax's own, with moments in a dtype of one's choice and our decay.

In: the section `optim`. Out: a transformation whose moments are Variables like their parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.params import decayed


def adamw(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019): Adam's direction plus `weight_decay` times the parameter."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    return optax.chain(with_moment_dtype(adam, jnp.dtype(config.moment_dtype)), decayed(config))


def lion(config: OptimConfig) -> optax.GradientTransformation:
    """Lion (Chen et al., 2023): the sign of a blend of gradient and moment, plus decay; one moment."""
    signs = optax.scale_by_lion(b1=config.beta1, b2=config.beta2)
    return optax.chain(with_moment_dtype(signs, jnp.dtype(config.moment_dtype)), decayed(config))


def sgd(config: OptimConfig) -> optax.GradientTransformation:
    """SGD as in PyTorch: the sum of all gradients, each `momentum` times that of the step before, plus decay.

    The decay is decoupled as everywhere here: it does not go through the momentum. Without momentum nothing is kept.
    """
    if config.momentum == 0:
        return optax.chain(optax.identity(), decayed(config))
    trace = optax.trace(decay=config.momentum)
    return optax.chain(with_moment_dtype(trace, jnp.dtype(config.moment_dtype)), decayed(config))


def with_moment_dtype(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Keeps float moments in `dtype`, and computes with them in float32 (optax lets only the first one be chosen)."""

    def cast(tree: Any, to: jnp.dtype) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(updates, cast(state, jnp.dtype(jnp.float32)), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
