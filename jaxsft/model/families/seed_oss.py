"""Seed-OSS (36B): Llama, where the output projection of attention has a bias or none by a field of its own."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type seed_oss."""
    return dataclasses.replace(llama.decoder_config(hf), attention_bias=bool(hf("attention_out_bias")))
