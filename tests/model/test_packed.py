"""The kernels for packed rows, run without a TPU, against the naive formula; and which blocks they go over."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_attention import naive

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.config_files import load_config
from jaxsft.mesh import make_mesh
from jaxsft.model.architecture import LayerKind
from jaxsft.model.attention import attention, choose_kernel
from jaxsft.model.balance import balanced_order
from jaxsft.model.families.known import decoder_config
from jaxsft.model.kernel_check import check_kernel
from jaxsft.model.needed import Rule
from jaxsft.model.packed import attention_of_blocks
from jaxsft.model.pairs import Blocks, Rows, block_sizes, groups_of, pairs_of, share_of_whole_rows
from jaxsft.setup import Setup

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
        return attention_of_blocks(rule, cut, q, k, v, sinks, ROWS)

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
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * max(np.abs(theirs).max(), 5.0))


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


@pytest.mark.parametrize("window", [None, 1, 60, 130])
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
        count = int(pairs.num_pairs)
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
    assert int(pairs.num_pairs) * queries * keys < 0.2 * length**2 / 2


def test_the_share_of_packed_rows_is_that_of_their_pairs_and_of_whole_rows_all():
    def share(lengths, *windows):
        return share_of_whole_rows(*packed_rows(lengths, 2048), group_size=1, head_dim=64, windows=windows)

    assert share([[2048]] * 2, None) == 1.0 and share([[2048]], None, 300) == 1.0
    # In blocks of 512 and 256: 4 of queries against 2, 4, 6 and 8 of keys, and against 2 each.
    assert share([[512] * 4], None) == 8 / 20
    assert share([[512] * 4], 100) == pytest.approx(8 / 11)
    assert share([[512] * 4], 100, None, None) == pytest.approx(24 / 51)


def test_queries_may_be_a_part_of_the_row():
    """The first and the last of four chunks, as a device has them where positions are cut over several.

    In the last row, nobody sees the second chunk, whose gradients are zeros all the same.
    """
    chunk = 128
    segment_ids, positions = packed_rows([[200, 250, 60], [512], [128, 256, 128]], 4 * chunk)
    keys = jax.random.split(jax.random.key(1), 4)
    q, g = (jax.random.normal(key, (3, 4 * chunk, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (3, 4 * chunk, 2, 16)) for key in keys[2:])
    g *= (segment_ids > 0)[..., None, None]
    own = np.r_[:chunk, 3 * chunk : 4 * chunk]
    rows = Rows(segment_ids[:, own], positions[:, own], jnp.array(own), segment_ids, positions)

    def ours(q, k, v, sinks):
        return attention_of_blocks(Rule(0.25, None, None), Blocks(128, 128, True), q[:, own], k, v, None, rows)

    def formula(q, k, v, sinks):
        return naive(q, k, v, segment_ids, positions, scale=0.25)[:, own]

    out, gradients = with_gradients(ours, g[:, own], (q, k, v), None)
    expected, expected_gradients = with_gradients(formula, g[:, own], (q, k, v), None)
    is_token = segment_ids[:, own] > 0
    np.testing.assert_allclose(out[is_token], expected[is_token], atol=2e-6)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6)


# Behind `attention`, on meshes.


def by_attention(q, k, v, sinks, *, order=None, **options):
    """Of rows whose chunks are put into an order and taken out of it again."""
    segment_ids, positions = packed_rows([[100, 1, 60, 40], [240], [3] * 20 + [130, 2], [120] * 2], 240)
    places = np.arange(240)
    if order is not None:
        places = places.reshape(len(order), -1)[np.array(order)].reshape(-1)
    of_keys = [segment_ids[:, places], positions[:, places]]
    out = attention(
        *(x[:, places] for x in (q, k, v)),
        q_segment_ids=of_keys[0],
        kv_segment_ids=of_keys[0],
        q_positions=of_keys[1],
        kv_positions=of_keys[1],
        sinks=sinks,
        order=order,
        block_size=128,
        **options,
    )
    return jnp.where((segment_ids > 0)[:, :, None, None], out[:, np.argsort(places)], 0)


MESHES = [
    ({}, {"window": 50, "scale": 0.7}),
    ({"fsdp": 2, "context": 2, "tensor": 2}, {"window": 129, "soft_cap": 1.5}),
    ({"data": 2, "context": 4}, {}),
    ({"data": 2, "expert": 2, "tensor": 2}, {"window": 1}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("axes", "options"), MESHES, ids=str)
def test_every_mesh_computes_what_our_own_attention_does(axes, options, dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(4, 240, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, cotangent = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    sinks = jax.random.normal(keys[4], (4,))
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: None if axes else 1])
    with jax.set_mesh(mesh):
        attend = functools.partial(by_attention, order=balanced_order(4, 240), kernel="packed", **options)
        ours = with_gradients(attend, cotangent, (q, k, v), sinks)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    attend = functools.partial(by_attention, kernel="xla", **options)
    theirs = with_gradients(attend, cotangent.astype(jnp.float32), exact, sinks)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)[:4]} == {jnp.dtype(dtype)}
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        bound = {"float32": 2e-6, "bfloat16": 0.02}[dtype]
        assert np.abs(our.astype(jnp.float32) - their).max() <= bound * np.abs(their).max()


@pytest.mark.parametrize(("group_size", "num_groups"), [(1, 1), (8, 1), (9, 3), (11, 11), (12, 2), (16, 2), (64, 8)])
def test_large_groups_are_cut_into_equal_ones_of_at_most_eight(group_size, num_groups):
    assert groups_of(group_size) == num_groups


def test_large_groups_are_computed_as_small_ones_are():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (
        jax.random.normal(key, (4, 240, heads, 8)) for key, heads in zip(keys, (36, 2, 2, 36), strict=True)
    )
    ours, theirs = (
        with_gradients(functools.partial(by_attention, kernel=kernel), cotangent, (q, k, v), None)
        for kernel in ("packed", "xla")
    )
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(our - their).max() <= 2e-6 * np.abs(their).max()


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_the_check_before_a_run_passes_and_finds_a_window_that_is_off_by_one(axes):
    config = decoder_config(CONFIG)
    config = dataclasses.replace(config, layers=(LayerKind(window=7), LayerKind()), sinks=True)

    def off_by_one(*arrays, **options):
        return attention(*arrays, **options | {"window": options["window"] and options["window"] + 1})

    with jax.set_mesh(make_mesh(MeshConfig(**axes), jax.devices()[: None if axes else 1])):
        assert check_kernel("packed", config, "float32") < 1e-5
        with pytest.raises(ConfigError, match="model.attention: packed: .* with a window of 7: output by"):
            check_kernel("packed", config, "float32", attend=off_by_one)


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


def test_auto_takes_it_where_rows_are_packed_enough(monkeypatch):
    monkeypatch.setattr("jaxsft.model.attention.platform_and_kind", lambda: ("tpu", "TPU v5p"))
    q, k = (jax.ShapeDtypeStruct((8, 4096, heads, 128), jnp.bfloat16) for heads in (32, 8))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert choose_kernel("auto", q, k, share=0.38).kernel == "packed"
        rather = choose_kernel("auto", q, k, share=0.4)
        assert rather.kernel == "splash" and rather.why.endswith("need 51% of the matrix products of splash attention")
        assert choose_kernel("auto", q, k).kernel == "splash"
        assert choose_kernel("packed", q, k, share=1.0).kernel == "packed"


def test_lists_that_do_not_fit_on_a_chip_are_refused_and_splash_is_taken(monkeypatch):
    """Of 4 rows of 32,768 on one device; the lists of 2 still fit."""
    monkeypatch.setattr("jaxsft.model.attention.platform_and_kind", lambda: ("tpu", "TPU v5p"))

    def choose(wanted, num_rows):
        q, k = (jax.ShapeDtypeStruct((num_rows, 32768, heads, 128), jnp.bfloat16) for heads in (32, 8))
        return choose_kernel(wanted, q, k, share=0.1)

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert choose("packed", 2).kernel == choose("auto", 2).kernel == "packed"
        rather = choose("auto", 4)
        assert rather.kernel == "splash" and "131,072 pairs of blocks, more than 65,536" in rather.why
        with pytest.raises(ConfigError, match="model.attention: packed, but a device's rows have 131,072 pairs"):
            choose("packed", 4)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        assert choose("packed", 4).kernel == "packed"


def test_a_model_gets_the_kernel_that_is_asked_for(tiny_config):
    setup = Setup(load_config(tiny_config, ["model.attention=packed"]))
    assert setup.attention.startswith("packed (as asked for; on a CPU it is interpreted")
    decoder = nnx.merge(*setup.pretrained.model)
    assert decoder.layers.self_attn.kernel == "packed"


def test_on_tpus_a_run_counts_its_rows(tiny_config, monkeypatch):
    """As on a TPU, but for the check, which would need one."""
    monkeypatch.setattr("jaxsft.model.attention.platform_and_kind", lambda: ("tpu", "TPU v5p"))
    monkeypatch.setattr("jaxsft.setup.check_kernel", lambda kernel, structure, dtype: 0.001)
    setup = Setup(load_config(tiny_config, ["model.compute_dtype=bfloat16"]))
    batch = setup.loader.batch(0)
    heads = setup.pretrained.decoder_config
    share = share_of_whole_rows(
        batch.segment_ids,
        batch.positions,
        group_size=heads.num_heads // heads.num_kv_heads,
        head_dim=heads.head_dim,
        windows=[None] * len(heads.layers),
    )
    assert f"packed rows need {share * 9 / 7:.0%} of the matrix products" in setup.attention
    # Rows of a stream are not read before the run has its folder.
    streamed = Setup(load_config(tiny_config, ["model.compute_dtype=bfloat16", "data.stream=true", "train.steps=2"]))
    assert streamed.attention.startswith("splash (TPU v5p, blocks of up to 1024); apart")
