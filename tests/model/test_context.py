"""Positions cut over devices: rows in balanced order and in any other, and attention as that of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import factorisations
from naive_attention import naive

from jaxsft.config import MeshConfig
from jaxsft.mesh import AXES, make_mesh
from jaxsft.model import attention as module
from jaxsft.model.attention import attention
from jaxsft.model.balance import balance, balanced_order, restore
from jaxsft.model.needed import SMALL_IN_LARGE, Cut, Rule, needed_tiles

# The order of a row.


@pytest.mark.parametrize("size", range(2, 9))
def test_a_row_is_balanced_in_pairs_from_both_ends_and_comes_back(size):
    mesh = make_mesh(MeshConfig(context=size), jax.devices()[:size])
    x = np.arange(2 * 2 * size * 3).reshape(2, -1, 3)  # two rows, in chunks of one position
    with jax.set_mesh(mesh):
        order = balanced_order(*x.shape[:2])
        balanced = jax.jit(lambda x: balance(x, "b t h"))(x)
        back = jax.jit(lambda x: restore(x, "b t h"))(balanced)
    assert list(order) == [chunk for device in range(size) for chunk in (device, 2 * size - 1 - device)]
    np.testing.assert_array_equal(balanced, x[:, order])
    np.testing.assert_array_equal(back, x)
    assert {shard.data.shape for shard in balanced.addressable_shards} == {(2, 2, 3)}


def test_a_row_stays_as_it_is_where_it_cannot_be_balanced():
    assert balanced_order(4, 16) is None  # without a mesh
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        assert balanced_order(8, 16) is None
    with jax.set_mesh(make_mesh(MeshConfig(context=4, fsdp=2))):
        assert balanced_order(2, 16) is not None
        assert balanced_order(2, 12) is None and balanced_order(3, 16) is None


def pairs_computed(order, size, chunk, tile, window=None):
    """Of each device along `context`, for one example over the whole row: pairs of the tiles that it computes."""
    cut, order = Cut(tile, SMALL_IN_LARGE, chunk, on_mesh=True), jnp.asarray(order)
    own = np.asarray(order).reshape(size, -1)
    pairs = []
    for device in own:
        positions = (device[:, None] * chunk + np.arange(chunk)).reshape(1, -1)
        needed = needed_tiles(
            Rule(1.0, window, None), cut, jnp.asarray(positions), jnp.asarray(device), jnp.asarray(order)
        )
        pairs.append(sum(int(of_kind.sum()) * 2 * kind.enough() for kind, of_kind in needed))
    return pairs


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_device_has_the_same_causal_work_in_balanced_order(size):
    with jax.set_mesh(make_mesh(MeshConfig(context=size), jax.devices()[:size])):
        order = balanced_order(1, 2 * size * 64)
    balanced, in_a_row = (pairs_computed(each, size, 64, 4) for each in (order, jnp.arange(2 * size)))
    assert len(set(balanced)) == 1 and sum(balanced) == sum(in_a_row)
    assert in_a_row[-1] == max(in_a_row) > (2 - 1.3 / size) * balanced[0]
    assert max(pairs_computed(order, size, 64, 4, window=8)) < 0.6 * balanced[0]


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("chunk", "in_large"), [(32, 8), (19, 8), (19, 1)])
def test_tiles_of_chunks_in_any_order_hold_every_allowed_pair_once(chunk, in_large, window):
    """A chunk of 19 has a large tile of 16, and small tiles of 2, of which the last is filled up."""
    tile, order = 2, np.array([4, 0, 3, 1, 5, 2])
    q_order, cut, rule = order[[4, 1, 2]], Cut(tile, in_large, chunk, on_mesh=True), Rule(1.0, window, None)
    lengths = [chunk + 5, 1, 3 * chunk - 7, 2 * chunk + 1]
    segments = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    assert len(positions) == 6 * chunk

    def filled(x, order, value):
        return np.pad(x.reshape(6, chunk)[order], [(0, 0), (0, cut.filled - chunk)], constant_values=value).reshape(-1)

    (q_segments, q_positions), (kv_segments, kv_positions) = (
        [filled(segments, each, -1), filled(positions, each, 0)] for each in (q_order, order)
    )
    places = [filled(np.arange(6 * chunk), each, -1) for each in (q_order, order)]
    allowed = np.asarray(rule.allowed((q_segments, kv_segments), (q_positions, kv_positions)))
    allowed &= (places[0][:, None] >= 0) & (places[1] >= 0)
    assert allowed.any(axis=1).sum() == 3 * chunk
    computed = np.zeros(allowed.shape, int)
    needed = needed_tiles(rule, cut, jnp.asarray(q_positions)[None], jnp.asarray(q_order), jnp.asarray(order))
    for kind, of_kind in needed:
        for _, query, key in zip(*(x.tolist() for x in np.asarray(of_kind).nonzero()), strict=True):
            query, key = kind.start(cut, query), kind.start(cut, key)
            assert not kind.on_diagonal or places[0][query] == places[1][key]
            for first, num_queries, num_keys in kind.strips():
                computed[query + first : query + first + num_queries, key : key + num_keys] += 1
    assert computed.max() == 1 and np.all(computed[allowed] == 1)
    # No query is without a key, also where it only fills up its chunk.
    assert np.all((computed * (q_segments[:, None] == kv_segments)).any(axis=1))


# Attention.

ROWS, LENGTH = 8, 272
"""Chunks of 17 over 8 devices, of 34 over 4 and of 68 over 2: in tiles of 2, with large tiles of 16 and others."""


def packed_rows(length=LENGTH):
    """Segments and positions [ROWS, length]: one example or many, with padding and without, over chunks and in them."""
    lengths = [[length], [length // 2 + 9], [3] * (length // 3), [1, 16, 17, 18, 34, 68], [length // 2] * 2, [60, 9, 1]]
    lengths += [[], [1] * (length // 4) + [length // 2]]
    segment_ids, positions = np.zeros((2, ROWS, length), np.int32)
    for row, of_row in enumerate(lengths):
        bounds = np.minimum(np.cumsum([0, *of_row]), length)
        for number, (start, end) in enumerate(itertools.pairwise(bounds), 1):
            segment_ids[row, start:end], positions[row, start:end] = number, np.arange(end - start)
        positions[row, bounds[-1] :] = np.arange(length - bounds[-1])
    return segment_ids, positions


def arrays_of(num_heads, num_kv_heads, length=LENGTH, dtype=jnp.float32):
    """q, k, v, the cotangent of the output, and sinks."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(ROWS, length, heads, 4) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    shapes += [(num_heads,)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def value_and_gradients(function, q, k, v, cotangent, sinks):
    def run(q, k, v, cotangent, sinks):
        value, vjp = jax.vjp(function, q, k, v, sinks)
        return value, vjp(cotangent)

    return jax.jit(run)(q, k, v, cotangent, sinks)


@functools.cache
def expected(num_heads, num_kv_heads, length, with_sinks, options):
    def of(q, k, v, sinks):
        return naive(q, k, v, *packed_rows(length), sinks=sinks if with_sinks else None, **dict(options))

    return value_and_gradients(of, *arrays_of(num_heads, num_kv_heads, length))


def in_order(order, with_sinks, options, block_size=2):
    """Attention of rows whose chunks are put into an order and taken out of it again."""

    def of(q, k, v, sinks):
        length = q.shape[1]
        places = np.arange(length)
        if order is not None:
            places = places.reshape(len(order), -1)[np.asarray(order)].reshape(-1)
        segment_ids, positions = (each[:, places] for each in packed_rows(length))
        out = attention(
            *(x[:, places] for x in (q, k, v)),
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            q_positions=positions,
            kv_positions=positions,
            sinks=sinks if with_sinks else None,
            order=order,
            block_size=block_size,
            **dict(options),
        )
        return out[:, np.argsort(places)]

    return of


def assert_equal(ours, theirs, tolerance=1e-5):
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        our, their = np.asarray(our, np.float32), np.asarray(their)
        assert np.isfinite(our).all() and np.abs(our - their).max() <= tolerance * np.abs(their).max()


OPTIONS = [(), (("window", 5),), (("soft_cap", 1.5),), (("window", 70), ("scale", 0.7)), (("window", 2),)]
SHAPES = [shape for shape in factorisations(8, 5) if shape[AXES.index("context")] > 1]


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda number: "x".join(map(str, SHAPES[number])))
def test_attention_and_its_gradients_are_those_of_one_device_on_every_mesh(number):
    axes = dict(zip(AXES, SHAPES[number], strict=True))
    heads = (4, 2) if axes["tensor"] <= 2 else (8, 4)
    with_sinks, options = number % 2 == 0, OPTIONS[number % len(OPTIONS)]
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        function = in_order(balanced_order(ROWS, LENGTH), with_sinks, options)
        given = value_and_gradients(function, *arrays_of(*heads))
    assert_equal(given, expected(*heads, LENGTH, with_sinks, options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_all_tiles_are_of_one_size_it_is_the_same(options, monkeypatch):
    """As on TPUs and GPUs."""
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        function = in_order(balanced_order(ROWS, LENGTH), True, options, block_size=5)
        given = value_and_gradients(function, *arrays_of(4, 2))
    assert_equal(given, expected(4, 2, LENGTH, True, options))


@pytest.mark.parametrize("order", [None, [5, 0, 3, 7, 1, 2, 6, 4], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("length", [LENGTH, 136])
def test_devices_may_hold_the_chunks_of_a_row_in_any_order(order, length):
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        given = value_and_gradients(in_order(order, True, ()), *arrays_of(4, 2, length))
    assert_equal(given, expected(4, 2, length, True, ()))


@pytest.mark.parametrize("length", [36, 4, 30])
def test_a_row_that_is_not_divided_by_twice_the_devices_is_attended_to_as_well(length):
    with jax.set_mesh(make_mesh(MeshConfig(context=4, fsdp=2))):
        assert balanced_order(ROWS, length) is None
        given = value_and_gradients(in_order(None, True, ()), *arrays_of(4, 2, length))
    assert_equal(given, expected(4, 2, length, True, ()))


def test_copies_that_sum_up_their_gradients_later_have_their_own_summands_here():
    """As in a step of several microbatches, where `data` is under way by hand."""
    names = ("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions")
    segment_ids, positions = packed_rows()
    rows = dict(zip(names, (segment_ids, segment_ids, positions, positions), strict=True))
    inputs = arrays_of(4, 2)

    def of_copy(inputs, rows):
        q, k, v, cotangent, sinks = inputs
        out, vjp = jax.vjp(lambda *each: attention(*each[:3], sinks=each[3], block_size=2, **rows), q, k, v, sinks)
        *gradients, of_sinks = vjp(cotangent)
        return out, (*gradients, jax.lax.psum(of_sinks, "data"))

    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=2, tensor=2))):
        cut, whole = PartitionSpec("data"), PartitionSpec()
        specs = [cut] * 4 + [whole]
        copies = jax.shard_map(
            of_copy,
            in_specs=(specs, dict.fromkeys(names, cut)),
            out_specs=(cut, (cut, cut, cut, whole)),
            axis_names={"data"},
            check_vma=False,
        )
        given = jax.jit(copies)(inputs, rows)
    assert_equal(given, expected(4, 2, LENGTH, True, ()))


def test_bfloat16_is_added_up_in_float32_over_devices_too():
    rounded = arrays_of(4, 2, dtype=jnp.bfloat16)
    with jax.set_mesh(make_mesh(MeshConfig(context=8))):
        given = value_and_gradients(in_order(balanced_order(ROWS, LENGTH), True, ()), *rounded)

    def exact(q, k, v, sinks):
        return naive(q, k, v, *packed_rows(), sinks=sinks)

    theirs = value_and_gradients(exact, *(x.astype(jnp.float32) for x in rounded))
    assert {leaf.dtype for leaf in jax.tree.leaves(given)} == {jnp.dtype(jnp.bfloat16)}
    assert_equal(given, theirs, tolerance=0.03)
