"""A decoder without its values: its structure, and parameters of it that are drawn at random.

In: a function that makes a decoder. Out: a `Model`, of which nothing is allocated; or parameters on a mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxsft.config import AttentionKernel
from jaxsft.mesh import shardings
from jaxsft.model.decoder import Decoder


class Model(NamedTuple):
    """A decoder without its values: the static part, and what every parameter looks like."""

    graphdef: Any
    params: Any
    """abstract parameters: `nnx.Param`s of ShapeDtypeStruct, with `axes`."""


def abstract_model(make_decoder: Callable[[nnx.Rngs], Decoder]) -> Model:
    """The structure of a decoder, without allocating it."""
    return Model(*nnx.split(nnx.eval_shape(lambda: make_decoder(nnx.Rngs(0))), nnx.Param))


def with_attention(model: Model, kernel: AttentionKernel, *, num_segments: int | None = None) -> Model:
    """The same decoder, whose attention is computed by a kernel, on rows of at most so many segments (padding too)."""
    decoder = nnx.merge(*model)
    decoder.layers.self_attn.kernel = kernel
    decoder.layers.self_attn.num_segments = num_segments
    return Model(*nnx.split(decoder, nnx.Param))


def random_params(make_decoder: Callable[[nnx.Rngs], Decoder], mesh: Mesh, *, seed: int) -> Any:
    """Random parameters, each shard drawn on the device that holds it; the same values on every mesh."""
    abstract = abstract_model(make_decoder).params

    def init() -> Any:
        return nnx.state(make_decoder(nnx.Rngs(seed)), nnx.Param)

    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings(mesh, abstract))()
