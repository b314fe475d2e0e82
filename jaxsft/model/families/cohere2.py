"""Command-R7B, Command-A: Command-R with windows in most layers, and no rope in the others."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import cohere
from jaxsft.model.fields import Fields
from jaxsft.model.layers import NormKind, gated

WEIGHTS = cohere.WEIGHTS
IGNORED = cohere.IGNORED

PUBLISHED = dict(
    order_of_interleaved_layers="local_attn_first",
    position_embedding_type="rope_gptj",
    rotary_pct=1.0,
    use_gated_activation=True,
    use_parallel_block=True,
    use_qk_norm=False,
)
"""Fields of the published files that say what this architecture always is; transformers reads none of them."""


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type cohere2."""
    for key, expected in PUBLISHED.items():
        if hf(key, expected) != expected:
            hf.problem(f"{key}: {hf(key)!r}; only {expected!r} is computed")
    if hf("use_embedding_sharing", hf("tie_word_embeddings")) != hf("tie_word_embeddings"):
        hf.problem(f"use_embedding_sharing: {hf('use_embedding_sharing')}, but not so tie_word_embeddings")
    # How to run it, and the period of layer_types, twice.
    hf("use_parallel_embedding"), hf("layer_switch"), hf("sliding_window_pattern")
    attention_bias = bool(hf("attention_bias"))
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(ropes={"sliding_attention": 0, "full_attention": None}),
        ropes=(hf.rope(interleaved=True),),
        norm=NormKind(hf("layer_norm_eps"), kind="layer"),
        norms=("pre_attention",),
        parallel=True,
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        logit_scale=hf("logit_scale"),
    )
