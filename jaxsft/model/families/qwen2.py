"""Qwen1.5, Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type qwen2."""
    hf("use_sliding_window"), hf("max_window_layers")  # already in sliding_window and layer_types
    return dataclasses.replace(llama.decoder_config(hf), qkv_bias=True)
