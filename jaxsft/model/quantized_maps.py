"""Which maps of a decoder are quantised.

In: a decoder whose layers are frozen. Out: the same one, the weights of its linear maps quantised. Embeddings, the
output projection, norms, biases and routers stay as they are.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.model.decoder import Decoder
from jaxsft.model.experts import MixtureMLP
from jaxsft.model.layers import Linear
from jaxsft.model.quantize import BLOCK, Kind, is_quantizable
from jaxsft.model.quantized import Frozen, QuantizedWeight


def _maps(decoder: Decoder) -> Iterator[tuple[str, Linear, str]]:
    for name, inputs in (("q", "d"), ("k", "d"), ("v", "d"), ("o", "n h")):
        yield f"layers.self_attn.{name}_proj", getattr(decoder.layers.self_attn, f"{name}_proj"), inputs
    if not isinstance(decoder.layers.mlp, MixtureMLP):
        for name, inputs in (("gate", "d"), ("up", "d"), ("down", "f")):
            if (module := getattr(decoder.layers.mlp, f"{name}_proj")) is not None:
                yield f"layers.mlp.{name}_proj", module, inputs


def quantize_maps(decoder: Decoder, kind: Kind) -> None:
    """Quantises the frozen weights of the linear maps of a decoder's layers, in place.

    Raises:
        ConfigError: one of them is trained.
    """
    for path, module, inputs in _maps(decoder):
        weight = module.weight
        if isinstance(weight, nnx.Param):
            raise ConfigError(f"model.quantize: a trained weight cannot be quantised, and {path} is trained")
        sizes = dict(zip(weight.get_metadata("axes").split(), weight.shape, strict=True))
        num_inputs = 1
        for letter in inputs.split():
            num_inputs *= sizes[letter]
        if is_quantizable(num_inputs, kind):
            module.weight = QuantizedWeight(weight, inputs, kind)
        else:
            module.weight = Frozen(weight[...].astype(jnp.bfloat16), axes=weight.get_metadata("axes"))
