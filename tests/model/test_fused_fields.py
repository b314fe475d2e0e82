"""The `config.json` of real models with fused, parallel or mixed layers: accepted as expected, or refused by field.

Sizes and fields are as published, but for the numbers of longrope's lists.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.folders.weights.check import check_weights
from jaxsft.folders.weights.layout import join
from jaxsft.folders.weights.stored import open_folder
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.gpt_oss import clamped_swiglu
from jaxsft.model.families.known import decoder_config, family
from jaxsft.model.layers import ACTIVATIONS, NormKind, gated

pytest.importorskip("transformers")

COMMON = dict(initializer_range=0.02, attention_dropout=0.0, torch_dtype="bfloat16", use_cache=True, hidden_act="silu")
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=16.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
SHORT, LONG = [1 + i / 100 for i in range(48)], [1 + i for i in range(48)]


def shape(model_type, vocab, hidden, intermediate, layers, heads, kv_heads, max_position, **more):
    """A config.json, its sizes in the order in which one tells them."""
    return {
        **COMMON,
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
        **more,
    }


def phi3(*sizes, **more):
    fields = dict(rms_norm_eps=1e-5, embd_pdrop=0.0, resid_pdrop=0.0, rope_theta=1e4, attention_bias=False)
    fields |= dict(original_max_position_embeddings=4096, rope_scaling=None, tie_word_embeddings=False)
    return shape("phi3", *sizes, **fields | more)


def without(hf_config, *keys):
    return {key: value for key, value in hf_config.items() if key not in keys}


# One line per thought, not per key.
# fmt: off
LONGROPE = dict(type="longrope", short_factor=SHORT, long_factor=LONG)
PHI3_4K = phi3(32064, 3072, 8192, 32, 32, 32, 4096, sliding_window=2047)
PHI3_128K = phi3(32064, 3072, 8192, 32, 32, 32, 131072, rope_scaling=LONGROPE, sliding_window=262144)
PHI4 = phi3(
    100352, 5120, 17920, 40, 40, 10, 16384, rope_theta=250000, sliding_window=None,
    original_max_position_embeddings=16384,
)
PHI4_MINI = phi3(
    200064, 3072, 8192, 32, 24, 8, 131072, rope_scaling=LONGROPE, sliding_window=262144, tie_word_embeddings=True,
    partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
)
COMMAND_R = shape(
    "cohere", 256000, 8192, 22528, 40, 64, 64, 8192, layer_norm_eps=1e-5, logit_scale=0.0625, model_max_length=131072,
    pretraining_tp=1, rope_theta=8000000.0, use_qk_norm=False, attention_bias=False, pad_token_id=0,
)
COMMAND_R7B = shape(
    "cohere2", 256000, 4096, 14336, 32, 32, 8, 8192, attention_bias=False, cache_implementation="hybrid", head_dim=128,
    layer_norm_eps=1e-5, layer_switch=4, logit_scale=0.25, order_of_interleaved_layers="local_attn_first",
    position_embedding_type="rope_gptj", rope_scaling=None, rope_theta=50000, rotary_pct=1.0, sliding_window=4096,
    sliding_window_pattern=4, use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True,
    use_parallel_embedding=False, use_qk_norm=False,
)
PYTHIA_160M = without(shape(
    "gpt_neox", 50304, 768, 3072, 12, 12, None, 2048, layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.25,
    tie_word_embeddings=False, use_parallel_residual=True, bos_token_id=0, eos_token_id=0,
) | dict(hidden_act="gelu"), "num_key_value_heads")
GPT2 = dict(
    model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1,
    initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024,
    summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
    summary_use_proj=True, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    vocab_size=50257,
)
STABLELM2_1_6B = shape(
    "stablelm", 100352, 2048, 5632, 24, 32, 32, 4096, layer_norm_eps=1e-5, partial_rotary_factor=0.25, rope_theta=10000,
    tie_word_embeddings=False, use_qkv_bias=True,
)
STABLELM2_12B = shape(
    "stablelm", 100352, 5120, 13824, 40, 32, 8, 4096, layer_norm_eps=1e-5, partial_rotary_factor=0.25, rope_theta=10000,
    tie_word_embeddings=False, use_qkv_bias=False, qk_layernorm=True, use_parallel_residual=True, use_norm_bias=False,
    rotary_scaling_factor=1.0,
)
EXAONE4_1_2B = shape(
    "exaone4", 102400, 2048, 4096, 30, 32, 8, 65536, rms_norm_eps=1e-5, head_dim=64, rope_theta=1000000,
    rope_scaling=LLAMA3_ROPE, sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 30,
    tie_word_embeddings=True,
)
EXAONE4_32B = shape(
    "exaone4", 102400, 5120, 27392, 64, 40, 8, 131072, rms_norm_eps=1e-5, head_dim=128, rope_theta=1000000,
    rope_scaling=LLAMA3_ROPE, sliding_window=4096, sliding_window_pattern="LLLG",
    layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 16, tie_word_embeddings=False,
)
GLM4_9B_CHAT = shape(
    "glm", 151552, 4096, 13696, 40, 32, 2, 131072, rms_norm_eps=1.5625e-7, head_dim=128, partial_rotary_factor=0.5,
    rope_theta=1e4, attention_bias=True, tie_word_embeddings=False, pad_token_id=151329,
)
GLM4_9B_0414 = shape(
    "glm4", 151552, 4096, 13696, 40, 32, 2, 32768, rms_norm_eps=1e-5, head_dim=128, partial_rotary_factor=0.5,
    rope_theta=1e4, attention_bias=True, tie_word_embeddings=False,
)
MIXTRAL_8X7B = shape(
    "mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8,
    num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.02, sliding_window=None,
    tie_word_embeddings=False,
)
QWEN3_30B_A3B = shape(
    "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, rms_norm_eps=1e-6, head_dim=128, rope_theta=1e6,
    attention_bias=False, decoder_sparse_step=1, max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768,
    norm_topk_prob=True, num_experts=128, num_experts_per_tok=8, output_router_logits=False, rope_scaling=None,
    router_aux_loss_coef=0.001, sliding_window=None, use_sliding_window=False, tie_word_embeddings=False,
)
OLMOE_1B_7B = shape(
    "olmoe", 50304, 2048, 1024, 16, 16, 16, 4096, rms_norm_eps=1e-5, rope_theta=1e4, attention_bias=False,
    clip_qkv=None, norm_topk_prob=False, num_experts=64, num_experts_per_tok=8, output_router_logits=False,
    rope_scaling=None, router_aux_loss_coef=0.01, tie_word_embeddings=False,
)
GPT_OSS_20B = shape(
    "gpt_oss", 201088, 2880, 2880, 24, 64, 8, 131072, rms_norm_eps=1e-5, head_dim=64, rope_theta=150000,
    attention_bias=True, experts_per_token=4, initial_context_length=4096, num_experts_per_tok=4, num_local_experts=32,
    layer_types=["sliding_attention", "full_attention"] * 12, output_router_logits=False, router_aux_loss_coef=0.9,
    rope_scaling=dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                      original_max_position_embeddings=4096),
    sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False, eos_token_id=200002, pad_token_id=199999,
)
# fmt: on

SEQUENTIAL = ("pre_attention", "pre_mlp")
REAL = {
    "Phi-3-mini-4k": (PHI3_4K, dict(kinds="w2047", norms=SEQUENTIAL, qkv_bias=False, norm=NormKind(1e-5))),
    "Phi-3-mini-128k": (
        PHI3_128K,
        dict(kinds="w262144", scaling="longrope", attention_factor=math.sqrt(1 + math.log(32) / math.log(4096))),
    ),
    "phi-4": (PHI4, dict(kinds="g", theta=250000.0, num_kv_heads=10, tie_embeddings=False)),
    "Phi-4-mini": (PHI4_MINI, dict(kinds="w262144", dim=96, head_dim=128, tie_embeddings=True, long_factors=LONG)),
    "command-r": (
        COMMAND_R,
        dict(
            kinds="g",
            logit_scale=0.0625,
            parallel=True,
            norms=("pre_attention",),
            norm=NormKind(1e-5, kind="layer"),
            interleaved=True,
            theta=8e6,
            tie_embeddings=True,
            qk_norm="none",
        ),
    ),
    "command-r7b": (COMMAND_R7B, dict(kinds="w4096 w4096 w4096 g-", logit_scale=0.25, parallel=True, interleaved=True)),
    "pythia-160m": (
        PYTHIA_160M,
        dict(
            kinds="g",
            dim=16,
            head_dim=64,
            num_kv_heads=12,
            parallel=True,
            norms=SEQUENTIAL,
            gated=False,
            activation=ACTIVATIONS["gelu"],
            qkv_bias=True,
            attention_bias=True,
            mlp_bias=True,
            norm=NormKind(1e-5, kind="layer", bias=True),
        ),
    ),
    "gpt2": (
        GPT2,
        dict(
            kinds="g-",
            learned_positions=True,
            max_position=1024,
            intermediate_size=3072,
            activation=ACTIVATIONS["gelu_new"],
            attention_scale=None,
            tie_embeddings=True,
            parallel=False,
            mlp_bias=True,
        ),
    ),
    "stablelm-2-1_6b": (
        STABLELM2_1_6B,
        dict(kinds="g", dim=16, qkv_bias=True, attention_bias=False, qk_norm="none", parallel=False, norms=SEQUENTIAL),
    ),
    "stablelm-2-12b": (
        STABLELM2_12B,
        dict(qkv_bias=False, qk_norm="each head", parallel=True, norms=("pre_attention",), dim=40),
    ),
    "EXAONE-4.0-1.2B": (EXAONE4_1_2B, dict(kinds="g", scaling="llama3", norms=("post_attention", "post_mlp"))),
    "EXAONE-4.0-32B": (EXAONE4_32B, dict(kinds="w4096 w4096 w4096 g-", qk_norm="head", tie_embeddings=False)),
    "glm-4-9b-chat": (
        GLM4_9B_CHAT,
        dict(kinds="g", dim=64, interleaved=True, qkv_bias=True, attention_bias=False, norms=SEQUENTIAL),
    ),
    "GLM-4-9B-0414": (
        GLM4_9B_0414,
        dict(dim=64, interleaved=True, norms=("pre_attention", "post_attention", "pre_mlp", "post_mlp")),
    ),
    "Mixtral-8x7B": (MIXTRAL_8X7B, dict(kinds="g", experts=(8, 2, True, False), intermediate_size=14336, theta=1e6)),
    "Qwen3-30B-A3B": (
        QWEN3_30B_A3B,
        dict(kinds="g", experts=(128, 8, True, False), intermediate_size=768, qk_norm="head", head_dim=128),
    ),
    "OLMoE-1B-7B": (OLMOE_1B_7B, dict(experts=(64, 8, False, False), qk_norm="all heads", intermediate_size=1024)),
    "gpt-oss-20b": (
        GPT_OSS_20B,
        dict(
            kinds="w128 g",
            experts=(32, 4, True, True),
            activation=clamped_swiglu(1.702, 7.0),
            sinks=True,
            qkv_bias=True,
            attention_bias=True,
            mlp_bias=True,
            scaling="yarn",
            truncate=False,
            attention_factor=0.1 * math.log(32) + 1,
        ),
    ),
}


def described(config):
    """What a test may ask about a DecoderConfig, by name; `kinds` has a period's windows, and "-" without rope."""
    fields = {field: getattr(config, field) for field in config.__dataclass_fields__}
    kinds = [("g" if kind.window is None else f"w{kind.window}") + "-" * (kind.rope is None) for kind in config.layers]
    fields["kinds"] = " ".join(kinds[: config.period])
    if config.ropes:
        (rope,) = config.ropes
        fields |= {field: getattr(rope, field) for field in rope.__dataclass_fields__}
    if config.routing:
        routing = config.routing
        fields["experts"] = (routing.num_experts, routing.top_k, routing.normalise, routing.router_bias)
    return fields


@pytest.mark.parametrize("name", REAL)
def test_the_config_of_a_real_model_gives_its_mathematics(name):
    hf_config, expected = REAL[name]
    given = described(decoder_config(hf_config))
    assert len(given["layers"]) == hf_config.get("num_hidden_layers", hf_config.get("n_layer"))
    for key, value in expected.items():
        if isinstance(value, float | list):
            np.testing.assert_allclose(given[key], value, rtol=1e-12, err_msg=key)
        else:
            assert given[key] == value, key


def test_equal_configs_have_equal_functions():
    assert decoder_config(GPT_OSS_20B) == decoder_config(dict(GPT_OSS_20B))
    assert decoder_config(PYTHIA_160M) == decoder_config(dict(PYTHIA_160M))
    assert decoder_config(MIXTRAL_8X7B).activation is gated("silu")
    assert decoder_config(GPT_OSS_20B) != decoder_config(GPT_OSS_20B | dict(swiglu_limit=6.0))


def test_the_swiglu_of_gpt_oss_clamps_the_gate_above_and_up_on_both_sides():
    gate, up = jnp.array([-20.0, 0.5, 20.0, 20.0]), jnp.array([20.0, 0.5, -20.0, 20.0])
    sigmoid = 1 / (1 + np.exp(-1.702 * np.array([-20.0, 0.5, 7.0, 7.0])))
    expected = np.array([-20.0, 0.5, 7.0, 7.0]) * sigmoid * np.array([8.0, 1.5, -6.0, 8.0])
    np.testing.assert_allclose(clamped_swiglu(1.702, 7.0)(gate, up), expected, rtol=1e-6)


def test_gpt2_asks_for_dropout_which_is_noted():
    notes = decoder_config(GPT2).notes
    assert len(notes) == 3 and all(
        f"{key} 0.1" in " ".join(notes) for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    )


@pytest.mark.parametrize(
    "hf_config, change, messages",
    [
        (PHI3_4K, dict(attention_bias=True), ["attention_bias: True is not known for model_type phi3"]),
        (PHI4_MINI, dict(full_attn_mod=2, interpolate_factor=3), ["full_attn_mod: 2", "interpolate_factor: 3"]),
        (PHI4_MINI, dict(lm_head_bias=True, mlp_bias=True), ["lm_head_bias: True", "mlp_bias: True"]),
        (PHI3_128K, dict(rope_scaling={**LONGROPE, "long_factor": LONG[:7]}), ["long_factor", "48", "7"]),
        (COMMAND_R, dict(sliding_window=4096), ["sliding_window: 4096"]),
        (COMMAND_R7B, dict(use_parallel_block=False), ["use_parallel_block: False; only True is computed"]),
        (
            COMMAND_R7B,
            dict(use_gated_activation=False, use_qk_norm=True),
            ["use_gated_activation", "use_qk_norm: True"],
        ),
        (COMMAND_R7B, dict(rotary_pct=0.5), ["rotary_pct: 0.5"]),
        (COMMAND_R7B, dict(position_embedding_type="rope_neox"), ["position_embedding_type: 'rope_neox'"]),
        (COMMAND_R7B, dict(use_embedding_sharing=False), ["use_embedding_sharing: False"]),
        (COMMAND_R7B, dict(sliding_window=None), ["sliding_window: missing"]),
        (PYTHIA_160M, dict(hidden_act="mish"), ["hidden_act: 'mish'"]),
        (PYTHIA_160M, dict(rotary_pct=0.24), ["rope_parameters: 15 of 64 dims", "must be even"]),
        (PYTHIA_160M, dict(num_key_value_heads=4), ["num_key_value_heads: 4; only 12 is computed"]),
        (GPT2, dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx: True"]),
        (GPT2, dict(reorder_and_upcast_attn=True), ["reorder_and_upcast_attn: True"]),
        (GPT2, dict(add_cross_attention=True), ["add_cross_attention: True"]),
        (GPT2, dict(n_head=11), ["n_head: 11 does not divide n_embd 768"]),
        (STABLELM2_12B, dict(rotary_scaling_factor=2.0), ["rotary_scaling_factor: 2.0"]),
        (STABLELM2_1_6B, dict(sliding_window=64), ["sliding_window: 64"]),
        (EXAONE4_1_2B, dict(layer_types=["full_attention", "chunked_attention"] * 15), ["'chunked_attention'"]),
        (EXAONE4_32B, dict(attention_bias=True), ["attention_bias: True is not known"]),
        (GLM4_9B_CHAT, dict(sliding_window=64), ["sliding_window: 64"]),
        (GLM4_9B_0414, dict(mlp_bias=True), ["mlp_bias: True is not known for model_type glm4"]),
        (MIXTRAL_8X7B, dict(router_jitter_noise=0.01), ["router_jitter_noise: 0.01"]),
        (MIXTRAL_8X7B, dict(num_experts_per_tok=9), ["num_experts_per_tok: 9; expected 1 to 8"]),
        (QWEN3_30B_A3B, dict(mlp_only_layers=[0]), ["mlp_only_layers: [0]"]),
        (QWEN3_30B_A3B, dict(decoder_sparse_step=2), ["decoder_sparse_step: 2; only 1 is computed"]),
        (
            QWEN3_30B_A3B,
            dict(use_sliding_window=True, sliding_window=4096),
            ["max_window_layers: 48 is not known for model_type qwen3_moe"],
        ),
        (OLMOE_1B_7B, dict(clip_qkv=8.0), ["clip_qkv: 8.0"]),
        (OLMOE_1B_7B, dict(shared_expert_intermediate_size=64), ["shared_expert_intermediate_size: 64"]),
        (GPT_OSS_20B, dict(hidden_act="gelu"), ["hidden_act: 'gelu'"]),
        (GPT_OSS_20B, dict(experts_per_token=8), ["experts_per_token: 8; only 4 is computed"]),
        (GPT_OSS_20B, dict(quantization_config=dict(quant_method="mxfp4")), ["quantization_config: {'quant_method'"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.get("model_type", " ".join(value)),
)
def test_a_field_that_asks_for_what_is_not_computed_is_refused_by_name(hf_config, change, messages):
    with pytest.raises(ConfigError) as error:
        decoder_config(hf_config | change)
    for message in messages:
        assert message in str(error.value)


MINIMAX_M2 = json.loads((pathlib.Path(__file__).parent / "tiny" / "minimax_m2.json").read_text())
BETAS = [f"layernorm_{place}_beta" for place in ("full_attention", "linear_attention", "mlp")]


def test_fields_of_minimax_that_its_architecture_makes_nothing_of():
    unused = dict.fromkeys(BETAS, 1.0) | dict(mlp_intermediate_size=8192, shared_moe_mode="sigmoid", max_model_len=32)
    assert decoder_config(MINIMAX_M2 | unused) == decoder_config(MINIMAX_M2)
    for key, value in (*((beta, value) for beta in BETAS for value in (0.0, 0.5)), ("max_model_len", 33)):
        with pytest.raises(ConfigError, match=f"{key}: {value}; only "):
            decoder_config(MINIMAX_M2 | {key: value})


@pytest.mark.parametrize(
    "name, prefix, masks",
    [
        ("gpt2", "transformer.", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("gpt_neox", "", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias"]),
        ("gpt_neox", "", ["gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
    ],
)
def test_masks_that_old_exports_carry_are_passed_over_with_and_without_the_prefix(name, prefix, masks, tmp_path):
    from safetensors.numpy import save_file

    hf_config = json.loads((pathlib.Path(__file__).parent / "tiny" / f"{name}.json").read_text())
    config = decoder_config(hf_config)

    def make():
        return Decoder(config, compute_dtype="float32", param_dtype="float32", remat="none", rngs=nnx.Rngs(0))

    abstract = nnx.state(jax.eval_shape(make))
    joined = join(abstract, family(hf_config), vocab_size=config.vocab_size)
    shapes = {weight.name(index): weight.file_shape for weight, _ in joined.values() for index in weight.indices()}
    tensors = {key.removeprefix(prefix): np.zeros(shape, np.float32) for key, shape in shapes.items()}

    def check(more):
        save_file(tensors | {key: np.ones((1, 1, 4, 4), np.uint8) for key in more}, tmp_path / "model.safetensors")
        stored = open_folder(tmp_path)
        check_weights(stored, family(hf_config), abstract, vocab_size=config.vocab_size)

    check(masks)
    with pytest.raises(ConfigError, match="attn.other .* is extra"):
        check([*masks, "attn.other"])
