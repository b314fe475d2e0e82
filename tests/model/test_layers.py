"""Linear maps: those of one input on a mesh that cuts their outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from flax import nnx

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.layers import Linear
from jaxsft.model.products import cast
from jaxsft.training.program import read_program, total_bytes

SIZES = {"l": 1, "d": 64, "n": 8, "k": 4, "h": 16, "f": 96}
MESHES = [{"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "fsdp": 2, "tensor": 2}]


class Projections(nnx.Module):
    """Those of queries, keys and values of one layer, with biases."""

    def __init__(self):
        shared = dict(bias=True, std=0.2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.maps = nnx.List([Linear(f"d -> {heads} h", SIZES, **shared) for heads in "nkk"])
        for each in self.maps:
            each.bias[...] = jax.random.normal(jax.random.key(1), each.bias.shape)


def objective(weights, x, *, graphdef, together):
    """A number that depends on every output, in float32."""
    maps = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], weights)).maps
    ys = Linear.each(maps, x) if together else [each(x) for each in maps]
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32) + number)) for number, y in enumerate(ys))


def gradients_of(mesh, dtype, *, together):
    """By weights, biases and inputs [4, 32, 64] of `dtype`; and the compiled program."""
    graphdef, weights = nnx.split(Projections())
    x = jax.random.normal(jax.random.key(2), (4, 32, SIZES["d"])).astype(dtype)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, shardings(mesh, weights))
        compute = jax.jit(jax.grad(functools.partial(objective, graphdef=graphdef, together=together), argnums=(0, 1)))
        compiled = compute.lower(placed, x).compile(TO_READ)
        gradients = jax.device_get(compiled(placed, x))
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)], compiled


def mesh_of(num_devices, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_maps_of_one_input_have_the_gradients_that_they_have_by_themselves(sizes, dtype):
    expected, _ = gradients_of(mesh_of(1), dtype, together=False)
    ours, _ = gradients_of(mesh_of(8, **sizes), dtype, together=True)
    assert len(ours) == 3 * 2 + 1
    # In bfloat16 an output is now and then rounded to its other side; the gradient by the inputs is rounded in each of
    # its summands.
    tolerances = [1e-5] * 7 if dtype == "float32" else [1e-4] * 6 + [1e-2]
    for each, other, tolerance in zip(ours, expected, tolerances, strict=True):
        assert np.linalg.norm(each - other) < tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gradients_by_one_input_are_reduced_over_tensor_once(sizes):
    mesh = mesh_of(8, **sizes)
    _, compiled = gradients_of(mesh, "float32", together=True)
    totals = total_bytes(read_program(compiled.as_text(), mesh.shape).collectives)
    assert totals["", "all-reduce", ("tensor",)] == (1, 4 * 32 * SIZES["d"] * 4 // (8 // sizes["tensor"]))


def test_weights_are_rounded_to_the_nearest_bfloat16_and_ties_to_even():
    """By their bits: of numbers of all sizes, subnormal and infinite ones, halves, and what rounds to infinity."""
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    bits[: 2**12] >>= 9  # subnormal
    bits[-6:] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000]
    weights = bits.view(np.float32)
    weights = weights[~np.isnan(weights)]
    rounded = np.asarray(jax.jit(cast, static_argnums=1)(weights, jnp.dtype(jnp.bfloat16)))
    halves, ends = weights.view(np.uint32) & 0xFFFF, weights.view(np.uint32) >> 16
    expected = ends + ((halves > 0x8000) | ((halves == 0x8000) & (ends % 2 == 1)))
    np.testing.assert_array_equal(rounded.view(np.uint16), expected)
    assert cast(rounded, jnp.dtype(jnp.float32)).dtype == jnp.float32
