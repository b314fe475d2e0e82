"""Which weights of a decoder are quantised, and what a user is told of it.

In: a decoder whose layers are frozen. Out: the same one, the weights of its linear maps quantised. Embeddings, the
output projection, norms, biases and routers stay as they are.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.model.adapter import Frozen, of_layers
from jaxsft.model.decoder import Decoder
from jaxsft.model.lora import Map, maps_of
from jaxsft.model.quantize import BLOCK, Kind, is_quantizable
from jaxsft.model.quantized import QuantizedWeight


def quantize_maps(decoder: Decoder, kind: Kind) -> None:
    """Quantises the frozen weights of the linear maps of a decoder's layers, in place; those that cannot be become
    bfloat16, those that are trained stay as they are.

    Raises:
        ConfigError: all of them are trained.
    """
    maps = _maps(decoder)
    frozen = [place for place in maps if not isinstance(place.module.weight, nnx.Param)]
    if not frozen:
        raise ConfigError(
            f"model.quantize: {kind}, but a trained weight cannot be quantised, and all are trained; give the model "
            "adapters (lora), or train some of its weights only (train.only)"
        )
    for place in frozen:
        weight = place.module.weight
        if is_quantizable(_num_inputs(place), kind):
            place.module.weight = nnx.data(QuantizedWeight(weight, place.inputs, kind))
        else:
            rounded = weight[...].astype(jnp.bfloat16)
            place.module.weight = Frozen(rounded, axes=weight.get_metadata("axes"), **of_layers(weight))


def _maps(decoder: Decoder) -> list[Map]:
    """The linear maps of all layers, routers aside."""
    return [place for place in maps_of(decoder) if place.kind in ("attention", "convolution", "mlp")]


def _num_inputs(place: Map) -> int:
    sizes = dict(zip(place.module.weight.get_metadata("axes").split(), place.module.weight.shape, strict=True))
    return math.prod(sizes[letter] for letter in place.inputs.split())


def describe_quantized(decoder: Decoder, kind: Kind) -> list[str]:
    """What a user should know of a decoder that was quantised, abstract or not: sentences."""
    kept = [place for place in _maps(decoder) if isinstance(place.module.weight, Frozen)]
    if not kept:
        return []
    listed = ", ".join(f"{place.path} ({_num_inputs(place)})" for place in kept)
    return [
        f"model.quantize: {kind} is made of blocks of {BLOCK} inputs; kept in bfloat16, as their inputs are no "
        f"multiple of it: {listed}"
    ]


def with_plain_weights(decoder: Decoder) -> int:
    """Gives an abstract decoder plain frozen weights in place of its quantised ones, to count what a step makes.

    They are of another size than the compute dtype, to which a product casts them, as quantised ones are unpacked.

    Returns:
        How many quantised numbers a layer had.
    """
    count = 0
    dtype = jnp.bfloat16 if decoder.compute_dtype.itemsize == 4 else jnp.float32
    for place in _maps(decoder):
        weight = place.module.weight
        if isinstance(weight, QuantizedWeight):
            leading = weight.codes.shape[: len(place.leading.split())]
            count += math.prod(leading[1:]) * math.prod(weight.layout.shape)
            shape = (*leading, *weight.layout.shape)
            abstract = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            place.module.weight = Frozen(abstract, axes=weight.layout.ours, **of_layers(weight.codes))
    return count
