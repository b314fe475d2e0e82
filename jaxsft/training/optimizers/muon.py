"""Muon: matrices move by their orthogonalised momentum, all other parameters by AdamW.

In: gradients with the axes of their parameters, which say what is a matrix: `"l d n h"` is L matrices D x (N H), and
`"l e d f"` L x E matrices D x F. Embeddings, output projection, learned positions, routers, norms and biases are AdamW's.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.moments import with_moment_dtype
from jaxsft.training.optimizers.params import by_path, decayed, matrix, replaced

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
ROOT_MEAN_SQUARE = 0.2
"""Of a direction, about: as large as AdamW's usually are, so that learning rate and decay are AdamW's too."""


class MuonState(NamedTuple):
    """Momentum of matrices, and Adam's state of all else, each by the path of the parameter."""

    momentum: dict[str, Any]
    adam: Any


def muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024), with the scale of Liu et al., 2025 (arXiv 2502.16982), equation 4.

    The momentum m is a moving average of the gradients g. The direction is `orthogonalised` of a blend
    momentum * m + (1 - momentum) * g (Nesterov's), times 0.2 * sqrt(max(inputs, outputs)), plus decay.
    """
    dtype = jnp.dtype(config.moment_dtype)
    adam = with_moment_dtype(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon), dtype)

    def init(params: Any) -> MuonState:
        matrices, others = _split(params)
        momentum = {path: param.replace(jnp.zeros(param.shape, dtype)) for path, param in matrices.items()}
        return MuonState(momentum, adam.init(others))

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        matrices, others = _split(gradients)
        momentum, directions = {}, {}
        for path, gradient in matrices.items():
            value, old = gradient.get_value(), state.momentum[path]
            new = config.momentum * old.get_value().astype(jnp.float32) + (1 - config.momentum) * value
            momentum[path] = old.replace(new.astype(dtype))
            blend = config.momentum * new + (1 - config.momentum) * value
            directions[path] = _scaled(blend, gradient.get_metadata("axes"))
        by_adam, adam_state = adam.update(others, state.adam)
        directions |= {path: direction.get_value() for path, direction in by_adam.items()}
        return replaced(gradients, lambda path, _: directions[path]), MuonState(momentum, adam_state)

    return optax.chain(optax.GradientTransformation(init, update), decayed(config))


def is_muons(axes: str) -> bool:
    """Whether a parameter is moved by its orthogonalised momentum: matrices but tables of tokens and positions."""
    return matrix(axes) is not None and not set("vp") & set(axes.split())


def _split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    leaves = by_path(tree)
    matrices = {path: leaf for path, leaf in leaves.items() if is_muons(leaf.get_metadata("axes"))}
    return matrices, {path: leaf for path, leaf in leaves.items() if path not in matrices}


def _scaled(x: jax.Array, axes: str) -> jax.Array:
    """The orthogonalised matrices of a weight, each of about the root mean square of AdamW's directions."""
    found = matrix(axes)
    assert found is not None
    num_inputs, num_outputs = (math.prod(x.shape[dim] for dim in side) for side in found)
    matrices = x.reshape(*x.shape[: found[0][0]], num_inputs, num_outputs)  # layers and experts come first
    # One layer after the other: what the iteration holds besides is then of one layer.
    each = jax.lax.map(orthogonalised, matrices) if axes.startswith("l ") else orthogonalised(matrices)
    return ROOT_MEAN_SQUARE * math.sqrt(max(num_inputs, num_outputs)) * each.reshape(x.shape)


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
