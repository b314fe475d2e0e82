"""Short convolutions: the formula against a loop in float64, and that nothing leaks from one example into another."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.abstract import abstract_model
from jaxsft.model.architecture import LayerKind
from jaxsft.model.convolution import convolved, next_window
from jaxsft.model.decoder import Decoder
from jaxsft.model.families import lfm2
from jaxsft.model.families.known import decoder_config
from jaxsft.model.freezing import train_only

TINY = pathlib.Path(__file__).parent / "tiny"
LENGTHS = [[20, 9, 1, 2, 28], [64], [40, 17], [3, 3, 58]]
"""Segments of the rows; what is left of 64 is padding."""


@functools.cache
def config(name="lfm2"):
    return decoder_config(json.loads((TINY / f"{name}.json").read_text()))


def rows(vocab_size=67):
    segment_ids, positions = np.zeros((2, len(LENGTHS), 64), np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            segment_ids[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    tokens = np.random.default_rng(0).integers(0, vocab_size, segment_ids.shape).astype(np.int32)
    return tokens, segment_ids, positions


def loop(x, weight, bias, segment_ids, gradient):
    """Value and gradients by x, weight and bias, token by token in float64."""
    x, weight, bias, gradient = (np.asarray(each, np.float64) for each in (x, weight, bias, gradient))
    y, by_x, by_weight, by_bias = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weight), np.zeros_like(bias)
    width = weight.shape[1]
    for row, t in np.ndindex(x.shape[:2]):
        y[row, t] = bias
        by_bias += gradient[row, t]
        for distance in range(min(width, t + 1)):
            if segment_ids[row, t - distance] == segment_ids[row, t] > 0 or distance == 0:
                y[row, t] += weight[:, width - 1 - distance] * x[row, t - distance]
                by_x[row, t - distance] += weight[:, width - 1 - distance] * gradient[row, t]
                by_weight[:, width - 1 - distance] += x[row, t - distance] * gradient[row, t]
    return y, (by_x, by_weight, by_bias)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 6e-3)])
@pytest.mark.parametrize("width", [1, 3, 4, 70])
def test_value_and_gradients_are_those_of_a_loop_in_float64(width, dtype, bound):
    rng = np.random.default_rng(width)
    _, segment_ids, positions = rows()
    x, gradient = (jnp.asarray(rng.normal(size=(*segment_ids.shape, 5)), dtype) for _ in range(2))
    weight, bias = jnp.asarray(rng.normal(size=(5, width)), jnp.float32), jnp.asarray(rng.normal(size=5), jnp.float32)
    y, pull = jax.vjp(lambda x, weight, bias: convolved(x, weight, bias, positions), x, weight, bias)
    expected, gradients = loop(x, weight, bias, segment_ids, gradient)
    for given, wanted in zip((y, *pull(gradient)), (expected, *gradients), strict=True):
        assert np.abs(np.asarray(given, np.float64) - wanted).max() < bound * np.abs(wanted).max()


@pytest.mark.parametrize("parts", [[64], [1] * 64, [5, 1, 30, 28]])
def test_a_row_that_is_read_in_parts_is_convolved_as_a_whole_and_padding_behind_a_part_is_passed_over(parts):
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(2, 64, 5)), jnp.float32), jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    whole = convolved(x, weight, None, jnp.broadcast_to(jnp.arange(64), (2, 64)))
    window, start, found = jnp.zeros((2, 3, 5)), 0, []
    for length in parts:
        part = jnp.pad(x[:, start : start + length], ((0, 0), (0, 7), (0, 0)), constant_values=9.0)
        is_token = jnp.broadcast_to(jnp.arange(length + 7) < length, (2, length + 7)).astype(jnp.int32)
        positions = (start + jnp.arange(length + 7)) * is_token
        found.append(convolved(part, weight, None, positions, window)[:, :length])
        window, start = next_window(window, part, is_token), start + length
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=1e-6, atol=1e-6)


def model(config, *, compute_dtype="float32", mesh=None, **more):
    settings = dict(param_dtype="float32", compute_dtype=compute_dtype, remat="full") | more
    found = abstract_model(lambda rngs: Decoder(config, **settings, rngs=rngs))
    decoder = Decoder(config, **settings, rngs=nnx.Rngs(0))
    return found, nnx.state(decoder)


def loss_and_gradients(found, params, batch, mesh=None):
    weight = np.random.default_rng(3).normal(size=(*batch[0].shape, 48)).astype(np.float32)

    def loss(params):
        hidden = nnx.merge(found.graphdef, params)(*batch).hidden
        return jnp.sum(jnp.where(batch[1][..., None] > 0, hidden.astype(jnp.float32) * weight, 0)), hidden

    if mesh is None:
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    params = jax.device_put(params, shardings(mesh, found.params))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lfm2", "lfm2_biases"])
def test_changing_one_segment_changes_no_bit_of_anothers_hidden_states_or_gradients(name, dtype):
    found, params = model(config(name), compute_dtype=dtype)
    tokens, segment_ids, positions = rows()

    def run(tokens):
        def of_embeddings(noise):
            # What the first layer reads is the embedding of each token: a table of its own for each place.
            table = params["embed_tokens"]["weight"]
            decoder = nnx.merge(found.graphdef, params)
            decoder.embed_tokens = lambda ids, dtype: table[...][ids].astype(dtype) + noise.astype(dtype)
            return decoder(tokens, segment_ids, positions).hidden

        noise = jnp.zeros((*tokens.shape, 48))
        hidden, pull = jax.vjp(of_embeddings, noise)
        return hidden, pull(jnp.ones_like(hidden))[0]

    run = jax.jit(run)
    changed = tokens.copy()
    is_other = segment_ids != 2
    changed[~is_other] = (changed[~is_other] + 1) % 67
    for before, after in zip(run(tokens), run(changed), strict=True):
        before, after = np.asarray(before, np.float32), np.asarray(after, np.float32)
        np.testing.assert_array_equal(before[is_other], after[is_other])
        assert (before != after)[~is_other].any(axis=-1).mean() > 0.9


@pytest.mark.parametrize("axes", [dict(context=2, tensor=2, fsdp=2), dict(context=4, data=2), dict(context=8)])
def test_rows_cut_over_context_have_the_loss_and_gradients_of_one_device(axes):
    found, params = model(config("lfm2_biases"))
    mesh = make_mesh(MeshConfig(**axes))
    (loss, hidden), gradients = loss_and_gradients(found, params, rows())
    (cut_loss, cut_hidden), cut_gradients = loss_and_gradients(found, params, rows(), mesh)
    is_token = rows()[1] > 0
    np.testing.assert_allclose(np.asarray(cut_hidden)[is_token], np.asarray(hidden)[is_token], atol=2e-4)
    np.testing.assert_allclose(cut_loss, loss, rtol=1e-4)
    largest = max(float(jnp.linalg.norm(each)) for each in jax.tree.leaves(gradients))
    for given, wanted in zip(jax.tree.leaves(cut_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(np.asarray(given) - wanted) <= 1e-3 * max(np.linalg.norm(wanted), 1e-3 * largest)


@pytest.mark.parametrize("more", [dict(remat="none"), dict(remat="attention"), dict(unroll=True)])
def test_what_is_kept_and_how_layers_are_compiled_changes_nothing(more):
    pattern = [LayerKind(rope=None, mixer="conv"), LayerKind(), LayerKind(rope=None, mixer="conv")]
    structure = dataclasses.replace(config(), layers=tuple(pattern * 2 + pattern[:1]))
    (found, params), (other, _) = model(structure), model(structure, **more)
    expected, given = (loss_and_gradients(each, params, rows()) for each in (found, other))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_gradients_in_bfloat16_are_as_near_as_rounding_lets_them():
    found, params = model(config("lfm2_biases"))
    rounded, _ = model(config("lfm2_biases"), compute_dtype="bfloat16")
    params = jax.tree.map(lambda each: each * 0.2 if each.ndim > 2 else each, params)
    (_, exact), (_, given) = (loss_and_gradients(each, params, rows()) for each in (found, rounded))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(b)


def test_training_a_few_of_layers_that_differ_is_refused_by_name():
    decoder = Decoder(config(), compute_dtype="float32", param_dtype="float32", remat="full", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"layers\.mlp\.up_proj\.weight.*in some layers only.*self_attn, conv"):
        train_only(decoder, ["layers.[56].mlp.up_proj.weight"], lfm2.WEIGHTS)
    train_only(decoder, ["layers.*.conv.*"], lfm2.WEIGHTS)
    assert isinstance(decoder.layers.conv.weight, nnx.Param)
    assert not isinstance(decoder.layers.mlp.up_proj.weight, nnx.Param)
