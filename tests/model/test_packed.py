"""The kernels for packed rows, run without a TPU, against the naive formula; and which blocks they go over."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_attention import naive

from jaxsft.model.needed import Rule
from jaxsft.model.packed import Blocks, Rows, block_sizes, packed_attention, pairs_of

LENGTHS = [[100, 150, 30, 7], [300], [1] * 40 + [130, 90]]
LENGTH = 300


def packed_rows(lengths, length):
    segment_ids, positions = np.zeros((2, len(lengths), length), np.int32)
    for row, of_row in enumerate(lengths):
        ends = np.cumsum(of_row)
        for number, (size, end) in enumerate(zip(of_row, ends, strict=True), 1):
            segment_ids[row, end - size : end], positions[row, end - size : end] = number, np.arange(size)
    return segment_ids, positions


SEGMENTS, POSITIONS = packed_rows(LENGTHS, LENGTH)
ROWS = Rows(SEGMENTS, POSITIONS, jnp.arange(LENGTH), SEGMENTS, POSITIONS)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, cotangent, arrays, sinks):
    value, vjp = jax.vjp(attend, *arrays, sinks)
    return value, [each for each in vjp(cotangent) if each is not None]


def arrays_of(num_heads, num_kv_heads, head_dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    of = [jax.random.normal(key, (3, LENGTH, n, head_dim), dtype) for key, n in zip(keys, heads, strict=True)]
    # Nothing comes of padding.
    return of[:3], of[3] * (SEGMENTS > 0)[..., None, None].astype(dtype)


CASES = [
    (4, 2, 64, {}, False),
    (4, 4, 16, {"window": 1}, False),
    (6, 2, 16, {"window": 50}, True),
    (2, 1, 32, {"soft_cap": 2.0, "scale": 0.5}, True),
    (6, 2, 8, {"window": 140, "soft_cap": 1.5, "scale": 2.0}, True),
]


def both(num_heads, num_kv_heads, head_dim, options, with_sinks, dtype=jnp.float32, **blocks):
    """(ours, the formula's), each an output and its gradients."""
    arrays, cotangent = arrays_of(num_heads, num_kv_heads, head_dim, dtype)
    sinks = jnp.linspace(-2.0, 4.0, num_heads) if with_sinks else None
    rule = Rule(options.get("scale", head_dim**-0.5), options.get("window"), options.get("soft_cap"))
    cut = Blocks(**{"queries": 128, "keys": 128} | blocks, interpret=True)

    def ours(q, k, v, sinks):
        return packed_attention(rule, cut, q, k, v, sinks, ROWS)

    def formula(q, k, v, sinks):
        return naive(q, k, v, SEGMENTS, POSITIONS, sinks=sinks, **options)

    exact = [x.astype(jnp.float32) for x in arrays]
    return with_gradients(ours, cotangent, arrays, sinks), with_gradients(
        formula, cotangent.astype(jnp.float32), exact, sinks
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_naive_formula_in_value_and_gradients(case):
    (out, gradients), (expected, expected_gradients) = both(*case)
    is_token = SEGMENTS > 0
    np.testing.assert_allclose(out[is_token], expected[is_token], atol=2e-6)
    assert not np.asarray(out[~is_token]).any()
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        # Those by queries that see themselves alone are 0, but for rounding.
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max() + 4e-6)


@pytest.mark.parametrize("sizes", [(128, 256), (256, 128)], ids=str)
def test_blocks_of_queries_and_keys_may_differ(sizes):
    (out, gradients), (expected, expected_gradients) = both(*CASES[2], queries=sizes[0], keys=sizes[1])
    np.testing.assert_allclose(out[SEGMENTS > 0], expected[SEGMENTS > 0], atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max() + 2e-6)


def test_in_bfloat16_it_rounds_no_more_than_its_inputs_do():
    (out, gradients), (expected, expected_gradients) = both(*CASES[3], dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    for ours, theirs in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        apart = np.abs(ours.astype(jnp.float32) - theirs)
        apart = apart[SEGMENTS > 0] if ours is out else apart
        assert apart.max() <= 0.03 * np.abs(theirs).max()


@pytest.mark.parametrize("window", [None, 1, 60, 200])
@pytest.mark.parametrize("sizes", [(128, 128), (128, 256), (384, 128)], ids=str)
def test_the_lists_hold_every_block_with_an_allowed_pair_once_and_few_others(sizes, window):
    length = 1300
    segment_ids, positions = packed_rows([[500, 1, 299, 400], [1300], [100] * 12], length)
    rows = Rows(segment_ids, positions, jnp.arange(length), segment_ids, positions)
    queries, keys = sizes
    num_q, num_kv = -(-length // queries), -(-length // keys)
    distance = positions[:, :, None] - positions[:, None]
    allowed = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids[:, :, None] > 0)
    allowed &= (distance >= 0) & (distance < (window or length))
    needed = np.zeros((3 * num_q, 3 * num_kv), int)
    for row, query, key in zip(*np.nonzero(allowed), strict=True):
        needed[row * num_q + query // queries, row * num_kv + key // keys] = 1

    by_queries, by_keys = pairs_of(Rule(1.0, window, None), Blocks(queries, keys, True), rows)
    for pairs, sorted_by in ((by_queries, by_queries.queries), (by_keys, by_keys.keys)):
        count = int(pairs.count)
        listed = np.zeros_like(needed)
        np.add.at(listed, (pairs.queries[:count], pairs.keys[:count]), 1)
        assert listed.max() == 1 and (listed >= needed).all() and listed.any(axis=0).all() | (pairs is by_queries)
        assert listed.any(axis=1).all() | (pairs is by_keys)
        assert (np.diff(sorted_by[:count]) >= 0).all()
        # Of padding, one block of keys for each of queries; and where an example begins within a block.
        assert listed.sum() <= needed.sum() + num_q + num_kv


def test_rows_cost_the_squares_of_their_examples_and_not_of_their_length():
    """Examples of 600 tokens on average: a third of the causal half would do, and it is a fifth."""
    length, lengths = 8192, np.random.default_rng(0).lognormal(np.log(600) - 0.32, 0.8, 100).astype(int)
    lengths = lengths[np.cumsum(lengths) <= length]
    segment_ids, positions = packed_rows([lengths], length)
    rows = Rows(segment_ids, positions, jnp.arange(length), segment_ids, positions)
    queries, keys = block_sizes(4, 128)
    pairs, _ = pairs_of(Rule(1.0, None, None), Blocks(queries, keys, True), rows)
    assert int(pairs.count) * queries * keys < 0.2 * length**2 / 2


def test_queries_may_be_a_part_of_the_row():
    """The first and the last of four chunks, as a device has them where positions are cut over several."""
    chunk = 128
    segment_ids, positions = packed_rows([[200, 250, 60], [512]], 4 * chunk)
    keys = jax.random.split(jax.random.key(1), 4)
    q, g = (jax.random.normal(key, (2, 4 * chunk, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 4 * chunk, 2, 16)) for key in keys[2:])
    g *= (segment_ids > 0)[..., None, None]
    own = np.r_[:chunk, 3 * chunk : 4 * chunk]
    rows = Rows(segment_ids[:, own], positions[:, own], jnp.array(own), segment_ids, positions)

    def ours(q, k, v, sinks):
        return packed_attention(Rule(0.25, None, None), Blocks(128, 128, True), q[:, own], k, v, None, rows)

    def formula(q, k, v, sinks):
        return naive(q, k, v, segment_ids, positions, scale=0.25)[:, own]

    out, gradients = with_gradients(ours, g[:, own], (q, k, v), None)
    expected, expected_gradients = with_gradients(formula, g[:, own], (q, k, v), None)
    is_token = segment_ids[:, own] > 0
    np.testing.assert_allclose(out[is_token], expected[is_token], atol=2e-6)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6)
