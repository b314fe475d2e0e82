"""Generation of models whose positions come from a table, and of vocabularies that are filled up."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsft.answers.generate import Generator, Sampling
from jaxsft.config import ConfigError, MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.model.abstract import abstract_model, random_weights
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config

GPT2 = dict(
    model_type="gpt2", vocab_size=67, n_embd=32, n_head=4, n_layer=2, n_positions=12, initializer_range=0.3, n_inner=48
)


@pytest.fixture(scope="module")
def gpt2():
    def make(rngs):
        return Decoder(decoder_config(GPT2), compute_dtype="float32", param_dtype="float32", remat="none", rngs=rngs)

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = abstract_model(make)
    return Generator(model, mesh, stop_ids=[]), random_weights(make, mesh, seed=0), model


def test_an_answer_ends_where_the_table_of_positions_ends(gpt2):
    generator, params, model = gpt2
    prompts = [[1, 2, 3], [4] * 11, [5] * 12]
    answers = generator.answers(params, prompts, max_new_tokens=20)
    # A token is drawn from the last position, too; the one that it would be read at is not there.
    assert [len(answer) for answer in answers] == [10, 2, 1]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(generator.stream(params, prompt, max_new_tokens=20)) == answer
        tokens = np.array([(prompt + answer)[:12]], np.int32)
        decoder = nnx.merge(model.graphdef, params)
        hidden = decoder(tokens, np.ones_like(tokens), np.arange(tokens.shape[1], dtype=np.int32)[None]).hidden
        assert np.asarray(decoder.logits(hidden)).argmax(-1)[0, len(prompt) - 1 :].tolist() == answer


def test_a_prompt_longer_than_the_table_is_refused(gpt2):
    generator, params, _ = gpt2
    with pytest.raises(ConfigError, match="a prompt has 13 tokens, but the model has only 12 positions"):
        generator.answers(params, [[1] * 13], max_new_tokens=2)


def test_ids_that_only_fill_up_the_table_are_never_drawn(gpt2):
    generator, params, _ = gpt2
    hot = Sampling(temperature=100.0, top_p=1.0, seed=0)
    drawn = np.array(generator.answers(params, [[1, 2]] * 64, max_new_tokens=10, sampling=hot))
    assert drawn.max() < 67 and len(np.unique(drawn)) > 60


def test_windows_of_answers_are_those_of_the_whole():
    config = dict(
        model_type="mistral",
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        initializer_range=0.3,
    )
    decoder = decoder_config(config)

    def make(rngs):
        return Decoder(decoder, compute_dtype="float32", param_dtype="float32", remat="none", rngs=rngs)

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, params = abstract_model(make), random_weights(make, mesh, seed=0)
    answers = Generator(model, mesh, stop_ids=[]).answers(params, [[1, 2, 3], [4] * 9], max_new_tokens=12)
    merged = nnx.merge(model.graphdef, params)
    for prompt, answer in zip([[1, 2, 3], [4] * 9], answers, strict=True):
        tokens = np.array([prompt + answer[:-1]], np.int32)
        hidden = merged(tokens, np.ones_like(tokens), np.arange(tokens.shape[1], dtype=np.int32)[None]).hidden
        assert np.asarray(merged.logits(hidden)).argmax(-1)[0, len(prompt) - 1 :].tolist() == answer
