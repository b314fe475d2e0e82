"""The chunked loss against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.model.layers import Logits
from jaxsft.training import chunks
from jaxsft.training.loss import next_token_loss


def plain_loss(hidden, unembedding, targets, weights, logits):
    """The definition, with all logits at once."""
    products = (hidden @ unembedding.T).astype(jnp.float32)[..., : logits.vocab_size] * logits.scale
    if logits.soft_cap is not None:
        products = logits.soft_cap * jnp.tanh(products / logits.soft_cap)
    log_probs = jax.nn.log_softmax(products)
    return -(weights * jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]).sum()


def make_inputs(rows=4, seq_len=24, width=16, vocab_size=40, trained_share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.choice(
        [0.0, 1.0, 0.3], p=[1 - trained_share, trained_share / 2, trained_share / 2], size=(rows, seq_len)
    )
    return (
        jnp.asarray(rng.normal(size=(rows, seq_len, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocab_size, width)), jnp.float32),
        jnp.asarray(rng.integers(0, vocab_size, (rows, seq_len)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def relative_error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


KINDS = [Logits(40), Logits(40, scale=0.3), Logits(40, soft_cap=2.0), Logits(40, scale=1.7, soft_cap=5.0)]


@pytest.mark.parametrize("logits", KINDS, ids=str)
@pytest.mark.parametrize("trained_share", [0.03, 0.5, 1.0])
def test_value_and_gradients_equal_the_plain_formula(monkeypatch, trained_share, logits):
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 1)  # the smallest chunk: 128 tokens
    inputs = make_inputs(rows=8, seq_len=100, trained_share=trained_share)
    hidden, unembedding, targets, weights = inputs

    def chunked(h, u):
        return next_token_loss(h, u, targets, weights, logits=logits).loss_sum

    value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, unembedding)
    expected, expected_gradients = jax.value_and_grad(plain_loss, argnums=(0, 1))(*inputs, logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(chunked)(hidden, unembedding), expected, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected_gradient) < 1e-6


def test_the_other_sums_are_counted_by_hand():
    hidden = jnp.eye(3)[None, :, :] * 5
    unembedding = jnp.eye(3)
    sums = next_token_loss(hidden, unembedding, jnp.array([[0, 2, 2]]), jnp.array([[1.0, 0.5, 0.25]]), logits=Logits(3))
    assert float(sums.weight_sum) == 1.75
    assert float(sums.correct_sum) == 1.25  # the first and the last target are the largest logit
    assert float(sums.trained_tokens) == 3


@pytest.mark.parametrize("logits", [Logits(40), Logits(40, scale=0.5, soft_cap=4.0)], ids=str)
def test_rows_that_only_fill_up_the_table_change_nothing_and_get_no_gradient(logits):
    hidden, unembedding, targets, weights = make_inputs()
    # Were they tokens, they would be by far the likeliest.
    filled = jnp.concatenate([unembedding, 100 * jnp.ones((24, 16)) * jnp.sign(hidden[0, 0])])

    def loss(h, u):
        return next_token_loss(h, u, targets, weights, logits=logits)[:3]

    np.testing.assert_allclose(loss(hidden, unembedding), loss(hidden, filled), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda h, u: loss(h, u)[0], argnums=(0, 1)))
    (by_hidden, by_table), (by_hidden_filled, by_table_filled) = (gradient(hidden, u) for u in (unembedding, filled))
    np.testing.assert_allclose(by_hidden_filled, by_hidden, atol=1e-5)
    np.testing.assert_allclose(by_table_filled[:40], by_table, atol=1e-5)
    assert np.all(np.asarray(by_table_filled[40:]) == 0)


def test_an_all_masked_batch_gives_zero_and_zero_gradients():
    hidden, unembedding, targets, weights = make_inputs()
    hidden = hidden.at[0, 0].set(jnp.nan)  # what is not trained must not be able to matter

    def chunked(h, u):
        return next_token_loss(h, u, targets, weights * 0, logits=Logits(40, soft_cap=3.0)).loss_sum

    value, gradients = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, unembedding)
    assert float(value) == 0
    assert all(float(jnp.abs(gradient).max()) == 0 for gradient in gradients)


@pytest.mark.parametrize("shape", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"context": 2, "tensor": 4}])
@pytest.mark.parametrize("logits", [Logits(40), Logits(33, scale=1.7, soft_cap=5.0)], ids=str)
def test_every_mesh_gives_the_plain_formula(shape, logits):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **shape}))
    hidden, unembedding, targets, weights = make_inputs(rows=8)
    inputs = hidden, unembedding, targets % logits.vocab_size, weights
    targets = inputs[2]

    def chunked(h, u):
        return next_token_loss(h, u, targets, weights, logits=logits).loss_sum

    with jax.set_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, unembedding)
    expected, expected_gradients = jax.value_and_grad(plain_loss, argnums=(0, 1))(*inputs, logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected_gradient) < 1e-6


def temporary_bytes(function, rows):
    inputs = make_inputs(rows=rows, seq_len=512, width=32, vocab_size=8192)
    hidden, unembedding, targets, weights = inputs
    gradient = jax.grad(lambda h, u: function(h, u, targets, weights), argnums=(0, 1))
    return jax.jit(gradient).lower(hidden, unembedding).compile(TO_READ).memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    logits_bytes = 512 * 8192 * 4  # of one more row
    # So many that an eighth of them is as large as a chunk gets.
    rows = (64, 128)
    assert chunks.LOGITS_PER_CHUNK <= 64 * 512 // 8 * 8192
    chunked = [temporary_bytes(lambda *a: next_token_loss(*a, logits=Logits(8192)).loss_sum, n) for n in rows]
    plain = [temporary_bytes(lambda *a: plain_loss(*a, Logits(8192)), n) for n in rows]
    assert chunked[1] - chunked[0] < 0.05 * 64 * logits_bytes
    assert plain[1] - plain[0] > 64 * logits_bytes  # so the measure does see logits


@pytest.mark.parametrize("axes", [None, {"tensor": 4, "fsdp": 2}])
@pytest.mark.parametrize(
    ("rows", "hits"),
    [
        ([[0.0] * 8], 0.0),  # all equal, as after a run that has diverged
        ([[0.0, 3.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0]], 0.0),  # the target and another, on one device or on two
        ([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0]], 0.0),
        ([[0.0, 3.0, 2.9999998, 1.0, 0.0, 0.0, 0.0, 0.0]], 1.0),
        ([[0.0, np.nan, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]], 0.0),
        ([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0, np.nan]], 0.0),
    ],
)
def test_a_tie_is_no_hit(rows, hits, axes):
    """Logits [T, V] = one-hot hidden @ table; the target is token 1 everywhere."""
    num_rows = 8
    table = jnp.asarray(rows, jnp.float32).T
    hidden, targets = jnp.ones((num_rows, 1, 1)), jnp.ones((num_rows, 1), jnp.int32)
    arrays = hidden, jnp.pad(table, ((0, 0), (0, 1))), targets, jnp.ones((num_rows, 1))
    arrays = (jnp.pad(hidden, ((0, 0), (0, 0), (0, 1))), *arrays[1:])
    mesh = make_mesh(MeshConfig(**(axes or {})), jax.devices() if axes else jax.devices()[:1])
    with jax.set_mesh(mesh):
        sums = jax.jit(lambda *each: next_token_loss(*each, logits=Logits(8)))(*arrays)
    assert float(sums.correct_sum) == hits * num_rows
