"""A decoder without its values: its structure, and parameters of it that are drawn at random.

In: a function that makes a decoder. Out: a `Model`, of which nothing is allocated; or parameters on a mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsft.config import AttentionKernel
from jaxsft.mesh import shardings
from jaxsft.model.decoder import Decoder


class Model(NamedTuple):
    """A decoder without its values: the static part, and what every parameter looks like.

    What is trained and what is not is decided once, where the decoder is made, by the types of its Variables: `params`
    are its `nnx.Param`s, `frozen` all others. `nnx.merge(*model)` is the decoder.
    """

    graphdef: Any
    params: Any
    """abstract trained parameters: `nnx.Param`s of ShapeDtypeStruct, with `axes`."""
    frozen: Any
    """abstract Variables that are not trained, with `axes`; an empty State where all are."""

    @property
    def weights(self) -> Any:
        """All of them, trained or not, as one State."""
        return whole(self.params, self.frozen)

    def split(self, weights: Any) -> tuple[Any, Any]:
        """A whole State of values as (params, frozen)."""
        params, frozen = nnx.split_state(weights, nnx.Param, ...)
        return params, frozen


def whole(params: Any, frozen: Any) -> Any:
    """Trained and frozen Variables as one State; nothing is copied."""
    return nnx.merge_state(params, frozen)


def abstract_model(make_decoder: Callable[[nnx.Rngs], Decoder]) -> Model:
    """The structure of a decoder, without allocating it."""
    return _split(nnx.eval_shape(lambda: make_decoder(nnx.Rngs(0))))


def with_attention(model: Model, kernel: AttentionKernel, *, num_segments: int | None = None) -> Model:
    """The same decoder, whose attention is computed by a kernel, on rows of at most so many segments (padding too)."""
    decoder = nnx.merge(*model)
    for layers in decoder.stacks:
        layers.self_attn.kernel, layers.self_attn.num_segments = kernel, num_segments
    return _split(decoder)


def _split(decoder: Decoder) -> Model:
    return Model(*nnx.split(decoder, nnx.Param, ...))


def random_weights(
    make_decoder: Callable[[nnx.Rngs], Decoder],
    mesh: Mesh,
    *,
    seed: int,
    only: Callable[[Any], Any] = lambda state: state,
) -> Any:
    """The whole State of a decoder drawn at random, each shard on the device that holds it; the same on every mesh.

    Args:
        make_decoder: draws all of it.
        mesh: where it goes.
        seed: of what is drawn.
        only: the part of the State that is wanted; the rest is not drawn.
    """
    abstract = only(abstract_model(make_decoder).weights)

    def init(seed: jax.Array) -> Any:
        return only(nnx.state(make_decoder(nnx.Rngs(jax.random.key(seed)))))

    with jax.set_mesh(mesh):  # The seed is given, so that another one finds the program compiled.
        return jax.jit(init, out_shardings=shardings(mesh, abstract))(np.uint32(seed))
