"""Qwen3 (0.6B to 32B, without experts): Llama with a norm of each query and key head."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "h"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type qwen3."""
    hf("use_sliding_window"), hf("max_window_layers")  # already in sliding_window and layer_types
    return dataclasses.replace(llama.decoder_config(hf), qk_norm="head")
