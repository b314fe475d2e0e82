"""Gemma 2B and 7B: Llama with scaled embeddings, a gelu, and norms that store their weights minus 1."""

import dataclasses
import math

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type gemma."""
    hf.only("use_bidirectional_attention")
    # An older spelling, which transformers no longer looks at.
    hf.only("hidden_activation", hf("hidden_act"))
    return dataclasses.replace(
        llama.decoder_config(hf), norm=hf.rms_norm(offset=1.0), embedding_scale=math.sqrt(hf("hidden_size"))
    )
