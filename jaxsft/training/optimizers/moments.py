"""AdamW, Lion and SGD: optax's own.

In: the section `optim`. Out: an optimizer whose moments are Variables like their parameters.
"""

import optax

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.optimizer import Optimizer, by_optax


def adamw(config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019): Adam's direction plus `weight_decay` times the parameter."""
    return by_optax(config, optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon))


def lion(config: OptimConfig) -> Optimizer:
    """Lion (Chen et al., 2023): the sign of a blend of gradient and moment, plus decay; one moment."""
    return by_optax(config, optax.scale_by_lion(b1=config.beta1, b2=config.beta2))


def sgd(config: OptimConfig) -> Optimizer:
    """SGD as in PyTorch: the sum of all gradients, each `momentum` times that of the step before, plus decay.

    The decay is decoupled as everywhere here: it does not go through the momentum. Without momentum nothing is kept.
    """
    return by_optax(config, optax.trace(decay=config.momentum) if config.momentum > 0 else optax.identity())
