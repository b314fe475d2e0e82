"""Which weights of a decoder are quantised, and what a user is told of it.

In: a decoder whose layers are frozen. Out: the same one, the weights of its linear maps quantised. Embeddings, the
output projection, norms, biases and routers stay as they are.
"""

import math

import jax.numpy as jnp
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.model.adapter import Frozen
from jaxsft.model.decoder import Decoder
from jaxsft.model.lora import Map, maps_of
from jaxsft.model.quantize import BLOCK, Kind, is_quantizable
from jaxsft.model.quantized import QuantizedWeight


def quantize_maps(decoder: Decoder, kind: Kind) -> None:
    """Quantises the weights of the linear maps of a decoder's layers, in place; those that cannot be become bfloat16.

    Raises:
        ConfigError: some of them are trained.
    """
    maps = [place for place in maps_of(decoder) if place.kind in ("attention", "mlp")]
    if trained := [place.path for place in maps if isinstance(place.module.weight, nnx.Param)]:
        raise ConfigError(
            f"model.quantize: {kind}, but a trained weight cannot be quantised, and trained are {', '.join(trained)}; "
            "give the model adapters (lora), or freeze these"
        )
    for place in maps:
        weight = place.module.weight
        if is_quantizable(_num_inputs(place), kind):
            place.module.weight = QuantizedWeight(weight, place.inputs, kind)
        else:
            place.module.weight = Frozen(weight[...].astype(jnp.bfloat16), axes=weight.get_metadata("axes"))


def _num_inputs(place: Map) -> int:
    sizes = dict(zip(place.module.weight.get_metadata("axes").split(), place.module.weight.shape, strict=True))
    return math.prod(sizes[letter] for letter in place.inputs.split())


def describe_quantized(decoder: Decoder, kind: Kind) -> list[str]:
    """What a user should know of a decoder that was quantised, abstract or not: sentences."""
    maps = [place for place in maps_of(decoder) if place.kind in ("attention", "mlp")]
    kept = [place for place in maps if not isinstance(place.module.weight, QuantizedWeight)]
    if not kept:
        return []
    listed = ", ".join(f"{place.path} ({_num_inputs(place)})" for place in kept)
    return [
        f"model.quantize: {kind} is made of blocks of {BLOCK} inputs; kept in bfloat16, as their inputs are no "
        f"multiple of it: {listed}"
    ]
