"""Hunyuan 0.5B to 7B (dense): Llama with norms of queries and keys after the rope, whose theta may be stretched."""

from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.families import llama
from jaxsft.model.fields import Fields
from jaxsft.model.layers import gated

NORMS = {
    "layers.self_attn.q_norm.weight": ("model.layers.{l}.self_attn.query_layernorm.weight", "h"),
    "layers.self_attn.k_norm.weight": ("model.layers.{l}.self_attn.key_layernorm.weight", "h"),
}
WEIGHTS = llama.WEIGHTS | NORMS
IGNORED = llama.IGNORED

SAY_NOTHING = (
    *("class_num", "dense_list", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "mask_init_id"),
    *("org_vocab_size", "pad_id", "pool_type", "sep_token_id", "text_end_id", "text_start_id", "cla_share_factor"),
)
"""Fields of the published files that are those of other tasks, ids of tokens, or without effect."""


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type hunyuan_v1_dense."""
    published(hf)
    attention_bias = bool(hf("attention_bias"))
    hf.only("mlp_bias")
    return DecoderConfig(
        **hf.sizes(),
        layers=hf.layers(),
        ropes=(hf.rope(fixed_alpha=True),),
        norm=hf.rms_norm(),
        norms=("pre_attention", "pre_mlp"),
        activation=gated(hf.activation()),
        qkv_bias=attention_bias,
        attention_bias=attention_bias,
        qk_norm="head",
        qk_norm_after_rope=True,
    )


def published(hf: Fields) -> None:
    """Reads what Hunyuan's files say and transformers passes over: all but one value is refused."""
    hf.only("attention_head_dim", hf("head_dim"))
    hf.only("norm_type", "rms")
    for key, value in dict(use_qk_norm=True, use_rotary_pos_emb=True, use_cla=False).items():
        if hf(key, value) != value:
            hf.problem(f"{key}: {hf(key)!r}; only {value!r} is computed")
    for key in SAY_NOTHING:
        hf(key)
