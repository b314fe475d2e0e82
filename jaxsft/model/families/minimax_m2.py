"""MiniMax-M2, M2.1: experts chosen by sigmoids with a correction, queries and keys normed over all heads."""

import dataclasses

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import mixtral
from jaxsft.model.families.mixtral import routing
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

WEIGHTS = mixtral.WEIGHTS | {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.q_norm.weight", "(n h)"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.k_norm.weight", "(k h)"),
    "layers.mlp.correction_bias": ("model.layers.{l}.block_sparse_moe.e_score_correction_bias", "e"),
}
IN_MEMORY = mixtral.IN_MEMORY
IGNORED = mixtral.IGNORED

PUBLISHED = dict(
    scoring_func="sigmoid",
    use_routing_bias=True,
    use_qk_norm=True,
    qk_norm_type="per_layer",
    # By these MiniMax-Text-01 multiplies what attention and MLPs add; this architecture does not.
    layernorm_full_attention_beta=1.0,
    layernorm_linear_attention_beta=1.0,
    layernorm_mlp_beta=1.0,
)
"""Fields of the published files that say what this architecture always is; transformers reads none of them."""
UNUSED = ("mlp_intermediate_size", "shared_moe_mode")
"""Of layers without experts, and of experts for all tokens: there are neither."""
MULTI_TOKEN = ("use_mtp", "num_mtp_modules", "mtp_transformer_layers")
"""Of modules that predict tokens further on, which are not in the published weights."""


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type minimax_m2."""
    for key, expected in PUBLISHED.items():
        if hf(key, expected) != expected:
            hf.problem(f"{key}: {hf(key)!r}; only {expected!r} is computed")
    for key in (*MULTI_TOKEN, *UNUSED):
        hf(key)
    # Experts for all tokens, and layers with a kind of attention that this model has none of.
    hf.only("shared_intermediate_size")
    if set(hf("attn_type_list") or [1]) != {1}:
        hf.problem(f"attn_type_list: {hf('attn_type_list')}; only 1, full attention, is computed")
    # It says for how long rows a table of the rope is made, where that is more than for the positions there are.
    if (longest := hf("max_model_len")) and longest > hf.number("max_position_embeddings"):
        hf.problem(f"max_model_len: {longest}; only up to max_position_embeddings is computed")
    hf("rotary_dim")  # transformers makes it partial_rotary_factor
    if hf("router_jitter_noise"):
        hf.problem(f"router_jitter_noise: {hf('router_jitter_noise')}; only 0 is computed")
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(partial=True),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qk_norm="all heads",
        routing=dataclasses.replace(
            routing(hf, normalise=True), scoring="sigmoid", correction_bias=True, least_sum=1e-20
        ),
    )
