"""Attention by cuDNN, without a GPU: what it is told of packed rows, when it is refused, and who knows the rows.

The kernels are in `cudnn_by_hand.py`, as cuDNN describes them; JAX's own way to call them is left as it is.
"""

import dataclasses
import functools
import json
import re

import cudnn_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_attention import naive

from jaxsft.batch import count_segments
from jaxsft.config import ConfigError, MeshConfig
from jaxsft.config_files import load_config
from jaxsft.mesh import make_mesh
from jaxsft.model import cudnn
from jaxsft.model.abstract import Model, with_attention
from jaxsft.model.architecture import LayerKind
from jaxsft.model.attention import attention, choose_kernel
from jaxsft.model.cudnn import cudnn_attention, room_for_segments, segments_of
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config
from jaxsft.model.kernel_check import check_kernel
from jaxsft.model.needed import Rule
from jaxsft.model.remat import POLICIES
from jaxsft.setup import Setup

LENGTH = 48
H100 = ("gpu", "NVIDIA H100 80GB HBM3")
ROWS = [[20, 7, 1, 12], [48], [1] * 7 + [41], [5, 9]]
"""With padding; whole; exactly 8 segments, seven of them of one token; mostly padding."""


def packed_rows(lengths, length=LENGTH):
    segment_ids, positions = np.zeros((2, len(lengths), length), np.int32)
    for row, of_row in enumerate(lengths):
        segment_ids[row] = np.concatenate([np.repeat(np.arange(len(of_row)) + 1, of_row), [0] * (length - sum(of_row))])
        positions[row] = np.concatenate([np.arange(each) for each in [*of_row, length - sum(of_row)]])
    return segment_ids, positions


SEGMENTS, POSITIONS = packed_rows(ROWS)


@pytest.fixture(autouse=True)
def by_hand():
    cudnn_by_hand.install()


@pytest.fixture
def on_h100(monkeypatch):
    """As if these devices were H100s with cuDNN."""
    monkeypatch.setattr("jaxsft.model.attention.platform_and_kind", lambda: H100)
    monkeypatch.setattr(cudnn, "device_capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)


# What cuDNN is told.


def test_the_worked_example():
    segments = segments_of(jnp.array([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1]]), 4)
    assert segments.lengths.tolist() == [[2, 1, 2, -1], [5, -1, -1, -1]]
    assert segments.starts.tolist() == [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1]]
    assert segments.counts.tolist() == [3, 1]
    assert segments.numbers.tolist() == [[0, 0, 1, 2, 2], [3, 3, 3, 3, 3]]
    assert segments.places.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("num_segments", [8, 16])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_lengths_and_starts_allow_what_our_own_masks_do(num_segments, window):
    """Read as they are written, one segment after the other, they allow the pairs of `Rule.allowed` and no others."""
    segments = segments_of(jnp.asarray(SEGMENTS), num_segments)
    allowed = np.zeros((len(ROWS), LENGTH, LENGTH), bool)
    times = np.zeros((len(ROWS), LENGTH), int)
    for row, (lengths, starts) in enumerate(zip(np.array(segments.lengths), np.array(segments.starts), strict=True)):
        assert len(starts) == num_segments + 1 and starts[-1] == -1
        for length, start in zip(lengths[lengths >= 0], starts[starts >= 0], strict=True):
            back = np.arange(length)[:, None] - np.arange(length)[None]
            allowed[row, start : start + length, start : start + length] = (back >= 0) & (back < (window or LENGTH))
            times[row, start : start + length] += 1
    assert (times == 1).all(), "each token, padding too, is of one segment"
    expected = Rule(1.0, window, None).allowed((SEGMENTS, SEGMENTS), (POSITIONS, POSITIONS))
    np.testing.assert_array_equal(allowed, expected)


def test_windows_of_places_are_those_of_positions(tiny_config):
    """What the loader makes: positions grow by 1 from one token of a segment to the next."""
    batch = Setup(load_config(tiny_config)).loader.batch(0)
    same = np.diff(batch.segment_ids, axis=1) == 0
    steps = np.diff(batch.positions, axis=1)
    assert (steps[same & (batch.segment_ids[:, 1:] > 0)] == 1).all()
    assert (batch.positions[:, 1:][~same] == 0).all()


@pytest.mark.parametrize(("most", "room"), [(1, 2), (2, 2), (3, 4), (8, 8), (9, 16), (129, 256)])
def test_room_is_the_next_power_of_two(most, room):
    assert room_for_segments(most) == room


def test_padding_counts_as_a_segment():
    assert count_segments(SEGMENTS).tolist() == [5, 1, 8, 3]


# What comes of it.


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, cotangent, arrays):
    value, vjp = jax.vjp(attend, *arrays)
    return value, vjp(cotangent)


def arrays_of(num_heads, num_kv_heads, head_dim, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    of = [jax.random.normal(key, (4, LENGTH, n, head_dim), dtype) for key, n in zip(keys, heads, strict=True)]
    return of[:3], of[3] * (SEGMENTS > 0)[..., None, None].astype(dtype)


BOUNDS = {"float32": 2e-6, "bfloat16": 0.015}


def assert_near(ours, theirs, dtype):
    for mine, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == jnp.dtype(dtype)
        assert np.abs(mine.astype(jnp.float32) - their).max() <= BOUNDS[dtype] * max(np.abs(their).max(), 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_equals_the_naive_formula_in_value_and_gradients(heads, window, dtype):
    arrays, cotangent = arrays_of(*heads, 16, dtype)
    rule = Rule(0.3, window, None)

    def ours(q, k, v):
        return cudnn_attention(rule, q, k, v, jnp.asarray(SEGMENTS), num_segments=8)

    def formula(q, k, v):
        return naive(q, k, v, SEGMENTS, POSITIONS, scale=0.3, window=window)

    out, gradients = with_gradients(ours, cotangent, arrays)
    exact = [x.astype(jnp.float32) for x in arrays]
    assert np.isfinite(out.astype(jnp.float32)).all(), "padding too"
    assert_near((out, gradients), with_gradients(formula, cotangent.astype(jnp.float32), exact), dtype)


MESHES = [{}, {"fsdp": 2, "tensor": 2}, {"data": 2, "expert": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_mesh_computes_what_our_own_attention_does(axes, on_h100):
    arrays, cotangent = arrays_of(4, 2, 16, "bfloat16")
    rows = {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS, "q_positions": POSITIONS, "kv_positions": POSITIONS}

    def attend(kernel, q, k, v):
        return attention(q, k, v, **rows, kernel=kernel, num_segments=8, window=9)

    num_devices = int(np.prod(list(axes.values()) or [1]))
    with jax.set_mesh(make_mesh(MeshConfig(**axes), jax.devices()[:num_devices])):
        ours = with_gradients(functools.partial(attend, "cudnn"), cotangent, arrays)
    exact = [x.astype(jnp.float32) for x in arrays]
    theirs = with_gradients(functools.partial(attend, "xla"), cotangent.astype(jnp.float32), exact)
    assert_near(ours, theirs, "bfloat16")


def test_a_row_with_more_segments_than_expected_is_no_number_and_no_leak():
    arrays, _ = arrays_of(2, 2, 8, "float32")
    attend = functools.partial(cudnn_attention, Rule(1.0, None, None), num_segments=4)
    out = jax.jit(attend)(*arrays, jnp.asarray(SEGMENTS))
    too_many = count_segments(SEGMENTS) > 4
    assert np.isnan(out[too_many]).all() and np.isfinite(out[~too_many]).all()
    assert too_many.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("attention", 1), ("full", 2)])
def test_remat_runs_the_forward_kernel_again_only_where_it_keeps_nothing(remat, times):
    """Its output and its statistics are kept by name; of these, one number for each head and token."""
    (q, k, v), _ = arrays_of(4, 2, 16, "float32")

    @functools.partial(jax.checkpoint, policy=POLICIES[remat])
    def layer(q, k, v):
        out = cudnn_attention(Rule(1.0, None, None), jnp.sin(q), k, v, jnp.asarray(SEGMENTS), num_segments=8)
        return jnp.sin(out)

    text = str(jax.make_jaxpr(jax.grad(lambda *x: layer(*x).sum(), (0, 1, 2)))(q, k, v))
    assert text.count("dot_product_attention_fwd[") == times and text.count("dot_product_attention_bwd[") == 1
    _, residuals = jax.eval_shape(lambda *x: jax.vjp(layer, *x), q, k, v)
    sizes = sorted(each.size for each in jax.tree.leaves(residuals) if each.dtype == jnp.float32)
    assert (4 * LENGTH * 4 in sizes) == (remat != "full") and max(sizes) == q.size


@pytest.mark.parametrize("window", [None, 7])
def test_the_program_for_a_gpu_calls_the_kernels_with_the_packed_layout(window):
    """Lowered for CUDA on a machine without it: both calls, what they are told, and no scores."""
    (q, k, v), _ = arrays_of(4, 2, 16, "bfloat16")

    def loss(q, k, v):
        return cudnn_attention(Rule(0.5, window, None), q, k, v, jnp.asarray(SEGMENTS), num_segments=8).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"stablehlo.custom_call @(__cudnn\$\w+)\(([^)]*)\) .*?backend_config = \"(.*?)\", ", text)
    assert [name for name, *_ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for (_, operands, config), count in zip(calls, (7, 10), strict=True):
        told = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert len(operands.split(",")) == count, "lengths and places of queries and of keys are the last four"
        assert told["mask_type"] == "PADDING_CAUSAL" and told["max_seg_per_batch"] == 8 and told["fmha_scale"] == 0.5
        assert told["sliding_window_length"] == (window or 0)
    assert f"{LENGTH}x{LENGTH}" not in text


# When it is taken, and when not.


def shapes(num_rows=8, length=4096, heads=(32, 8), head_dim=128, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((num_rows, length, each, head_dim), dtype) for each in heads]


REFUSED = {
    "sinks": ({}, {"has_sinks": True}, "no attention sinks"),
    "soft cap": ({}, {"soft_cap": 30.0}, "no soft cap"),
    "a stream": ({}, {"num_segments": None}, "not known before it is read, as packed rows are streamed"),
    "float32": ({"dtype": jnp.float32}, {}, "cuDNN computes in bfloat16, and model.compute_dtype is float32"),
    "wide heads": ({"head_dim": 264}, {}, "heads of up to 256 numbers, a multiple of 8, .* have 264"),
    "odd heads": ({"head_dim": 100}, {}, "a multiple of 8, .* have 100"),
    "many places": ({"num_rows": 128}, {}, "2,147,483,648 numbers, and cuDNN counts up to 2,147,483,647; a smaller"),
    "many segments": ({"num_rows": 16}, {"num_segments": 512}, "4.0 GiB beside a layer, more than 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_and_ours_is_taken(case, on_h100):
    changed, known, why = REFUSED[case]
    known = {"num_segments": 16} | known
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        choice = choose_kernel("auto", *shapes(**changed), **known)
        assert choice.kernel == "xla" and re.search(why, choice.why)
        with pytest.raises(ConfigError, match=f"model.attention: cudnn, but .*{why}.*; set it to xla, or leave it out"):
            choose_kernel("cudnn", *shapes(**changed), **known)


def test_meshes_that_cut_rows_or_heads_otherwise_are_refused(on_h100):
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2), jax.devices()[:4])):
        choice = choose_kernel("auto", *shapes(), num_segments=16)
        assert choice.kernel == "xla" and choice.why == "cuDNN wants whole rows, and mesh.context cuts them"
    with jax.set_mesh(make_mesh(MeshConfig(tensor=4), jax.devices()[:4])):
        choice = choose_kernel("auto", *shapes(heads=(8, 2)), num_segments=16)
        assert choice.kernel == "xla" and "the mesh does not cut 8 b, 4096 t, 2 k, 128 h evenly" in choice.why
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        # What a device has on its own counts.
        assert choose_kernel("auto", *shapes(num_rows=128), num_segments=16).kernel == "cudnn"


@pytest.mark.parametrize(
    ("capability", "why"),
    [((8, 0), "Hopper and newer GPUs .compute capability 9.0., not on NVIDIA H100"), (None, "not on NVIDIA H100")],
)
def test_older_and_other_gpus_are_refused(capability, why, on_h100, monkeypatch):
    monkeypatch.setattr(cudnn, "device_capability", lambda: capability)
    choice = choose_kernel("auto", *shapes(), num_segments=16)
    assert choice.kernel == "xla" and re.search(why, choice.why)


def test_wide_heads_are_for_hopper_only(on_h100, monkeypatch):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert choose_kernel("auto", *shapes(head_dim=256), num_segments=16).kernel == "cudnn"
        monkeypatch.setattr(cudnn, "device_capability", lambda: (10, 0))
        assert "heads of up to 128" in choose_kernel("auto", *shapes(head_dim=256), num_segments=16).why
        assert choose_kernel("auto", *shapes(), num_segments=16).kernel == "cudnn"


def test_without_cudnn_or_with_an_unknown_jax_it_is_refused(on_h100, monkeypatch):
    def no_cudnn():
        raise RuntimeError("cuDNN is not detected.")

    def why():
        return choose_kernel("auto", *shapes(), num_segments=16).why

    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 90500)
    assert why() == "cuDNN 90500 is too old for packed rows, which need 90600"
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", no_cudnn)
    assert why() == "JAX found no cuDNN"
    monkeypatch.setattr(cudnn, "KNOWN_JAX", ((0, 9),))
    assert why() == f"how JAX {jax.__version__} calls cuDNN is not known here"
    monkeypatch.setattr(cudnn, "fused", None)
    assert why() == f"how JAX {jax.__version__} calls cuDNN is not known here"


def test_on_other_devices_it_is_refused():
    for platform, kind in (("cpu", "cpu"), ("tpu", "TPU v5p")):
        why = cudnn.cudnn_problem(platform, kind, *shapes(), num_segments=2, soft_cap=None, has_sinks=False)
        assert why == f"cuDNN runs on NVIDIA GPUs, not on {kind}"
    with pytest.raises(ConfigError, match="model.attention: cudnn, but cuDNN runs on NVIDIA GPUs, not on cpu; set it"):
        choose_kernel("cudnn", *shapes(), num_segments=2)


def test_the_choice_says_what_and_why(on_h100):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert choose_kernel("auto", *shapes(), num_segments=16) == (
            "cudnn",
            "NVIDIA H100 80GB HBM3, packed layout, up to 16 segments in a row",
        )
        assert choose_kernel("cudnn", *shapes(), num_segments=2).why.startswith("as asked for; NVIDIA H100")
        assert choose_kernel("xla", *shapes(), num_segments=2) == ("xla", "as asked for")
        with pytest.raises(ConfigError, match="model.attention: splash, but it runs on TPUs, not on NVIDIA H100"):
            choose_kernel("splash", *shapes())


# The check before a run.

CONFIG = dataclasses.replace(
    decoder_config(
        {
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
    ),
    layers=(LayerKind(window=7),),
)


def test_the_check_passes_and_finds_faults(on_h100, monkeypatch):
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2), jax.devices()[:2])):
        assert check_kernel("cudnn", CONFIG, "bfloat16") < 0.02

    def off_by_one(*arrays, **options):
        return attention(*arrays, **options | {"window": options["window"] and options["window"] + 1})

    def merged(q, k, v, **options):
        ids = jnp.where(options["q_segment_ids"] == 2, 1, options["q_segment_ids"])
        return attention(q, k, v, **options | {"q_segment_ids": ids, "kv_segment_ids": ids})

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        with pytest.raises(ConfigError, match="model.attention: cudnn: .* with a window of 7: output by"):
            check_kernel("cudnn", CONFIG, "bfloat16", attend=off_by_one)
        with pytest.raises(ConfigError, match="model.attention: cudnn: .*: output by"):
            check_kernel("cudnn", CONFIG, "bfloat16", attend=merged)
        # As JAX before 0.11.1 counts places, of grouped queries.
        monkeypatch.setattr(cudnn, "GROUPED_SINCE", (0, 0))
        if jax.__version_info__ < (0, 11, 1):
            with pytest.raises(ConfigError, match="model.attention: cudnn: .*: output"):
                check_kernel("cudnn", CONFIG, "bfloat16")


# Who says how many segments there are.


def run_like_h100(tiny_config, *overrides):
    """A run whose model has heads of 8, as those of the tiny model are too narrow."""
    setup = Setup(load_config(tiny_config, ["model.compute_dtype=bfloat16", *overrides]))
    structure = dataclasses.replace(setup.pretrained.decoder_config, head_dim=8)
    setup.pretrained = setup.pretrained._replace(decoder_config=structure)
    return setup


def test_a_run_takes_the_number_from_its_packer(tiny_config, on_h100):
    setup = run_like_h100(tiny_config)
    said = setup.attention
    counts = [
        count_segments(loader.batch(step).segment_ids).max()
        for loader in (setup.loader, *(each.loader for each in setup.held_out))
        for step in range(loader.steps_per_epoch)
    ]
    room = room_for_segments(int(max(counts)))
    assert re.fullmatch(rf"cudnn \(NVIDIA .*, up to {room} segments in a row\); apart from the formula by .*%.*", said)
    of_model = nnx.merge(*setup.pretrained.model).layers.self_attn
    assert (of_model.kernel, of_model.num_segments) == ("cudnn", room)


def test_a_stream_is_refused_unless_its_rows_hold_one_example(tiny_config, on_h100):
    stream = ("data.stream=true", "train.steps=2")
    setup = run_like_h100(tiny_config, *stream)
    assert setup.attention.startswith("xla (how many segments a row has at most is not known before it is read")
    assert nnx.merge(*setup.pretrained.model).layers.self_attn.num_segments is None
    with pytest.raises(ConfigError, match="model.attention: cudnn, but how many segments"):
        _ = run_like_h100(tiny_config, *stream, "model.attention=cudnn").attention
    alone = run_like_h100(tiny_config, *stream, "data.packing=false", "model.attention=cudnn")
    assert ", up to 2 segments in a row" in alone.attention


def test_a_kernel_that_fails_its_check_is_an_error_only_where_it_was_asked_for(tiny_config, on_h100, monkeypatch):
    def fails(*_):
        raise ConfigError("the kernel does not run")

    monkeypatch.setattr("jaxsft.setup.check_kernel", fails)
    assert run_like_h100(tiny_config).attention == "xla (the kernel does not run)"
    with pytest.raises(ConfigError, match="the kernel does not run"):
        _ = run_like_h100(tiny_config, "model.attention=cudnn").attention


def test_a_model_that_nobody_told_of_rows_takes_ours(tiny_config):
    setup = run_like_h100(tiny_config, "model.attention=cudnn")
    assert nnx.merge(*setup.pretrained.model).layers.self_attn.kernel == "auto"


def test_a_decoder_computes_the_same_by_either(on_h100):
    """Loss and gradients, through layers that are scanned and keep what attention makes."""
    tokens = np.random.default_rng(0).integers(1, CONFIG.vocab_size, SEGMENTS.shape).astype(np.int32)

    def gradients(kernel):
        made = Decoder(
            dataclasses.replace(CONFIG, layers=(LayerKind(window=7), LayerKind())),
            compute_dtype="bfloat16",
            param_dtype="float32",
            remat="attention",
            attention=kernel,
            rngs=nnx.Rngs(0),
        )
        model = with_attention(Model(*nnx.split(made, nnx.Param, ...)), kernel, num_segments=8)

        def loss(params):
            out = nnx.merge(model.graphdef, params)(tokens, SEGMENTS, POSITIONS)
            return jnp.where((SEGMENTS > 0)[..., None], jnp.sin(out.hidden.astype(jnp.float32)), 0).mean()

        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            return jax.jit(jax.value_and_grad(loss))(model.params)

    (ours, theirs), (grads, their_grads) = zip(gradients("cudnn"), gradients("xla"), strict=True)
    assert ours == pytest.approx(float(theirs), abs=1e-4)
    for mine, their in zip(jax.tree.leaves(grads), jax.tree.leaves(their_grads), strict=True):
        assert np.abs(mine - their).max() <= 0.03 * np.abs(their).max()
