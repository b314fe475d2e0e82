"""ERNIE 4.5 (0.3B, dense): Llama with rope in neighbouring pairs, and biases on all maps or on none."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type ernie4_5."""
    bias = bool(hf("use_bias"))
    return dataclasses.replace(
        llama.decoder_config(hf),
        ropes=(hf.rope(interleaved=True),),
        qkv_bias=bias,
        attention_bias=bias,
        mlp_bias=bias,
    )
