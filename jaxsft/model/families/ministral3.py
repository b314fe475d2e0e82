"""Ministral 3 (3B, 8B, 14B; the text model): Mistral whose queries grow where positions go past the pretraining's."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


@functools.cache
def growing_with_log(beta: float, length: int) -> Callable[[jax.Array], jax.Array]:
    """`1 + beta * log(1 + floor(position / length))`, as in Llama 4; the same function each time."""

    def scale(positions: jax.Array) -> jax.Array:
        return 1 + beta * jnp.log(1 + jnp.floor(positions / length))

    return scale


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type ministral3."""
    rope = hf("rope_parameters")
    # Taken out of the rope's parameters, of which they are none; transformers does not look at the second.
    beta, _ = rope.pop("llama_4_scaling_beta", None), rope.pop("max_position_embeddings", None)
    length = rope.get("original_max_position_embeddings")
    config = llama.decoder_config(hf)
    if beta is None or not length:
        hf.problem("rope_parameters: a ministral3 needs llama_4_scaling_beta and original_max_position_embeddings")
        return config
    return dataclasses.replace(config, query_scale=growing_with_log(float(beta), int(length)))
