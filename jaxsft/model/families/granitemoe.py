"""Granite 3.x MoE (1B-A400M, 3B-A800M), PowerMoE: Granite with experts in place of the MLP."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import granite, llama
from jaxsft.model.families.mixtral import routing
from jaxsft.model.fields import Fields

WEIGHTS = llama.WEIGHTS | {
    "layers.mlp.router.weight": ("model.layers.{l}.block_sparse_moe.router.layer.weight", "e d"),
    "layers.mlp.experts.gate_proj.weight": ("model.layers.{l}.block_sparse_moe.input_linear.weight", "e (f*+f) d"),
    "layers.mlp.experts.up_proj.weight": ("model.layers.{l}.block_sparse_moe.input_linear.weight", "e (f+f*) d"),
    "layers.mlp.experts.down_proj.weight": ("model.layers.{l}.block_sparse_moe.output_linear.weight", "e d f"),
}
IN_MEMORY = {
    "layers.mlp.router.weight": ("model.layers.{l}.block_sparse_moe.router.weight", "e d"),
    "layers.mlp.experts.gate_proj.weight": (
        "model.layers.{l}.block_sparse_moe.experts.gate_up_proj",
        "e (f*+f) d",
    ),
    "layers.mlp.experts.up_proj.weight": ("model.layers.{l}.block_sparse_moe.experts.gate_up_proj", "e (f+f*) d"),
    "layers.mlp.experts.down_proj.weight": ("model.layers.{l}.block_sparse_moe.experts.down_proj", "e d f"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type granitemoe."""
    return dataclasses.replace(granite.decoder_config(hf), routing=routing(hf, normalise=True))
