"""The loss over blocks of the vocabulary, on meshes that cut the table, against the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from jax.sharding import NamedSharding
from meshes import factorisations

from jaxsft.config import MeshConfig
from jaxsft.mesh import AXES, WIDTH_AXES, make_mesh, partition_spec
from jaxsft.model.layers import Logits
from jaxsft.training import chunks, loss_in_blocks
from jaxsft.training.loss import next_token_loss
from jaxsft.training.loss_in_blocks import block_rows
from jaxsft.training.program import read_program

NUM_DEVICES = 8


def plain_loss(hidden, unembedding, targets, weights, logits):
    """The definition, with all logits at once."""
    products = (hidden @ unembedding.T).astype(jnp.float32)[..., : logits.vocab_size] * logits.scale
    if logits.soft_cap is not None:
        products = logits.soft_cap * jnp.tanh(products / logits.soft_cap)
    log_probs = jax.nn.log_softmax(products)
    picked = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    is_right = products.argmax(axis=-1) == targets
    return -(weights * picked).sum(), (weights * is_right).sum()


SHAPES = [
    shape
    for shape in factorisations(NUM_DEVICES, len(AXES))
    if any(size > 1 for axis, size in zip(AXES, shape, strict=True) if axis in WIDTH_AXES)
]
WIDTH = 16
KINDS = [
    Logits(88),
    Logits(88, scale=0.3),
    Logits(81, soft_cap=2.0),
    Logits(70, scale=1.7, soft_cap=5.0),  # most rows of the last device along tensor are no tokens
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every table is large, and every chunk the smallest; blocks of 88 rows and of 44 are no multiples of theirs."""
    monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 6 * WIDTH)
    assert [loss_in_blocks.block_rows(number, WIDTH) for number in (88, 44, 22)] == [6, 5, 2]
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 1)


def make_inputs(logits, rows=8, seq_len=320, width=WIDTH, num_rows=88, seed=0):
    """Row r is trained in about r / 8 of its positions: row 0 in none, so that devices differ."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([1.0, 0.3], size=(rows, seq_len)) * (
        rng.random((rows, seq_len)) < np.arange(rows)[:, None] / 8
    )
    return (
        jnp.asarray(rng.normal(size=(rows, seq_len, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(num_rows, width)), jnp.float32),
        jnp.asarray(rng.integers(0, logits.vocab_size, (rows, seq_len)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def relative_error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@functools.cache
def expected_of(logits):
    inputs = make_inputs(logits)
    return jax.value_and_grad(plain_loss, argnums=(0, 1), has_aux=True)(*inputs, logits)


def value_and_gradients(mesh, logits, inputs):
    hidden, unembedding, targets, weights = inputs

    def loss(hidden, unembedding):
        sums = next_token_loss(hidden, unembedding, targets, weights, logits=logits)
        return sums.loss_sum, sums

    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, unembedding)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda number: "x".join(map(str, SHAPES[number])))
def test_every_mesh_that_cuts_the_table_gives_the_plain_formula(number):
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, SHAPES[number], strict=True))))
    logits = KINDS[number % len(KINDS)]
    inputs = make_inputs(logits)
    (value, sums), gradients = value_and_gradients(mesh, logits, inputs)
    (expected, hits), expected_gradients = expected_of(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(sums.correct_sum, hits, rtol=1e-6)
    np.testing.assert_allclose(sums.weight_sum, inputs[-1].sum(), rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected_gradient) < 1e-5
    assert not gradients[0][0].any()  # a row without a trained token
    assert not gradients[1][logits.vocab_size :].any()


@pytest.mark.parametrize("logits", KINDS, ids=str)
def test_the_value_alone_is_that_with_gradients(logits):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    inputs = make_inputs(logits)
    with jax.set_mesh(mesh):
        sums = jax.jit(functools.partial(next_token_loss, logits=logits))(*inputs)
    expected, hits = expected_of(logits)[0]
    np.testing.assert_allclose(sums.loss_sum, expected, rtol=1e-6)
    np.testing.assert_allclose(sums.correct_sum, hits, rtol=1e-6)


def test_a_batch_without_a_trained_token_gives_zeros():
    hidden, unembedding, targets, weights = make_inputs(Logits(88))
    hidden = hidden.at[0, 0].set(jnp.nan)  # what is not trained must not be able to matter
    inputs = hidden, unembedding, targets - 100, weights * 0
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    (value, sums), gradients = value_and_gradients(mesh, Logits(88, soft_cap=3.0), inputs)
    assert float(value) == float(sums.correct_sum) == 0
    assert not any(gradient.any() for gradient in gradients)


def test_a_table_that_is_embedding_too_gets_both_gradients():
    """Tied: the same array is looked up and multiplied with."""
    logits = Logits(88)
    _, table, targets, weights = make_inputs(logits)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))

    def loss(table):
        return next_token_loss(jnp.sin(table)[targets], table, targets, weights, logits=logits).loss_sum

    with jax.set_mesh(mesh):
        placed = jax.device_put(table, NamedSharding(mesh, partition_spec("v d")))
        gradient = jax.jit(jax.grad(loss))(placed)
    expected = jax.grad(lambda table: plain_loss(jnp.sin(table)[targets], table, targets, weights, logits)[0])(table)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize(
    ("logits", "hits"),
    [
        ([0.0] * 16, 0.0),  # all equal, as after a run that has diverged
        ([0.0, 3.0, 3.0] + [0.0] * 13, 0.0),  # the target and another, in neighbouring blocks
        ([0.0, 3.0] + [0.0] * 13 + [3.0], 0.0),  # in the first and the last block
        ([0.0, 3.0, 2.9999998] + [0.0] * 13, 1.0),
        ([0.0, 3.0] + [0.0] * 13 + [np.nan], 0.0),
    ],
)
def test_a_tie_is_no_hit(monkeypatch, logits, hits, axes):
    """Logits = one-hot hidden @ table, in blocks of one row; the target is token 1 everywhere."""
    monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 1)
    table = jnp.zeros((16, 8)).at[:, 0].set(jnp.asarray(logits))
    hidden = jnp.zeros((8, 1, 8)).at[..., 0].set(1.0)
    targets = jnp.ones((8, 1), jnp.int32)
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        step = jax.jit(functools.partial(next_token_loss, logits=Logits(16)))
        sums = step(hidden, table, targets, jnp.ones((8, 1)))
    assert float(sums.correct_sum) == hits * 8


def test_no_array_is_larger_than_an_eighth_of_the_table(monkeypatch):
    """By the compiled program, whose shapes are those of one device; neither is there one of [tokens, vocabulary]."""
    vocab_size, width, num_tokens = 8192, 64, 1024
    mesh = make_mesh(MeshConfig(fsdp=8))

    def largest(table_at_once):
        monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", table_at_once)

        def gradients(hidden, unembedding, targets, weights):
            def loss(hidden, unembedding):
                return next_token_loss(hidden, unembedding, targets, weights, logits=Logits(vocab_size)).loss_sum

            return jax.grad(loss, argnums=(0, 1))(hidden, unembedding)

        def placed(shape, dtype, axes):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

        rows = (8, num_tokens // 8)
        with jax.set_mesh(mesh):
            lowered = jax.jit(
                gradients, out_shardings=tuple(NamedSharding(mesh, partition_spec(axes)) for axes in ("b t d", "v d"))
            ).lower(
                placed((*rows, width), jnp.float32, "b t d"),
                placed((vocab_size, width), jnp.float32, "v d"),
                placed(rows, jnp.int32, "b t"),
                placed(rows, jnp.float32, "b t"),
            )
        return max(array.num_bytes for array in read_program(lowered.compile(TO_READ).as_text(), mesh.shape).arrays)

    table_bytes = 4 * vocab_size * width
    assert largest(1) <= table_bytes // 8
    assert largest(2**25) >= table_bytes  # held whole, so the measure does see it


@pytest.mark.parametrize("width", [1024, 4096, 8192])
@pytest.mark.parametrize("num_rows", [32000, 49152, 128256, 151936, 256000, 32064, 64128])
def test_blocks_are_an_eighth_at_most_and_hardly_overlap(monkeypatch, num_rows, width):
    monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 2**25)
    rows = block_rows(num_rows, width)
    assert rows % 128 == 0 and rows <= num_rows // 8 and rows * width <= 2**25
    num_blocks = -(-num_rows // rows)
    assert num_blocks * rows - num_rows < 128 * num_blocks  # what would be even is rounded up to whole tiles


def test_few_rows_are_cut_evenly_too(monkeypatch):
    monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 2**25)
    assert [block_rows(num_rows, 16) for num_rows in (5, 8, 44, 88)] == [1, 1, 5, 11]
