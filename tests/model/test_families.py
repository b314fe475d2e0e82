"""Every family against transformers: import, equal logits, export, equal bytes, and back into transformers.

A new family adds one entry to VARIANTS: the keys of a tiny `config.json`.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsft import hf, weights
from jaxsft.config import ConfigError, MeshConfig
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.decoder import Decoder
from jaxsft.model.families import family
from jaxsft.model.layers import rope_frequencies

TINY = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    dtype="float32",
    vocab_size=67,
    hidden_size=48,
    intermediate_size=70,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
    tie_word_embeddings=True,
)
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=3.7, low_freq_factor=0.9, high_freq_factor=4.6, original_max_position_embeddings=24
)
VARIANTS = {
    "llama": TINY,
    "llama untied": {**TINY, "tie_word_embeddings": False},
    "llama one head each": {**TINY, "num_key_value_heads": 6},
    "llama biases": {**TINY, "attention_bias": True, "mlp_bias": True},
    "llama head_dim": {**TINY, "head_dim": 10},
    "llama rope llama3": {**TINY, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}},
    "llama rope llama3 in the style of transformers 4": {**TINY, "rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE},
    "llama rope linear": {**TINY, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "mistral": {
        **TINY,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}
LENGTH = 100  # past max_position_embeddings, where rope scaling shows


def load(folder):
    """Our decoder with the weights of a folder, on one device; and what else export wants."""
    hf_config = hf.load_hf_config(folder)
    module = family(hf_config)

    def make():
        config = module.decoder_config(hf_config)
        return Decoder(config, compute_dtype="float32", param_dtype="float32", remat="none", rngs=nnx.Rngs(0))

    graphdef, abstract = nnx.split(jax.eval_shape(make))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = weights.load_params(folder, module, abstract=abstract, shardings=shardings(mesh, abstract))
    return nnx.merge(graphdef, state), state, module, hf_config


def our_logits(model, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = jax.jit(lambda model, *rows: model.logits(model(*rows)))
    return np.asarray(run(model, tokens, np.ones_like(tokens), positions))


def their_logits(folder, tokens):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def largest_difference(ours, theirs):
    """Relative to the largest logit."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


class NoTokenizer:
    """Weights are what these tests look at; `tests/test_hf.py` exports a real tokenizer."""

    bos_token_id = pad_token_id = None

    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize("name", VARIANTS)
def test_import_gives_the_logits_of_transformers_and_export_its_bytes(name, tmp_path, record_property):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = json.loads(json.dumps(VARIANTS[name]))
    their_model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    for parameter in their_model.parameters():
        if parameter.ndim == 1:  # norms and biases, which would be trivial
            torch.nn.init.normal_(parameter, 0.8, 0.3)
    their_model.save_pretrained(tmp_path / "theirs")
    if "transformers 4" in name:
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))

    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, LENGTH)).astype(np.int32)
    model, state, module, hf_config = load(tmp_path / "theirs")
    expected = their_logits(tmp_path / "theirs", tokens)
    difference = largest_difference(our_logits(model, tokens), expected)
    record_property("difference", float(difference))
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < 1e-5

    hf.export(tmp_path / "ours", state, family=module, hf_config=hf_config, tokenizer=NoTokenizer(), stop_ids=[2, 5])
    ours, theirs = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("ours", "theirs"))
    assert ours == theirs
    np.testing.assert_array_equal(their_logits(tmp_path / "ours", tokens), expected)


def test_the_real_stories260k_comes_in_with_equal_logits_and_goes_out_byte_equal(material, tmp_path):
    pytest.importorskip("torch")
    source = material / "models" / "stories260K"
    tokens = np.random.default_rng(0).integers(0, 512, (2, 200)).astype(np.int32)
    model, state, module, hf_config = load(source)
    difference = largest_difference(our_logits(model, tokens), their_logits(source, tokens))
    print(f"stories260K: largest difference {difference:.1e}")
    assert difference < 1e-5
    tokenizer = hf.load_tokenizer(str(source))
    hf.export(
        tmp_path / "ours",
        state,
        family=module,
        hf_config=hf_config,
        tokenizer=tokenizer,
        stop_ids=[2],
        source_folder=source,
    )
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "ours", source))
    assert ours == theirs


@pytest.mark.parametrize(
    "change, key",
    [
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window: 16 is less than max_position_embeddings 32"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type: 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp: 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide num_attention_heads 6"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: 30.0 is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: missing"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_a_config_that_asks_for_what_we_do_not_compute_is_refused_with_its_key(change, key):
    hf_config = {**TINY, **change}
    with pytest.raises(ConfigError) as error:
        family(hf_config).decoder_config(hf_config)
    assert key in str(error.value)


def test_keys_that_are_switched_off_or_say_nothing_of_the_mathematics_are_passed_over():
    noise = dict(rope_interleaved=False, is_llama_config=True, _name_or_path="x", pruned_heads={}, torch_dtype="f")
    assert family(TINY).decoder_config({**TINY, **noise}) == family(TINY).decoder_config(TINY)


def test_mistral_without_a_word_on_its_window_has_the_4096_that_transformers_gives_it():
    with pytest.raises(ConfigError, match="sliding_window: 4096"):
        hf_config = {**TINY, "model_type": "mistral", "max_position_embeddings": 8192}
        family(hf_config).decoder_config(hf_config)


@pytest.mark.parametrize("theta", [500.0, 1e4, 5e5])
@pytest.mark.parametrize("head_dim", [10, 64, 96, 128])
def test_rope_frequencies_are_those_of_transformers_to_the_last_bit_or_nearly(theta, head_dim):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = {**TINY, "head_dim": head_dim, "max_position_embeddings": 16384}
    for scaling in (
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    ):
        hf_config = {**shape, "rope_parameters": {**scaling, "rope_theta": theta}}
        config = family(hf_config).decoder_config(hf_config)
        ours = rope_frequencies(config.rope, head_dim)
        theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**hf_config)).inv_freq.numpy()
        assert ours.dtype == np.float32
        assert np.count_nonzero(ours != theirs) <= 1
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)


def test_an_unknown_model_type_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ConfigError, match="'mamba' is not known; known are llama, mistral"):
        family({"model_type": "mamba"})
