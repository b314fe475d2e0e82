"""Attention on one device against the naive formula; positions cut over devices are test_context.py's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from naive_attention import naive

from jaxsft.model import attention as module
from jaxsft.model.attention import attention
from jaxsft.model.needed import SMALL_IN_LARGE, Cut, Kind, Rule, needed_tiles
from jaxsft.model.remat import POLICIES

SEGMENTS = np.array([[1] * 11 + [2] * 17 + [3] * 5 + [0] * 4, [1] * 37], np.int32)
POSITIONS = np.array([[*range(11), *range(17), *range(5), *range(4)], [*range(37)]], np.int32)


STATIC = ("block_size", "scale", "window", "soft_cap")


@functools.partial(jax.jit, static_argnames=STATIC)
def packed(q, k, v, segment_ids=SEGMENTS, positions=POSITIONS, block_size=512, **options):
    return attention(
        q,
        k,
        v,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        q_positions=positions,
        kv_positions=positions,
        block_size=block_size,
        **options,
    )


@functools.partial(jax.jit, static_argnames=("function", *STATIC))
def with_gradients(function, cotangent, arrays, sinks=None, **options):
    """Value [B, T, N, H], and the gradients of its product with the cotangent, by arrays and sinks, in one program."""

    def of(*arrays):
        more = {} if sinks is None else {"sinks": arrays[3]}
        return function(*arrays[:3], SEGMENTS, POSITIONS, **more, **options)

    value, vjp = jax.vjp(of, *arrays, *([] if sinks is None else [sinks]))
    return value, vjp(cotangent)


SINKS = np.array([0.3, -2.0, 5.0, 0.0, 1.0, -0.5], np.float32)


@functools.cache
def of_formula(num_kv_heads=2, *, with_sinks=False, options=()):
    """What `with_gradients` gives of the naive formula, for the arrays and the cotangent of the tests."""
    arrays = qkv(num_kv_heads=num_kv_heads)
    found = with_gradients(naive, cotangent_of(arrays), arrays, SINKS if with_sinks else None, **dict(options))
    return jax.device_get(found)


@pytest.fixture(autouse=True, scope="module", params=["on one CPU", "elsewhere"])
def place(request):
    """Both ways of computing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "on_one_device", lambda: request.param == "on one CPU")
        yield
    for compiled in (packed, with_gradients):
        compiled.clear_cache()


def qkv(num_heads=6, num_kv_heads=2, head_dim=8, length=37, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def cotangent_of(arrays):
    return jax.random.normal(jax.random.key(1), arrays[0].shape, arrays[0].dtype)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("block_size", [2, 4, 5, 9, 37, 512])
def test_equals_the_naive_formula_in_value_and_gradients_for_every_block_size(num_kv_heads, block_size):
    arrays = qkv(num_kv_heads=num_kv_heads)
    expected, expected_gradients = of_formula(num_kv_heads)
    given, gradients = with_gradients(packed, cotangent_of(arrays), arrays, block_size=block_size)
    np.testing.assert_allclose(given, expected, atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


OPTIONS = [
    {"scale": 0.7},
    {"window": 1},
    {"window": 4},
    {"window": 9},
    {"soft_cap": 0.5},
    {"window": 6, "soft_cap": 1.5, "scale": 2.0},
]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("block_size", [2, 512])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_windows_soft_caps_scales_and_sinks_equal_the_naive_formula(options, block_size, with_sinks):
    arrays, sinks = qkv(), SINKS if with_sinks else None
    expected, expected_gradients = of_formula(with_sinks=with_sinks, options=tuple(options.items()))
    given, gradients = with_gradients(packed, cotangent_of(arrays), arrays, sinks, block_size=block_size, **options)
    np.testing.assert_allclose(given, expected, atol=3e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("place", ["elsewhere"], indirect=True)
def test_a_window_spares_the_work_of_keys_out_of_reach(place):
    """Elsewhere only: on one CPU, which keys are in reach is known when it runs (the test below)."""

    def flops(window):
        arrays = [jax.ShapeDtypeStruct((1, 2048, heads, 16), jnp.float32) for heads in (4, 2, 2)]
        ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        compiled = packed.lower(*arrays, ids, ids, block_size=128, window=window).compile(TO_READ)
        # The loop over blocks is counted once, so this is the work of a block.
        return compiled.cost_analysis()["flops"]

    assert flops(64) < 0.2 * flops(None)


@pytest.mark.parametrize("place", ["on one CPU"], indirect=True)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("lengths", [[[3, 29, 1, 14, 17], [64]], [[40, 24], [9, 9, 9, 9, 9, 9, 10]]])
def test_tiles_hold_every_allowed_pair_once_and_none_is_without(lengths, window, place):
    tile, side = 2, 2 * SMALL_IN_LARGE
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths], np.int32)
    segment_ids = np.array([np.repeat(np.arange(len(row)), row) for row in lengths], np.int32)
    rule = Rule(1.0, window, None)
    allowed = np.asarray(rule.allowed((segment_ids, segment_ids), (positions, positions)))
    cut, order = Cut(tile, SMALL_IN_LARGE, 64, on_mesh=False), jnp.zeros(1, jnp.int32)
    found = needed_tiles(rule, cut, jnp.asarray(positions), order, order)
    needed = {kind: np.asarray(of_kind) for kind, of_kind in found}
    on, off, small = (Kind(side, True), Kind(side, False), Kind(tile, False))
    assert set(needed) == {on, off, small}

    computed = np.zeros_like(allowed, int)
    for kind, of_kind in needed.items():
        for row, query, key in zip(*(x.tolist() for x in of_kind.nonzero()), strict=True):
            assert query == key if kind == on else query > key or kind == small
            for first, num_queries, num_keys in kind.strips():
                start = query * kind.size + first
                computed[row, start : start + num_queries, key * kind.size : key * kind.size + num_keys] += 1
    assert computed.max() == 1 and np.all(computed[allowed] == 1)

    filled = allowed.reshape(2, 64 // tile, tile, 64 // tile, tile).any((2, 4))
    large = needed[on] | needed[off]
    assert np.array_equal(needed[small], filled & ~np.kron(large, np.ones((1, 8, 8), bool)))
    share = filled.reshape(2, 4, 8, 4, 8).mean((2, 4))
    assert np.array_equal(large, share >= np.where(np.eye(4), 10 / 16, 1) / 2)
    assert window is not None or (needed[on].any() and needed[off].any())


def test_padding_gives_no_nan_in_value_or_gradients_even_with_huge_scores():
    arrays = qkv(scale=1e3)
    for block_size in (5, 512):

        @jax.jit
        def run(segment_ids, block_size=block_size):
            given, vjp = jax.vjp(lambda *a: packed(*a, segment_ids, block_size=block_size), *arrays)
            return given, vjp(jnp.ones_like(given))

        for segment_ids in (SEGMENTS, np.zeros_like(SEGMENTS)):
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(segment_ids)))


@pytest.mark.parametrize("block_size", [2, 512])
def test_no_segment_feels_another(block_size):
    arrays = qkv()

    @functools.partial(jax.jit, static_argnames="block_size")
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q, k, v, segment, block_size):
        out = packed(q, k, v, block_size=block_size)
        return jnp.where((segment == SEGMENTS)[:, :, None, None], out, 0).sum()

    for segment in (1, 2, 3):
        for gradient in gradients(*arrays, segment, block_size):
            assert np.all(np.asarray(gradient)[segment != SEGMENTS] == 0)
            assert np.any(np.asarray(gradient)[segment == SEGMENTS] != 0)

    changed = [jnp.where((SEGMENTS == 2)[:, :, None, None], x + 3, x) for x in arrays]
    before, after = (np.asarray(packed(*x, block_size=block_size)) for x in (arrays, changed))
    np.testing.assert_array_equal(before[SEGMENTS != 2], after[SEGMENTS != 2])


def test_queries_against_a_longer_cache_equal_the_same_queries_in_the_sequence():
    q, k, v = qkv()
    expected = packed(q, k, v)[:, 20:30]
    room = [(0, 0), (0, 9)]
    given = attention(
        q[:, 20:30],
        *(jnp.pad(x, [*room, (0, 0), (0, 0)]) for x in (k, v)),
        q_segment_ids=SEGMENTS[:, 20:30],
        kv_segment_ids=np.pad(SEGMENTS, room),
        q_positions=POSITIONS[:, 20:30],
        kv_positions=np.pad(POSITIONS, room),
        block_size=4,
    )
    np.testing.assert_allclose(given, expected, atol=2e-6)


@pytest.mark.parametrize("block_size", [4, 512])
def test_bfloat16_in_bfloat16_out_with_a_float32_softmax(block_size):
    arrays = [x.astype(jnp.bfloat16) for x in qkv()]
    exact = [x.astype(jnp.float32) for x in arrays]
    cotangent = cotangent_of(arrays)
    given, gradients = with_gradients(packed, cotangent, arrays, block_size=block_size)
    expected, expected_gradients = with_gradients(naive, cotangent.astype(jnp.float32), exact)
    for ours, other in zip([given, *gradients], [expected, *expected_gradients], strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), other, atol=0.03 * np.abs(other).max())


def test_memory_of_the_backward_pass_grows_linearly_with_the_length():
    def bytes_at(length):
        arrays = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (4, 2, 2)]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.grad(lambda q, k, v, s, p: packed(q, k, v, s, p, 64).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(*arrays, ids, ids).compile(TO_READ).memory_analysis().temp_size_in_bytes

    assert bytes_at(8192) < 4.5 * bytes_at(2048)


@pytest.mark.parametrize("place", ["on one CPU"], indirect=True)
@pytest.mark.parametrize(("remat", "num_loops"), [("none", 4), ("attention", 4), ("full", 6)])
def test_what_a_layer_keeps_spares_its_backward_pass_the_loops_of_the_forward_pass(remat, num_loops, place):
    """There are two sizes of tiles, so two loops each time; and the loops over layers, without which XLA would see that
    a layer is computed twice."""

    def loss(q, k, v):
        layer = jax.checkpoint(lambda *a: packed(*a, block_size=4), policy=POLICIES[remat], prevent_cse=False)
        return (jax.lax.scan(lambda q, _: (layer(q, k, v), None), q, length=3)[0] ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv()).compile(TO_READ)
    assert compiled.as_text().count(" while(") == 2 + num_loops


@pytest.mark.parametrize("place", ["on one CPU"], indirect=True)
@pytest.mark.parametrize("lengths", [[20], [3, 2, 4, 1, 2, 3, 2, 3]], ids=["needed", "not needed"])
def test_the_only_large_tile_of_a_row_is_computed_where_it_is_needed_and_nowhere_else(lengths, place):
    """Of a loop that can only be over one tile, XLA would take the matmuls out, and run them always."""
    segment_ids = jnp.repeat(jnp.arange(len(lengths)), jnp.array(lengths))[None] + 1
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    arrays = [x[:1, :20] for x in qkv()]
    cotangent = cotangent_of(arrays)

    def gradients(function, **more):
        def run(arrays):
            return jax.vjp(lambda *a: function(*a, segment_ids, positions, **more), *arrays)[1](cotangent)

        return jax.jit(run).lower(arrays).compile(TO_READ)

    compiled = gradients(packed, block_size=2)
    for ours, theirs in zip(compiled(arrays), gradients(naive)(arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert compiled.as_text().count(" conditional(") == 2
    assert compiled.as_text().count(" while(") == 2
