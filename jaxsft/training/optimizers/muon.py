"""Muon: matrices move by their orthogonalised momentum, all other parameters by AdamW.

In: gradients with the axes of their parameters, which say what is a matrix: `"l d n h"` is L matrices D x (N H), and
`"l e d f"` L x E matrices D x F. Embeddings, output projection, learned positions, routers, norms and biases are
AdamW's.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.optimizer import Optimizer, Weight, leafwise, with_decay
from jaxsft.training.optimizers.params import matrix

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
ROOT_MEAN_SQUARE = 0.2
"""Of a direction, about: as large as AdamW's usually are, so that learning rate and decay are AdamW's too."""


class Moments(NamedTuple):
    """AdamW's, of what is no matrix."""

    first: Any
    second: Any


def muon(config: OptimConfig) -> Optimizer:
    """Muon (Jordan et al., 2024), with the scale of Liu et al., 2025 (arXiv 2502.16982), equation 4.

    The momentum m is a moving average of the gradients g. The direction is `orthogonalised` of a blend
    momentum * m + (1 - momentum) * g (Nesterov's), times 0.2 * sqrt(max(inputs, outputs)), plus decay.
    """
    dtype = jnp.dtype(config.moment_dtype)

    def init(param: Any) -> Any:
        def zeros() -> Any:
            return param.replace(jnp.zeros(param.shape, dtype))

        return zeros() if is_muons(param.get_metadata("axes")) else Moments(zeros(), zeros())

    def update(weight: Weight, old: Any, count: jax.Array) -> tuple[jax.Array, Any]:
        gradient = weight.gradient
        if is_muons(weight.axes):
            new: Any = _blended(old, gradient, config.momentum)
            direction = _scaled(_blended(new, gradient, config.momentum), weight.axes)
        else:
            new = Moments(
                _blended(old.first, gradient, config.beta1), _blended(old.second, jnp.square(gradient), config.beta2)
            )
            m = new.first / (1 - config.beta1 ** count.astype(jnp.float32))
            v = new.second / (1 - config.beta2 ** count.astype(jnp.float32))
            direction = m / (jnp.sqrt(v) + config.epsilon)
        new = jax.tree.map(lambda x: x.astype(dtype), new)
        return with_decay(direction, weight.value, weight.decay), new

    return leafwise(
        config,
        scalars=lambda: jnp.zeros((), jnp.int32),
        next_scalars=lambda count, rate: count + 1,
        init=init,
        update=update,
    )


def is_muons(axes: str) -> bool:
    """Whether a parameter is moved by its orthogonalised momentum: matrices but tables of tokens and positions."""
    return matrix(axes) is not None and not set("vp") & set(axes.split())


def _blended(old: jax.Array, new: jax.Array, share: float) -> jax.Array:
    return share * old.astype(jnp.float32) + (1 - share) * new


def _scaled(x: jax.Array, axes: str) -> jax.Array:
    """The orthogonalised matrices of a weight, each of about the root mean square of AdamW's directions."""
    found = matrix(axes)
    assert found is not None
    num_inputs, num_outputs = (math.prod(x.shape[dim] for dim in side) for side in found)
    matrices = x.reshape(*x.shape[: found[0][0]], num_inputs, num_outputs)  # layers and experts come first
    scale = ROOT_MEAN_SQUARE * math.sqrt(max(num_inputs, num_outputs))
    return scale * orthogonalised(matrices).reshape(x.shape)


def orthogonalised(x: jax.Array) -> jax.Array:
    """Five steps of the quintic Newton-Schulz iteration of Jordan et al. on float32 matrices [..., rows, columns].

    With x = U S V^T it comes near U V^T: singular values end between about 0.7 and 1.2, not at 1. Matmuls are those of
    the hardware's usual precision, as the iteration bears bfloat16.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
