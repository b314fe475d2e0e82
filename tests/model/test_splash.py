"""Splash attention, interpreted on CPU devices, against the naive formula; and which attention is chosen where."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from naive_attention import naive

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.mesh import AXES, make_mesh
from jaxsft.model.attention import attention, choose_kernel
from jaxsft.model.balance import balanced_order
from jaxsft.model.splash import LANES, Places, block_sizes, even_block, largest_block

LENGTH = 240
"""Two blocks of 128, of which the second is filled up; chunks of 30 on 4 devices, of 60 on 2."""


def packed_rows(num_rows=2, length=LENGTH):
    """Segments and positions: examples over blocks and in them, of one token and of many, with padding and without."""
    lengths = [[100, 1, 60, 40], [length], [3] * 20 + [130, 2], [length // 2] * 2]
    segment_ids, positions = np.zeros((2, num_rows, length), np.int32)
    for row in range(num_rows):
        bounds = np.cumsum([0, *lengths[row % len(lengths)]])
        for number, (start, end) in enumerate(itertools.pairwise([*bounds, length]), 1):
            segment_ids[row, start:end] = number if number < len(bounds) else 0
            positions[row, start:end] = np.arange(end - start)
    return segment_ids, positions


def arrays_of(num_heads=4, num_kv_heads=2, num_rows=2, dtype=jnp.float32):
    """q, k, v, sinks, and the cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(num_rows, LENGTH, heads, 16) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    shapes += [(num_heads,), (num_rows, LENGTH, num_heads, 16)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def value_and_gradients(function, arrays):
    @jax.jit
    def run(*arrays):
        value, vjp = jax.vjp(function, *arrays[:-1])
        return value, vjp(arrays[-1])

    return run(*arrays)


def splash(q, k, v, sinks, *, order=None, with_sinks=False, kernel="splash", **options):
    """Of rows whose chunks are put into an order and taken out of it again."""
    places = np.arange(LENGTH)
    if order is not None:
        places = places.reshape(len(order), -1)[np.array(order)].reshape(-1)
    segment_ids, positions = (each[:, places] for each in packed_rows(len(q)))
    out = attention(
        *(x[:, places] for x in (q, k, v)),
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        q_positions=positions,
        kv_positions=positions,
        sinks=sinks if with_sinks else None,
        order=order,
        block_size=LANES,
        kernel=kernel,
        **options,
    )
    return out[:, np.argsort(places)]


def by_formula(q, k, v, sinks, *, with_sinks=False, **options):
    q, k, v, sinks = (x.astype(jnp.float32) for x in (q, k, v, sinks))
    return naive(q, k, v, *packed_rows(len(q)), sinks=sinks if with_sinks else None, **options)


def assert_equal(ours, theirs, tolerance=2e-6):
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        our, their = np.asarray(our, np.float32), np.asarray(their, np.float32)
        assert np.isfinite(our).all() and np.abs(our - their).max() <= tolerance * np.abs(their).max()


def assert_as_by_formula(arrays, *, order=None, tolerance=2e-6, **options):
    ours = value_and_gradients(functools.partial(splash, order=order, **options), arrays)
    theirs = value_and_gradients(functools.partial(by_formula, **options), [x.astype(jnp.float32) for x in arrays])
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {arrays[0].dtype}
    assert_equal(ours, theirs, tolerance)


OPTIONS = [
    {},
    {"window": 1, "with_sinks": True},
    {"window": 50, "scale": 0.7},
    {"window": 129, "soft_cap": 1.5, "with_sinks": True},
]


@pytest.fixture(params=[0, 2**28], ids=["two backward kernels", "one backward kernel"])
def backward(request, monkeypatch):
    monkeypatch.setattr("jaxsft.model.splash.FUSED_BYTES", request.param)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_formula_in_value_and_gradients(options, backward):
    assert_as_by_formula(arrays_of(), **options)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (3, 1), (6, 2)])
def test_queries_are_grouped_as_they_are_elsewhere(num_heads, num_kv_heads):
    assert_as_by_formula(arrays_of(num_heads, num_kv_heads, num_rows=1))


def test_equals_our_own_attention():
    arrays = arrays_of()
    for options in OPTIONS[1:]:
        ours, theirs = (
            value_and_gradients(functools.partial(splash, kernel=kernel, **options), arrays)
            for kernel in ("splash", "xla")
        )
        assert_equal(ours, theirs)


MESHES = [
    ({"fsdp": 2, "context": 2, "tensor": 2}, OPTIONS[3]),
    ({"data": 2, "context": 4}, OPTIONS[0]),
    ({"context": 8}, OPTIONS[2]),
    ({"data": 2, "expert": 2, "tensor": 2}, OPTIONS[1]),
]


@pytest.mark.parametrize(("axes", "options"), MESHES, ids=str)
def test_every_mesh_computes_what_one_device_does(axes, options):
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        order = balanced_order(4, LENGTH)
        assert (order is None) == ("context" not in axes)
        assert_as_by_formula(arrays_of(num_rows=4), order=order, **options)


@pytest.mark.parametrize("order", [None, (5, 0, 3, 7, 1, 2, 6, 4)], ids=str)
def test_chunks_of_a_row_may_lie_in_any_order(order, backward):
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        assert_as_by_formula(arrays_of(), order=order, window=50)


def test_bfloat16_is_as_near_as_its_rounding_and_summed_up_in_float32_over_devices():
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        arrays = arrays_of(dtype=jnp.bfloat16)
        assert_as_by_formula(arrays, order=balanced_order(2, LENGTH), with_sinks=True, window=50, tolerance=0.02)
        traced = jax.make_jaxpr(functools.partial(value_and_gradients, splash))(arrays)
    reduced = [line for line in str(traced).splitlines() if " reduce_scatter" in line]
    assert len(reduced) == 2 and all(":f32[" in line for line in reduced)


def test_no_segment_feels_another():
    segment_ids, _ = packed_rows(1)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q, k, v, segment):
        out = splash(q, k, v, None)
        return jnp.where((segment == segment_ids)[:, :, None, None], out, 0).sum()

    arrays = arrays_of(num_rows=1)[:3]
    for segment in (1, 2, 3, 4):
        for gradient in gradients(*arrays, segment):
            assert np.all(np.asarray(gradient)[segment_ids != segment] == 0)
            assert np.any(np.asarray(gradient)[segment_ids == segment] != 0)


# Blocks.


@pytest.mark.parametrize(
    ("size", "largest", "block"),
    [(4096, 512, 512), (3000, 512, 512), (2176, 512, 384), (100, 512, 128), (640, 1024, 768), (8192, 1024, 1024)],
)
def test_blocks_fill_up_little(size, largest, block):
    assert even_block(size, largest) == block


def test_any_row_goes_in_blocks_that_the_kernels_take_and_fills_up_less_than_half_of_the_largest():
    for size, largest in itertools.product(range(1, 6000, 37), (128, 256, 512, 1024)):
        block = even_block(size, largest)
        assert block % LANES == 0 and block <= largest
        filled = -(-size // block) * block
        assert filled - size < max(LANES, min(size, largest / 2)), (size, largest, block)
        blocks = block_sizes(Places((0,), 1, size, largest, None), own_bytes=1)
        assert blocks.block_kv_compute % LANES == 0 and blocks.block_kv % blocks.block_kv_compute == 0


def test_one_backward_kernel_is_for_rows_whose_gradients_are_small():
    def is_fused(length, own_bytes):
        return block_sizes(Places((0,), 1, length, 512, None), own_bytes).use_fused_bwd_kernel

    row = 32 * 128 * 2  # bytes of a query of 8B in bfloat16
    assert is_fused(4096, 4096 * row) and not is_fused(8192, 8192 * row) and not is_fused(4096, 2 * 4096 * row)


@pytest.mark.parametrize("window", [None, 40, 128])
def test_places_are_those_of_the_row_whatever_the_order(window):
    order = (2, 0, 3, 1)
    places = Places(order, 2, 200, 128, window)
    row = np.arange(200).reshape(4, 50)[list(order)].reshape(2, 100)
    queries = places.q_sequence.reshape(2, 128)
    np.testing.assert_array_equal(queries[:, :100], row)
    assert (queries[:, 100:] == row[:, -1:]).all()
    back = queries.reshape(-1, 1) - np.arange(256)
    expected, kinds = (back >= 0) & (back < (window or 256)), set()
    for step in (1, 64, 128, 256):
        for query, key in itertools.product(range(0, 256, step), range(0, 256, step)):
            at = slice(query, query + step), slice(key, key + step)
            block = places[at]
            kinds.add((step, block.size == 1, bool(block.any())))
            np.testing.assert_array_equal(np.broadcast_to(block, (step, step)), expected[at])
    assert {(64, False, True), (64, True, False)} <= kinds  # in part and not at all


# The choice.


def chosen(wanted, platform, *, shape=(8, 4096, 32, 128), num_kv_heads=8, dtype=jnp.bfloat16, mesh=(1, 8, 1, 1, 1)):
    """What is chosen on a mesh of devices that are not there."""
    kind = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H100", "cpu": "cpu"}[platform]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh(mesh, AXES, axis_types=(AxisType.Auto,) * 5, abstract_device=device)
    k = jax.ShapeDtypeStruct((*shape[:2], num_kv_heads, shape[3]), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        return choose_kernel(wanted, jax.ShapeDtypeStruct(shape, dtype), k)


def test_auto_takes_splash_on_tpus_and_our_own_elsewhere():
    assert chosen("auto", "tpu") == ("splash", "TPU v5 lite, blocks of up to 512")
    assert chosen("auto", "gpu").kernel == "xla"  # of the reasons is test_cudnn.py
    assert chosen("auto", "cpu").kernel == "xla"
    assert chosen("xla", "tpu") == ("xla", "as asked for")
    assert chosen("splash", "cpu").kernel == "splash"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": jnp.dtype("float32")}, "on TPUs it multiplies in bfloat16, and model.compute_dtype is float32"),
        ({"shape": (9, 4096, 32, 128)}, "the mesh does not cut 9 b, 4096 t, 32 n, 128 h evenly"),
        ({"num_kv_heads": 2, "mesh": (1, 2, 1, 1, 4)}, "the mesh does not cut 8 b, 4096 t, 2 k, 128 h evenly"),
    ],
    ids=str,
)
def test_what_splash_cannot_do_is_done_by_our_own_and_refused_where_splash_is_asked_for(options, why):
    assert chosen("auto", "tpu", **options) == ("xla", why)
    with pytest.raises(ConfigError, match="model.attention: splash, but") as caught:
        chosen("splash", "tpu", **options)
    assert why in str(caught.value)
    with pytest.raises(ConfigError, match="it runs on TPUs, not on NVIDIA H100"):
        chosen("splash", "gpu")


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_wider_heads_have_no_larger_blocks(kind):
    sizes = [largest_block(kind, head_dim) for head_dim in (64, 128, 192, 256, 512)]
    assert sizes == sorted(sizes, reverse=True)
