"""Rotary positions against transformers: every scaling, to the last bit or nearly."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.model.families.known import decoder_config
from jaxsft.model.rope import Rope, example_lengths, rope_frequencies, rotate, rotation

SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 32.0, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 16.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.25},
]


@pytest.mark.parametrize("theta", [500.0, 1e4, 5e5])
@pytest.mark.parametrize("head_dim", [10, 64, 96, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_frequencies_are_those_of_transformers_to_the_last_bit_or_nearly(scaling, head_dim, theta):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {**scaling, "rope_theta": theta}
    if scaling["rope_type"] in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = 8192
    hf_config = dict(
        model_type="llama",
        vocab_size=67,
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=1,
        num_attention_heads=6,
        head_dim=head_dim,
        max_position_embeddings=16384,
        rope_parameters=scaling,
    )
    (rope,) = decoder_config(hf_config).ropes
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**hf_config))
    ours = rope_frequencies(rope)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=3e-7)
    if scaling["rope_type"] != "yarn":
        assert np.count_nonzero(ours != theirs.inv_freq.numpy()) <= 1
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-7)


def test_neighbouring_pairs_halves_and_a_part_of_the_head_are_turned_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[None, None, None]
    both_alike = Rope(dim=4, theta=1.0)  # both pairs turn by one radian per position
    turned = rotation(both_alike, jnp.array([[np.pi / 2]]))
    np.testing.assert_allclose(rotate(x, turned)[0, 0, 0], [-3, -4, 1, 2, 5, 6], atol=1e-6)
    np.testing.assert_allclose(rotate(x, turned, interleaved=True)[0, 0, 0], [-2, 1, -4, 3, 5, 6], atol=1e-6)


def test_the_length_of_an_example_is_that_of_its_own_segment():
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 0]])
    positions = jnp.array([[0, 1, 0, 1, 2, 0]])
    np.testing.assert_array_equal(example_lengths(segment_ids, segment_ids, positions), [[2, 2, 3, 3, 3, 1]])


def test_a_cache_is_made_anew_where_one_more_token_turns_the_others_otherwise():
    lengths = np.array([8, 9, 10, 11])
    common = dict(dim=4, theta=10.0, original_max_position=9)
    assert Rope(**common, scaling="longrope").changes_at(lengths).tolist() == [False, False, True, False]
    assert Rope(**common, scaling="dynamic").changes_at(lengths).tolist() == [False, False, True, True]
    assert not Rope(**common, scaling="yarn").changes_at(lengths).any()
