"""Matrix products of a traced program, counted: against XLA where it can count, and against formulas where not."""

import jax
import jax.numpy as jnp
import pytest
from compilation import AS_FOR_USERS
from jax.sharding import PartitionSpec

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.training.matmuls import read_matmuls

X, W = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
ONE = 2 * 32 * 64 * 64


def flops(function, *arrays):
    return sum(each.flops for each in read_matmuls(jax.jit(function).trace(*arrays)))


def test_they_are_those_that_xla_counts():
    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.sin(jnp.einsum("ab,bc,dc->ad", x, w, x)).sum(), (0, 1))(x, w)

    counted = jax.jit(gradients).lower(X, W).compile(AS_FOR_USERS).cost_analysis()["flops"]
    assert flops(gradients, X, W) == pytest.approx(counted, rel=0.02)  # XLA counts additions of gradients, too


def test_a_batched_product_counts_each_of_its_products():
    batched = jax.ShapeDtypeStruct((5, 64, 8), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.einsum("eab,eac->ebc", a, b)).trace(batched, batched)
    (only,) = read_matmuls(product)
    assert (only.flops, only.shape, only.dtype) == (2 * 5 * 64 * 8 * 8, (5, 8, 8), "bfloat16")


def test_a_loop_counts_as_often_as_it_turns_and_an_open_one_once():
    assert flops(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0], X, W) == 7 * ONE
    traced = jax.jit(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)).trace(X, W, 3)
    assert [(each.flops, each.is_open) for each in read_matmuls(traced)] == [(ONE, True)]


def test_an_open_loop_is_known_by_how_often_it_begins():
    mesh, rows = make_mesh(MeshConfig(data=8)), PartitionSpec("data")

    def open_loop(x, w, n):
        inner = lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=2)[0]  # noqa: E731
        return jax.lax.fori_loop(0, n, lambda _, x: inner(x), x)

    def layers(x, w, n):
        by_hand = jax.shard_map(
            lambda x: jax.lax.scan(lambda x, _: (open_loop(x, w, n), None), x, length=5)[0],
            mesh=mesh,
            in_specs=rows,
            out_specs=rows,
        )
        return jax.lax.scan(lambda x, _: (by_hand(x), None), x, length=3)[0]

    (only,) = read_matmuls(jax.jit(layers).trace(X, W, 4))
    assert (only.flops, only.is_open, only.runs) == (2 * ONE // 8, True, 3)


def test_what_no_result_needs_does_not_count():
    """As in a step whose backward pass makes gradients of weights that are not trained, in a loop over layers."""

    def loss(w, frozen, x):
        return jax.lax.scan(lambda x, _: (x @ w @ frozen, None), x, length=3)[0].sum()

    def both(x, w, frozen):
        return jax.grad(loss, (0, 1))(w, frozen, x)

    assert flops(both, X, W, W) == 18 * ONE
    assert flops(lambda *given: both(*given)[0], X, W, W) == 15 * ONE


def test_of_branches_the_largest_counts():
    assert flops(lambda x, w, b: jax.lax.cond(b, lambda: x @ w @ w, lambda: x @ w), X, W, True) == 2 * ONE


def test_all_devices_count():
    mesh = make_mesh(MeshConfig(data=8))
    rows = PartitionSpec("data")

    def by_hand(x, w):
        return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, w)

    assert flops(by_hand, X, W) == ONE


def test_what_remat_computes_again_is_known():
    def gradient(x, w):
        block = jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)
        return jax.grad(lambda x: jnp.sin(block(x)).sum())(x)

    matmuls = read_matmuls(jax.jit(gradient).trace(X, W))
    # Forward 2, backward 2 by x; of the forward ones, only the first is needed again.
    assert [each.flops for each in matmuls] == [ONE] * 5
    assert sum(each.is_again for each in matmuls) == 1
