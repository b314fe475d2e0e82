"""The step, compiled by the real compiler for one small topology of each family of TPUs, none of which is there."""

import functools
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh, partition_spec, shardings
from jaxsft.model import splash
from jaxsft.model.attention import attention
from jaxsft.model.layers import Linear
from jaxsft.model.splash import largest_block
from jaxsft.training import compiler_options, loss_in_blocks
from jaxsft.training.program import hlo_lines, total_bytes

WIDTH, MLP_WIDTH, NUM_LAYERS, VOCAB_SIZE = 256, 512, 2, 4096
SHAPE = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
PER_LAYER = WIDTH * 64 * (4 + 2 + 2 + 4) + 3 * WIDTH * MLP_WIDTH
NUM_PARAMS = VOCAB_SIZE * WIDTH + NUM_LAYERS * (PER_LAYER + 2 * WIDTH) + WIDTH
ROWS, LENGTH = 8, 128

TOPOLOGIES = {"v4:2x2x1": 8, "v5e:2x2": 4, "v5p:2x2x1": 4, "v6e:2x2": 4, "tpu7x:2x2x1": 8}
"""Name -> devices; two on each chip of v4 and tpu7x."""
ASYNCHRONOUS = {"v5e", "v6e", "tpu7x"}
"""Families for which the compiler gathers the weights of a layer while it computes: by itself, or as it is told to."""
KINDS = {"TPU v6 lite": "v6e:2x2"}
"""Kind of device that there are options for -> a topology."""


@pytest.fixture(scope="module")
def tpu_compile(repo):
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")
    spec = importlib.util.spec_from_file_location("tpu_compile", repo / "benchmarks" / "tpu_compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return path


def num_kernels(compiled, phase):
    """Calls of a kernel of splash attention in a program, all of which count as attention in a profile."""
    calls = [line for line in hlo_lines(compiled.text) if " custom-call(" in line and f"splash_mha_{phase}" in line]
    assert all(re.search(r"\battention\b", line) for line in calls)
    return len(calls)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_step_compiles_and_is_accounted_for(tpu_compile, model, topology):
    overrides = [f"data.seq_len={LENGTH}", f"train.batch_size={ROWS}", "mesh.tensor=2"]
    config = tpu_compile.read_config(model, overrides)
    compiled = tpu_compile.compile_step(config, topology)
    num_devices, family = TOPOLOGIES[topology], topology.split(":")[0]
    assert compiled.mesh == {"data": 1, "fsdp": num_devices // 2, "expert": 1, "context": 1, "tensor": 2}

    # float32 parameters and two moments, each cut over all devices but for the norms, and five leaves of a batch; what
    # fills up tiles comes on top.
    arguments = (3 * 4 * NUM_PARAMS + 2 * 5 * 4 * ROWS * LENGTH) / num_devices
    assert arguments <= compiled.argument_bytes < 1.4 * arguments
    assert compiled.peak_bytes > compiled.argument_bytes
    # With full remat, the forward kernel is in the backward loop over layers, too.
    assert num_kernels(compiled, "fwd") == 2 and num_kernels(compiled, "dkv") == 1

    totals = total_bytes(compiled.report.collectives)
    assert {axes for _, _, axes in totals} <= {("fsdp",), ("tensor",), ("fsdp", "tensor")}
    # Each device gathers its half of a layer in bfloat16, forward and backward, in two places at most for the latter.
    number, gathered = totals["layers", "all-gather", ("fsdp",)]
    once = NUM_LAYERS * PER_LAYER // 2 * 2
    assert 2 * once <= gathered <= 3 * once and number % NUM_LAYERS == 0
    reduced = sum(totals.get(("layers", kind, ("fsdp",)), (0, 0))[1] for kind in ("reduce-scatter", "all-reduce"))
    assert 2 * once <= reduced < 3 * once  # gradients are float32
    # Over `tensor`, what attention and MLP add (the former again in the backward pass), and the gradients by what goes
    # into either, in bfloat16.
    hidden = ROWS // (num_devices // 2) * LENGTH * WIDTH * 2
    assert totals["layers", "all-reduce", ("tensor",)][1] == NUM_LAYERS * 5 * hidden
    assert math.prod(compiled.mesh.values()) == num_devices
    assert (tpu_compile.async_share(compiled.report) > 0.3) == (family in ASYNCHRONOUS)

    text = tpu_compile.describe(compiled, config)
    assert f"fsdp {num_devices // 2} x tensor 2; 8 rows of 128; remat full" in text
    assert f"layers    all-gather          fsdp{number:>28,}" in text


def test_copies_sum_up_their_gradients_once_a_step(tpu_compile, model):
    overrides = [f"data.seq_len={LENGTH}", f"train.batch_size={4 * ROWS}", f"train.microbatch_size={ROWS}"]
    config = tpu_compile.read_config(model, [*overrides, "mesh.data=2", "mesh.tensor=2", "model.remat=attention"])
    compiled = tpu_compile.compile_step(config, "v5e:2x4")
    assert num_kernels(compiled, "fwd") == num_kernels(compiled, "dkv") == 1  # its results are kept
    assert {axis: size for axis, size in compiled.mesh.items() if size > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    between = [each for each in compiled.report.collectives if "data" in each.axes]
    assert {each.times for each in between} == {1}
    gradients = 4 * NUM_PARAMS / 4
    assert gradients <= sum(each.num_bytes for each in between) < 1.02 * gradients


@pytest.mark.parametrize(("kind", "version"), compiler_options.TPU)
def test_each_of_the_options_of_a_version_makes_gathers_asynchronous(tpu_compile, model, monkeypatch, kind, version):
    if (installed := compiler_options.libtpu_version()) != version:
        pytest.skip(f"this is libtpu {installed}")
    config = tpu_compile.read_config(model, [f"data.seq_len={LENGTH}", f"train.batch_size={ROWS}"])

    def number_and_share(options):
        monkeypatch.setitem(compiler_options.TPU, (kind, version), options)
        compiled = tpu_compile.compile_step(config, KINDS[kind])
        assert set(compiled.mesh.values()) == {1, 4}
        # Of the layers: the table of so small a model is as large as they are.
        of_layers = [each for each in compiled.report.collectives if each.scope == "layers"]
        return compiled.report.num_async, tpu_compile.async_share(compiled.report._replace(collectives=of_layers))

    options = compiler_options.TPU[kind, version]
    assert number_and_share({}) == (0, 0.0)
    number, share = number_and_share(options)
    assert number >= 10 and share > 0.6
    for name in options:
        assert number_and_share({key: value for key, value in options.items() if key != name})[0] < number


def test_weights_are_rounded_layer_by_layer(tpu_compile):
    """Not those of all layers before the first, which would then be kept."""
    sizes = {"l": 32, "d": 512, "f": 512}

    def make():
        return Linear("d -> f", sizes, bias=False, std=0.1, dtype=jnp.float32, rngs=nnx.Rngs(0))

    graphdef, weights = nnx.split(nnx.eval_shape(make))
    mesh = make_mesh(MeshConfig(), tpu_compile.devices_of("v5p:2x2x1"))
    rows = jax.ShapeDtypeStruct((8, 64, 512), jnp.bfloat16, sharding=NamedSharding(mesh, partition_spec("b t d")))

    @functools.partial(jax.jit, in_shardings=(shardings(mesh, weights), rows.sharding))
    def run(weights, x):
        return jax.lax.scan(lambda x, of_layer: (jnp.tanh(nnx.merge(graphdef, of_layer)(x)), None), x, weights)[0]

    with jax.set_mesh(mesh):
        memory = run.lower(weights, rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 512 * 512 * 2 / 4


def test_other_versions_and_other_devices_have_no_options_and_it_is_said(tpu_compile, monkeypatch):
    def mesh_of(topology):
        return make_mesh(MeshConfig(), tpu_compile.devices_of(topology))

    monkeypatch.setattr(compiler_options, "TPU", {("TPU v6 lite", "1.2.3"): {"some_flag": "true"}})
    monkeypatch.setattr(compiler_options, "libtpu_version", lambda: "1.2.3")
    assert compiler_options.compiler_options(mesh_of("v6e:2x2")) == {"some_flag": "true"}
    assert compiler_options.describe_options(mesh_of("v6e:2x2")) == "libtpu 1.2.3, some_flag=true"
    assert compiler_options.compiler_options(mesh_of("v5e:2x2")) == {}
    said = compiler_options.describe_options(mesh_of("v5e:2x2"))
    assert said == "libtpu 1.2.3, no options: none are known to help on TPU v5 lite"
    monkeypatch.setattr(compiler_options, "libtpu_version", lambda: "1.2.4")
    assert compiler_options.compiler_options(mesh_of("v6e:2x2")) == {}
    said = compiler_options.describe_options(mesh_of("v6e:2x2"))
    assert said == "libtpu 1.2.4, no options: tried with 1.2.3 only"
    assert compiler_options.describe_options(make_mesh(MeshConfig())) is None


def test_a_table_in_blocks_is_gathered_twice_and_never_whole(tpu_compile, model, monkeypatch):
    monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 2**17)
    overrides = [f"data.seq_len={LENGTH}", f"train.batch_size={ROWS}"]
    compiled = tpu_compile.compile_step(tpu_compile.read_config(model, overrides), "v4:2x2x1")
    totals = total_bytes(compiled.report.collectives)
    table = VOCAB_SIZE * WIDTH
    assert totals["loss", "all-gather", ("fsdp",)] == (2 * 8, 2 * table * 2)  # of eight blocks, in bfloat16
    reduced = [totals.get(("loss", kind, ("fsdp",)), (0, 0)) for kind in ("reduce-scatter", "all-reduce")]
    assert table * 4 <= sum(num_bytes for _, num_bytes in reduced) < 1.01 * table * 4
    assert max(array.num_bytes for array in compiled.report.arrays if array.scope == "loss") <= table * 4 // 8


@pytest.mark.parametrize(("kernel", "num_parts"), [("splash", 1), ("xla", 2)])
def test_of_rows_that_are_cut_keys_are_gathered_for_a_whole_layer_and_their_gradients_reduced_in_float32(
    tpu_compile, model, kernel, num_parts
):
    overrides = [f"data.seq_len={LENGTH}", f"train.batch_size={ROWS}", "mesh.context=2"]
    config = tpu_compile.read_config(model, [*overrides, f"model.attention={kernel}"])
    compiled = tpu_compile.compile_step(config, "v6e:2x2")
    layers = [each for each in compiled.report.collectives if each.scope == "layers"]
    assert not any(each.is_open for each in layers)  # none within attention's loops over tiles
    gathered, reduced = (
        [each for each in layers if each.axes == ("context",) and (each.kind == "all-gather") == is_gathered]
        for is_gathered in (True, False)
    )
    # Keys and values are gathered whole or in two parts: forward, and twice backward at most, where the layer is
    # computed again.
    of_part, times = ROWS // 2 * LENGTH * 2 * 64 * 2 // num_parts, 2 * num_parts * NUM_LAYERS
    assert {each.num_bytes for each in gathered} == {of_part}
    assert 2 * times <= sum(each.times for each in gathered) <= 3 * times
    assert {each.num_bytes for each in reduced} == {2 * of_part}
    assert sum(each.times for each in reduced) == times


@pytest.mark.parametrize(
    ("topology", "head_dim", "fused"), [("v5e:2x2", 256, False), ("v6e:2x2", 128, True), ("v5p:2x2x1", 128, True)]
)
def test_splash_compiles_in_its_largest_blocks_with_all_that_models_ask_of_it(tpu_compile, topology, head_dim, fused):
    """In the step above, rows are shorter than a block."""
    mesh = make_mesh(MeshConfig(), tpu_compile.devices_of(topology)[:1])
    size = largest_block(mesh.devices.flat[0].device_kind, head_dim)
    length = 2 * size

    def gradients(q, k, v, sinks, segment_ids):
        options = dict.fromkeys(("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions"), segment_ids)
        options |= {"window": size + 100, "soft_cap": 50.0, "sinks": sinks, "kernel": "splash"}
        return attention(q, k, v, **options).astype(jnp.float32).sum()

    def array(axes, shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

    arrays = [
        array(f"b t {letter} h", (1, length, heads, head_dim)) for letter, heads in (("n", 4), ("k", 2), ("k", 2))
    ]
    arrays += [array("n", (4,), jnp.float32), array("b t", (1, length), jnp.int32)]
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(splash, "FUSED_BYTES", 2**62 if fused else 0)
        text = jax.jit(jax.grad(gradients, (0, 1, 2, 3))).lower(*arrays).compile().as_text()
    assert "splash_mha_dkv" in text and ("splash_mha_dq" in text) != fused


@pytest.mark.parametrize(("topology", "head_dim"), [("v5e:2x2", 256), ("v6e:2x2", 64), ("v5p:2x2x1", 128)])
def test_kernels_for_packed_rows_compile_with_all_that_models_ask_of_them(tpu_compile, topology, head_dim):
    mesh = make_mesh(MeshConfig(tensor=2), tpu_compile.devices_of(topology)[:4])
    length = 600  # fills up blocks of queries and of keys

    def gradients(q, k, v, sinks, segment_ids):
        options = dict.fromkeys(("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions"), segment_ids)
        options |= {"window": 300, "soft_cap": 50.0, "sinks": sinks, "kernel": "packed"}
        return attention(q, k, v, **options).astype(jnp.float32).sum()

    def array(axes, shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

    arrays = [
        array(f"b t {letter} h", (2, length, heads, head_dim)) for letter, heads in (("n", 6), ("k", 2), ("k", 2))
    ]
    arrays += [array("n", (6,), jnp.float32), array("b t", (2, length), jnp.int32)]
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(gradients, (0, 1, 2, 3))).lower(*arrays).compile().as_text()
    calls = [line for line in text.splitlines() if " custom-call(" in line and "packed_" in line]
    kernels = [re.search(r"packed_(?:forward|by_queries|by_keys)", line)[0] for line in calls]
    assert sorted(kernels) == ["packed_by_keys", "packed_by_queries", "packed_forward"]
