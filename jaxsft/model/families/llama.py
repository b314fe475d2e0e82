"""Llama 2, 3, 3.x and what shares its shape (SmolLM2, TinyLlama, ...), and Mistral without sliding window."""

from typing import Any

from jaxsft.config import ConfigError
from jaxsft.model.decoder import DecoderConfig
from jaxsft.model.layers import Rope

WEIGHTS = {
    "embed_tokens.weight": ("model.embed_tokens.weight", "v d"),
    "layers.self_attn.q_proj.weight": ("model.layers.{l}.self_attn.q_proj.weight", "(n h) d"),
    "layers.self_attn.q_proj.bias": ("model.layers.{l}.self_attn.q_proj.bias", "(n h)"),
    "layers.self_attn.k_proj.weight": ("model.layers.{l}.self_attn.k_proj.weight", "(k h) d"),
    "layers.self_attn.k_proj.bias": ("model.layers.{l}.self_attn.k_proj.bias", "(k h)"),
    "layers.self_attn.v_proj.weight": ("model.layers.{l}.self_attn.v_proj.weight", "(k h) d"),
    "layers.self_attn.v_proj.bias": ("model.layers.{l}.self_attn.v_proj.bias", "(k h)"),
    "layers.self_attn.o_proj.weight": ("model.layers.{l}.self_attn.o_proj.weight", "d (n h)"),
    "layers.self_attn.o_proj.bias": ("model.layers.{l}.self_attn.o_proj.bias", "d"),
    "layers.mlp.gate_proj.weight": ("model.layers.{l}.mlp.gate_proj.weight", "f d"),
    "layers.mlp.gate_proj.bias": ("model.layers.{l}.mlp.gate_proj.bias", "f"),
    "layers.mlp.up_proj.weight": ("model.layers.{l}.mlp.up_proj.weight", "f d"),
    "layers.mlp.up_proj.bias": ("model.layers.{l}.mlp.up_proj.bias", "f"),
    "layers.mlp.down_proj.weight": ("model.layers.{l}.mlp.down_proj.weight", "d f"),
    "layers.mlp.down_proj.bias": ("model.layers.{l}.mlp.down_proj.bias", "d"),
    "layers.input_layernorm.weight": ("model.layers.{l}.input_layernorm.weight", "d"),
    "layers.post_attention_layernorm.weight": ("model.layers.{l}.post_attention_layernorm.weight", "d"),
    "norm.weight": ("model.norm.weight", "d"),
    "lm_head.weight": ("lm_head.weight", "v d"),
}
"""Path of a weight in our state -> its tensor name ({l}: the layer) and layout in safetensors, in the order in which
transformers writes them. A weight that a config does not ask for (a bias, a tied lm_head) is in neither."""

HARMLESS = frozenset(
    [
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_llama_config",
        "keys_to_ignore",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "model_type",
        "name_or_path",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_flash_attn",
    ]
)
"""Keys of a config.json that say nothing about the model's mathematics."""


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """The DecoderConfig that a `config.json` of model_type llama or mistral describes.

    Raises:
        ConfigError: sizes that are missing or do not fit each other, and everything that would change the mathematics
            but is not computed here, each with its key; all together.
    """
    hf = {key: value for key, value in hf.items() if key not in HARMLESS or key == "model_type"}
    model_type = hf.pop("model_type")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    problems = [f"{key}: missing" for key in required if not isinstance(hf.get(key), int)]
    if problems:
        raise _refusal(problems)

    # Where transformers' LlamaConfig and MistralConfig have other defaults than "absent", they are written out here.
    is_llama = model_type == "llama"
    max_position = hf.pop("max_position_embeddings", 2048 if is_llama else 131072)
    num_heads = hf.pop("num_attention_heads")
    num_kv_heads = hf.pop("num_key_value_heads", None if is_llama else 8) or num_heads
    hidden_size = hf.pop("hidden_size")
    head_dim = hf.pop("head_dim", None) or hidden_size // num_heads
    config = DecoderConfig(
        vocab_size=hf.pop("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf.pop("intermediate_size"),
        num_layers=hf.pop("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=hf.pop("rms_norm_eps", 1e-6),
        rope=_rope(hf, max_position, problems),
        tie_embeddings=hf.pop("tie_word_embeddings", False),
        attention_bias=hf.pop("attention_bias", False) if is_llama else False,
        mlp_bias=hf.pop("mlp_bias", False) if is_llama else False,
        initializer_range=hf.pop("initializer_range", 0.02),
    )
    if num_heads % num_kv_heads:
        problems.append(f"num_key_value_heads: {num_kv_heads} does not divide num_attention_heads {num_heads}")
    if head_dim % 2:
        problems.append(f"head_dim: {head_dim}; rotary positions need an even one")
    if (activation := hf.pop("hidden_act", "silu")) != "silu":
        problems.append(f"hidden_act: {activation!r}; only 'silu' is computed")
    if (parts := hf.pop("pretraining_tp", 1)) not in (1, None):
        problems.append(f"pretraining_tp: {parts}; only 1 is computed")
    if not is_llama:
        window = hf.pop("sliding_window", 4096)
        if window is not None and window < max_position:
            problems.append(
                f"sliding_window: {window} is less than max_position_embeddings {max_position}, and attention windows "
                "are not computed (set it to null if you train on fewer tokens than the window)"
            )
    # Absent, null, false, 0, empty: a key that is switched off asks for nothing.
    problems += [
        f"{key}: {value!r} is not known for model_type {model_type} (remove it if it does not change the model)"
        for key, value in hf.items()
        if value and not key.startswith("_")
    ]
    if problems:
        raise _refusal(problems)
    return config


def _rope(hf: dict[str, Any], max_position: int, problems: list[str]) -> Rope:
    """Takes the rope keys out of `hf`: transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) style."""
    parameters, scaling = hf.pop("rope_parameters", None), hf.pop("rope_scaling", None)
    section = "rope_scaling" if scaling else "rope_parameters"
    fields = {"rope_theta": hf.pop("rope_theta", None) or 10000.0, **(scaling or parameters or {})}
    original = hf.pop("original_max_position_embeddings", None) or fields.get("original_max_position_embeddings")
    kind: Any = fields.get("rope_type") or fields.get("type") or "default"
    if (share := fields.get("partial_rotary_factor") or hf.pop("partial_rotary_factor", None) or 1.0) != 1.0:
        problems.append(f"{section}.partial_rotary_factor: {share}; only 1.0 is computed")
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    missing = [key for key in needed.get(kind, ()) if fields.get(key) is None]
    if kind not in needed:
        problems.append(f"{section}.rope_type: {kind!r}; computed are {', '.join(needed)}")
    elif missing:
        problems.append(f"{section}: rope_type {kind!r} needs {', '.join(missing)}")
    if kind not in needed or missing or kind == "default":
        return Rope(float(fields["rope_theta"]))
    values: dict[str, Any] = {key: float(fields[key]) for key in needed[kind]}
    if kind == "llama3":
        values["original_max_position"] = original or max_position
    return Rope(float(fields["rope_theta"]), kind, **values)


def _refusal(problems: list[str]) -> ConfigError:
    return ConfigError("the model's config.json:\n" + "\n".join(f"  {problem}" for problem in problems))
