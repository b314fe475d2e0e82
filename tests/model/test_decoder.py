"""The decoder: packed rows, the cache, remat, meshes, and random weights."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from flax import nnx

from jaxsft.config import MeshConfig
from jaxsft.mesh import batch_sharding, constrain, make_mesh, shardings
from jaxsft.model.architecture import DecoderConfig, LayerKind
from jaxsft.model.decoder import Decoder
from jaxsft.model.layers import NormKind, gated
from jaxsft.model.rope import Rope
from jaxsft.training.matmuls import read_matmuls
from jaxsft.training.program import read_program

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerKind(), LayerKind(window=5), LayerKind(rope=None)),
    ropes=(Rope(dim=8, theta=10000.0),),
    max_position=64,
    norm=NormKind(eps=1e-5),
    norms=("pre_attention", "pre_mlp"),
    activation=gated("silu"),
    tie_embeddings=False,
    qkv_bias=True,
    attention_bias=True,
    mlp_bias=True,
    initializer_range=0.1,
)


def make(config=CONFIG, *, compute_dtype="float32", remat="none", unroll=False, seed=0):
    return Decoder(
        config, compute_dtype=compute_dtype, param_dtype="float32", remat=remat, unroll=unroll, rngs=nnx.Rngs(seed)
    )


run = jax.jit(lambda model, *rows: model(*rows).hidden)


def row(*lengths, size):
    """A row with segments of these lengths: tokens, segment_ids, positions, each [1, size]."""
    fill = size - sum(lengths)
    segment_ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * fill
    positions = [position for length in (*lengths, fill) for position in range(length)]
    tokens = np.random.default_rng(sum(lengths)).integers(0, CONFIG.vocab_size, size)
    return [np.array([values], np.int32) for values in (tokens, segment_ids, positions)]


def projected(hidden):
    """A number that depends on every hidden state (their squares would not do: the norm makes their sum constant)."""
    return (hidden * jax.random.normal(jax.random.key(9), hidden.shape)).sum()


def test_a_packed_row_gives_the_hidden_states_of_its_segments_alone():
    model = make()
    tokens, segment_ids, positions = row(7, 12, 3, size=26)
    packed = run(model, tokens, segment_ids, positions)
    for start, end in ((0, 7), (7, 19), (19, 22)):
        ones = np.ones((1, end - start), np.int32)
        alone = run(model, tokens[:, start:end], ones, positions[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=3e-6)


def test_changing_one_segment_changes_no_bit_of_another():
    model = make()
    tokens, segment_ids, positions = row(7, 12, 3, size=26)
    changed = np.where(segment_ids == 2, (tokens + 1) % 96, tokens)
    before, after = (np.asarray(run(model, each, segment_ids, positions)) for each in (tokens, changed))
    np.testing.assert_array_equal(before[segment_ids != 2], after[segment_ids != 2])
    assert np.all(np.any(before[segment_ids == 2] != after[segment_ids == 2], axis=-1))


def test_prefill_and_single_steps_with_a_cache_give_the_hidden_states_of_the_whole():
    model = make()
    # A left-padded row beside a full one, as generation makes them.
    length, prompt = 14, 6
    tokens = np.random.default_rng(0).integers(0, 96, (2, length)).astype(np.int32)
    segment_ids = np.array([[0] * 3 + [1] * 11, [1] * 14], np.int32)
    positions = np.array([[0, 0, 0, *range(11)], [*range(14)]], np.int32)
    whole = run(model, tokens, segment_ids, positions)

    step = jax.jit(lambda model, cache, *rows: model(*rows, cache=cache))
    cache = model.make_cache(2, 20)
    pieces = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        hidden, cache, _ = step(model, cache, *(each[:, start:end] for each in (tokens, segment_ids, positions)))
        pieces.append(hidden)
    assert int(cache.length) == length
    given = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(given[segment_ids > 0], whole[segment_ids > 0], atol=3e-6)
    assert np.isfinite(given).all()


PATTERN = (LayerKind(window=3), LayerKind(rope=1), LayerKind())
ROPES = (
    Rope(dim=8, theta=100.0),
    Rope(dim=4, theta=10.0, scaling="longrope", original_max_position=9, short_factors=(1, 2), long_factors=(3, 5)),
)


@pytest.mark.parametrize("num_layers", [2, 3, 6, 8])
def test_unrolled_layers_have_the_same_state_and_give_the_same_values_and_gradients(num_layers):
    config = dataclasses.replace(CONFIG, layers=(PATTERN * 3)[:num_layers], ropes=ROPES)
    rows = row(7, 12, size=20)

    def value_and_gradient(unroll):
        graphdef, state = nnx.split(make(config, unroll=unroll))
        value = jax.jit(jax.value_and_grad(lambda state: projected(nnx.merge(graphdef, state)(*rows).hidden)))
        return state, value(state)

    ours, theirs = value_and_gradient(True), value_and_gradient(False)
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    leaves = jax.tree.leaves(theirs[1])
    # A gradient that is zero by its mathematics (of the bias of keys) is noise: measured by the others.
    floor = 1e-3 * max(map(np.linalg.norm, leaves))
    for one, other in zip(jax.tree.leaves(ours[1]), leaves, strict=True):
        assert np.linalg.norm(one - other) < 1e-5 * max(np.linalg.norm(other), floor)


def test_layers_of_a_pattern_run_in_their_order_with_or_without_a_rest():
    """Each layer by itself, with the decoder's own parts, is the definition."""
    tokens, segment_ids, positions = row(7, 12, size=20)

    @jax.jit
    def one_by_one(model):
        slots, _ = model._slots(segment_ids, positions, None, None)
        x = model.embed_tokens(tokens, jnp.float32)
        graphdef, weights = nnx.split(model.layers)
        for index, kind in enumerate(model.config.layers):
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], weights))  # noqa: B023
            x, _ = layer(x, slots, None, kind)
        return model.norm(x)

    for num_layers in (2, 3, 7):
        model = make(dataclasses.replace(CONFIG, layers=(PATTERN * 3)[:num_layers], ropes=ROPES))
        np.testing.assert_allclose(run(model, tokens, segment_ids, positions), one_by_one(model), atol=1e-5)


def test_a_cache_gives_the_whole_also_with_windows_and_a_rest_of_layers():
    config = dataclasses.replace(CONFIG, layers=(PATTERN * 2)[:5], ropes=ROPES)
    model = make(config)
    tokens = np.random.default_rng(0).integers(0, 96, (1, 9)).astype(np.int32)
    rows = (tokens, np.ones_like(tokens), np.arange(9, dtype=np.int32)[None])
    whole = run(model, *rows)
    step = jax.jit(lambda model, cache, *rows: model(*rows, cache=cache))
    cache = model.make_cache(1, 12)
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, 9))]:
        hidden, cache, _ = step(model, cache, *(each[:, start:end] for each in rows))
        np.testing.assert_allclose(hidden, whole[:, start:end], atol=5e-6)


def test_angles_that_depend_on_the_length_depend_on_that_of_the_example_alone():
    config = dataclasses.replace(CONFIG, ropes=ROPES, layers=PATTERN)
    model = make(config)
    packed = row(7, 12, 3, size=26)
    hidden = run(model, *packed)
    for start, end in ((0, 7), (7, 19), (19, 22)):
        alone = [each[:, start:end] for each in packed]
        np.testing.assert_allclose(hidden[:, start:end], run(model, *alone), atol=3e-6)
    # Twelve tokens are more than the original nine, so the first seven of them by themselves are turned otherwise.
    cut = run(model, *(each[:, 7:14] for each in packed))
    assert np.abs(hidden[:, 7:14] - cut).max() > 1e-3


@pytest.mark.parametrize("remat", ["attention", "full", "offload"])
def test_remat_changes_neither_value_nor_gradients(remat):
    rows = row(7, 12, size=20)

    def value_and_gradient(remat):
        graphdef, state = nnx.split(make(remat=remat))
        return jax.jit(jax.value_and_grad(lambda state: projected(nnx.merge(graphdef, state)(*rows).hidden)))(state)

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5),
        value_and_gradient(remat),
        value_and_gradient("none"),
    )


def test_each_kind_of_remat_computes_again_what_it_says():
    """Of a layer's matmuls by weights, whose sizes tell them apart; the last one is never needed again."""
    config = dataclasses.replace(CONFIG, layers=(LayerKind(),) * 3, num_heads=8, hidden_size=40)
    sizes = {"q": 40 * 64, "kv": 2 * 40 * 16, "o": 64 * 40, "gate and up": 2 * 40 * 48}
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: make(config)))
    rows = row(7, 12, size=20)

    def again(remat):
        def loss(state):
            decoder = nnx.merge(graphdef, state)
            decoder.remat = remat
            return projected(decoder(*rows).hidden)

        matmuls = read_matmuls(jax.jit(jax.grad(loss)).trace(abstract))
        return sum(each.flops for each in matmuls if each.is_again and "attention" not in each.name)

    per_weight = 2 * 20 * 3
    assert again("none") == 0
    assert again("attention") == per_weight * (sizes["q"] + sizes["kv"] + sizes["gate and up"])
    assert again("full") == again("offload") == per_weight * sum(sizes.values())


def test_bfloat16_compute_is_near_float32_and_logits_are_float32():
    rows = row(7, 12, size=20)
    exact, rounded = make(), make(compute_dtype="bfloat16")
    hidden = run(rounded, *rows)
    assert hidden.dtype == jnp.bfloat16 and rounded.logits(hidden).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(jnp.float32), run(exact, *rows), atol=0.15)


def test_tied_embeddings_have_no_head_of_their_own():
    tied = make(dataclasses.replace(CONFIG, tie_embeddings=True))
    assert "lm_head" not in nnx.state(tied)
    np.testing.assert_array_equal(tied.unembedding, tied.embed_tokens.weight[...])
    assert make().unembedding is not make().embed_tokens.weight[...]


def test_every_weight_names_its_dims_and_no_two_draws_are_equal():
    leaves = jax.tree.leaves(nnx.state(make()), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for leaf in leaves:
        assert leaf.shape == tuple(CONFIG.sizes[letter] for letter in leaf.get_metadata("axes").split())
    drawn = [np.asarray(leaf[...]).ravel() for leaf in leaves if np.std(leaf[...]) > 0]
    # Rows that fill up the tables of the vocabulary are zeros.
    assert all(np.all(leaf[...][96:] == 0) for leaf in leaves if leaf.get_metadata("axes") == "v d")
    drawn = [values if len(values) != 128 * 32 else values[: 96 * 32] for values in drawn]
    assert len(drawn) == 9
    assert len({tuple(values[:8]) for values in drawn}) == 9
    assert all(abs(np.std(values) - 0.1) < 0.01 and abs(np.mean(values)) < 0.01 for values in drawn)


def on_mesh(mesh):
    """Random weights, and gradients, hidden states and residual stream, made on a mesh."""
    lengths = [(7, 12, 3), (32,), (1,) * 16 + (16,), ()] * 2
    rows = [np.concatenate(each) for each in zip(*(row(*of_row, size=32) for of_row in lengths), strict=True)]
    graphdef, abstract = nnx.split(jax.eval_shape(make))

    def value_and_gradient(state):
        def loss(state):
            hidden = nnx.merge(graphdef, state)(*rows).hidden
            return projected(hidden), hidden

        return jax.grad(loss, has_aux=True)(state), nnx.merge(graphdef, state).residuals(*rows)

    with jax.set_mesh(mesh):
        state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings(mesh, abstract))()
        return state, jax.jit(value_and_gradient)(state)


@pytest.fixture(scope="module")
def on_one_device():
    return on_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))


MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"context": 8},
    {"data": 2, "context": 4},
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_random_weights_hidden_states_and_gradients_do_not_depend_on_the_mesh(axes, on_one_device):
    state, results = on_mesh(make_mesh(MeshConfig(**axes)))
    jax.tree.map(np.testing.assert_array_equal, state, on_one_device[0])
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(on_one_device[1]), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_keys_and_values_are_gathered_once_a_pass_and_nothing_is_sent_within_attention(remat):
    """Forward and backward in two parts each, of which each device has one chunk; their gradients are reduced once."""
    num_layers, num_rows, length = 4, 4, 256
    config = dataclasses.replace(CONFIG, layers=(LayerKind(),) * num_layers)
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: make(config, remat=remat)))
    mesh = make_mesh(MeshConfig(context=4, fsdp=2))
    rows = [jax.ShapeDtypeStruct((num_rows, length), jnp.int32, sharding=batch_sharding(mesh))] * 3

    def total(state, *rows):
        return projected(nnx.merge(graphdef, state)(*rows).hidden)

    with jax.set_mesh(mesh):
        placed = shardings(mesh, abstract)
        step = jax.jit(jax.grad(total), in_shardings=(placed, *[batch_sharding(mesh)] * 3), out_shardings=placed)
        text = step.lower(abstract, *rows).compile(TO_READ).as_text()
    sent = read_program(text, mesh.shape).collectives
    assert not any(each.is_open for each in sent)
    of_part = num_rows // 2 * length // 2 * config.num_kv_heads * config.head_dim * 4
    times = collections.Counter()
    for each in sent:
        # The others are of weights, and of rows on their way into the layers and out of them.
        if each.axes == ("context",) and each.scope == "layers":
            assert each.num_bytes == of_part or each.kind == "all-reduce"
            times[each.kind, each.num_bytes] += each.times
    assert times["all-gather", of_part] == num_layers * 2 * 2 * 2
    assert times["reduce-scatter", of_part] == num_layers * 2 * 2


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "context": 4}], ids=str)
def test_weights_are_cut_over_all_devices_and_only_a_layer_at_a_time_is_gathered(axes):
    config = dataclasses.replace(
        CONFIG, layers=(LayerKind(),) * 16, hidden_size=128, intermediate_size=512, vocab_size=64
    )
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: make(config, remat="full")))
    mesh = make_mesh(MeshConfig(**axes))
    rows = [jax.ShapeDtypeStruct((8, 16), jnp.int32)] * 3
    sharded = shardings(mesh, abstract)

    def loss(state, *rows):
        return projected(nnx.merge(graphdef, state)(*rows).hidden)

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=(sharded, None, None, None), out_shardings=sharded)
        memory = step.lower(abstract, *rows).compile(TO_READ).memory_analysis()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract))
    assert memory.argument_size_in_bytes < 1.1 * whole / 8 + 8 * 16 * 12
    assert memory.temp_size_in_bytes < whole / 2


@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 2, "context": 2}], ids=str
)
def test_rows_of_a_table_move_to_their_devices_and_none_holds_those_of_others(axes):
    """Forward and backward, a device sends and gets no more than its own part of [B, T, D], once for each mesh axis."""
    num_rows, length, width = 8, 64, 128
    config = dataclasses.replace(CONFIG, hidden_size=width, vocab_size=64)
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: make(config).embed_tokens))
    mesh = make_mesh(MeshConfig(**axes))

    def loss(state, ids):
        return jnp.sum(jnp.sin(constrain(nnx.merge(graphdef, state)(ids, jnp.float32), "b t d")))

    ids = jax.ShapeDtypeStruct((num_rows, length), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        sharded = shardings(mesh, abstract)
        step = jax.jit(jax.grad(loss), in_shardings=(sharded, batch_sharding(mesh)), out_shardings=sharded)
        sent = read_program(step.lower(abstract, ids).compile().as_text(), mesh.shape).collectives
    (table,) = (leaf.size * 4 * mesh.shape["data"] // 8 for leaf in jax.tree.leaves(abstract))
    moved = [each for each in sent if each.num_bytes > max(table, num_rows * length * 4)]
    assert {each.kind for each in moved} == {"all-to-all"} and len(moved) <= 2 * len(axes)
    assert {each.num_bytes for each in moved} == {num_rows * length * width * 4 // 8}


@pytest.mark.parametrize("axes", [{"tensor": 4, "fsdp": 2}, {"tensor": 2, "data": 2, "context": 2}], ids=str)
def test_a_layer_reduces_its_hidden_states_over_tensor_four_times(axes):
    """What attention and MLP add, forward; the gradients by what goes into either, backward."""
    num_rows, length, num_layers = 8, 16, 4
    config = dataclasses.replace(CONFIG, layers=(LayerKind(),) * num_layers, num_kv_heads=4)
    graphdef, abstract = nnx.split(jax.eval_shape(lambda: make(config)))
    mesh = make_mesh(MeshConfig(**axes))
    rows = [jax.ShapeDtypeStruct((num_rows, length), jnp.int32, sharding=batch_sharding(mesh))] * 3

    def total(state, *rows):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(*rows).hidden))

    with jax.set_mesh(mesh):
        sharded = shardings(mesh, abstract)
        step = jax.jit(jax.grad(total), in_shardings=(sharded, *[batch_sharding(mesh)] * 3), out_shardings=sharded)
        sent = read_program(step.lower(abstract, *rows).compile(TO_READ).as_text(), mesh.shape).collectives
    of_layers = [each for each in sent if each.scope == "layers" and each.axes == ("tensor",)]
    assert {each.kind for each in of_layers} == {"all-reduce"}
    num_bytes = num_rows * length * config.hidden_size * 4 * axes["tensor"] // 8
    assert sum(each.times * each.num_bytes for each in of_layers) == 4 * num_layers * num_bytes


@pytest.mark.parametrize("remat", ["full", "attention"])
@pytest.mark.parametrize("trained", ["layers", "embed_tokens"])
def test_layers_that_alternate_are_not_kept_a_second_time_for_the_backward_pass(remat, trained):
    config = dataclasses.replace(CONFIG, layers=(LayerKind(), LayerKind(window=5)) * 6, intermediate_size=2048)
    graphdef, weights = nnx.split(make(config, remat=remat))
    rows = row(4, 3, size=8)

    def loss(some, others, *rows):
        return nnx.merge(graphdef, nnx.merge_state(some, others))(*rows).hidden.sum()

    some, others = (nnx.State({key: weights[key] for key in weights if (key == trained) is it}) for it in (True, False))
    compiled = jax.jit(jax.grad(loss)).lower(some, others, *rows).compile(TO_READ)
    of_layers = sum(leaf.nbytes for leaf in jax.tree.leaves(weights["layers"]))
    temp = compiled.memory_analysis().temp_size_in_bytes
    # Weights and gradients of one period, of six, are at hand at a time.
    assert temp < 0.6 * of_layers, temp / of_layers
