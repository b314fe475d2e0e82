"""Mistral 7B, Mistral-Nemo, Mistral-Small (text) and Ministral 8B: Llama with an attention window in every layer, or in
none; and as model_type ministral, in some."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type mistral, ministral or ministral3."""
    config = llama.decoder_config(hf)
    window = hf("sliding_window") or None
    if hf.model_type != "ministral" and any(kind.window != window for kind in config.layers):
        hf.problem(
            f"layer_types: transformers passes over it for model_type {hf.model_type} and gives every layer "
            f"sliding_window {window}; remove it, or set model_type to ministral"
        )
    return config
