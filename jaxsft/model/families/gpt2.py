"""GPT-2, DistilGPT-2, Cerebras-GPT and the like: learned positions, biases, weights stored as [in, out]."""

from jaxsft.model.architecture import DecoderConfig, LayerKind
from jaxsft.model.fields import Fields
from jaxsft.model.layers import ACTIVATIONS, NormKind

WEIGHTS = {
    "embed_tokens.weight": ("transformer.wte.weight", "v d"),
    "embed_positions.weight": ("transformer.wpe.weight", "p d"),
    "layers.pre_attention_norm.weight": ("transformer.h.{l}.ln_1.weight", "d"),
    "layers.pre_attention_norm.bias": ("transformer.h.{l}.ln_1.bias", "d"),
    "layers.self_attn.q_proj.weight": ("transformer.h.{l}.attn.c_attn.weight", "d (n*+k+k h)"),
    "layers.self_attn.q_proj.bias": ("transformer.h.{l}.attn.c_attn.bias", "(n*+k+k h)"),
    "layers.self_attn.k_proj.weight": ("transformer.h.{l}.attn.c_attn.weight", "d (n+k*+k h)"),
    "layers.self_attn.k_proj.bias": ("transformer.h.{l}.attn.c_attn.bias", "(n+k*+k h)"),
    "layers.self_attn.v_proj.weight": ("transformer.h.{l}.attn.c_attn.weight", "d (n+k+k* h)"),
    "layers.self_attn.v_proj.bias": ("transformer.h.{l}.attn.c_attn.bias", "(n+k+k* h)"),
    "layers.self_attn.o_proj.weight": ("transformer.h.{l}.attn.c_proj.weight", "(n h) d"),
    "layers.self_attn.o_proj.bias": ("transformer.h.{l}.attn.c_proj.bias", "d"),
    "layers.pre_mlp_norm.weight": ("transformer.h.{l}.ln_2.weight", "d"),
    "layers.pre_mlp_norm.bias": ("transformer.h.{l}.ln_2.bias", "d"),
    "layers.mlp.up_proj.weight": ("transformer.h.{l}.mlp.c_fc.weight", "d f"),
    "layers.mlp.up_proj.bias": ("transformer.h.{l}.mlp.c_fc.bias", "f"),
    "layers.mlp.down_proj.weight": ("transformer.h.{l}.mlp.c_proj.weight", "f d"),
    "layers.mlp.down_proj.bias": ("transformer.h.{l}.mlp.c_proj.bias", "d"),
    "norm.weight": ("transformer.ln_f.weight", "d"),
    "norm.bias": ("transformer.ln_f.bias", "d"),
    "lm_head.weight": ("lm_head.weight", "v d"),
}

IGNORED = ("*.attn.bias", "*.attn.masked_bias")
"""Causal masks that old exports carry."""


def decoder_config(hf: Fields) -> DecoderConfig:
    """The DecoderConfig of a `config.json` of model_type gpt2."""
    hidden_size, num_heads = hf("n_embd"), hf("n_head")
    if hidden_size % num_heads:
        hf.problem(f"n_head: {num_heads} does not divide n_embd {hidden_size}")
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        hf.only(key)
    hf("n_ctx")  # n_positions, as it once was called
    return DecoderConfig(
        vocab_size=hf("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf("n_inner") or 4 * hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        layers=(LayerKind(rope=None),) * hf("n_layer"),
        ropes=(),
        max_position=hf("n_positions"),
        norm=NormKind(hf("layer_norm_epsilon"), kind="layer", bias=True),
        norms=("pre_attention", "pre_mlp"),
        activation=ACTIVATIONS[hf.activation("activation_function")],
        tie_embeddings=bool(hf("tie_word_embeddings")),
        initializer_range=hf("initializer_range"),
        gated=False,
        qkv_bias=True,
        attention_bias=True,
        mlp_bias=True,
        attention_scale=None if hf("scale_attn_weights") else 1.0,
        learned_positions=True,
        notes=hf.notes,
    )
