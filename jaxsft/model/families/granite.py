"""Granite 3.x (dense): Llama with multipliers of embeddings, scores, what layers add, and logits."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type granite."""
    return dataclasses.replace(
        llama.decoder_config(hf),
        embedding_scale=hf("embedding_multiplier"),
        attention_scale=hf("attention_multiplier"),
        residual_scale=hf("residual_multiplier"),
        logit_scale=1 / hf("logits_scaling"),
    )
