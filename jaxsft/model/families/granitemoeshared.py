"""Granite 4.0 previews (moe-3b-a800m with a shared expert): Granite MoE with an expert for all tokens."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import granitemoe
from jaxsft.model.fields import Fields

WEIGHTS = granitemoe.WEIGHTS | {
    "layers.mlp.shared_expert.gate_proj.weight": ("model.layers.{l}.shared_mlp.input_linear.weight", "(f*+f) d"),
    "layers.mlp.shared_expert.up_proj.weight": ("model.layers.{l}.shared_mlp.input_linear.weight", "(f+f*) d"),
    "layers.mlp.shared_expert.down_proj.weight": ("model.layers.{l}.shared_mlp.output_linear.weight", "d f"),
}
IN_MEMORY = granitemoe.IN_MEMORY
IGNORED = granitemoe.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type granitemoeshared."""
    config = granitemoe.decoder_config(hf)
    assert config.routing is not None
    routing = dataclasses.replace(config.routing, shared_size=hf.number("shared_intermediate_size"))
    return dataclasses.replace(config, routing=routing)
