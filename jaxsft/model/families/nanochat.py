"""nanochat (d20, d32): norms without weights, of embeddings too, a squared relu, and rope the other way round."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import ACTIVATIONS

WEIGHTS = llama.WEIGHTS | {
    "layers.mlp.up_proj.weight": ("model.layers.{l}.mlp.fc1.weight", "f d"),
    "layers.mlp.down_proj.weight": ("model.layers.{l}.mlp.fc2.weight", "d f"),
}
IGNORED = llama.IGNORED


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type nanochat."""
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(dataclasses.replace(hf.rope(), backwards=True),),
        norm=hf.rms_norm(has_weight=False),
        norms=("pre_attention", "pre_mlp"),
        activation=ACTIVATIONS[hf.activation()],
        gated=False,
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="head",
        qk_norm_after_rope=True,
        embedding_norm=True,
        logit_soft_cap=hf("final_logit_softcapping"),
    )
