"""The table of bytes: against the compiled step, against shapes counted by hand, and what it advises."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from compilation import TO_READ
from flax import nnx

from jaxsft.batch import Batch
from jaxsft.config import MeshConfig
from jaxsft.config_files import config_keys, load_config
from jaxsft.folders.pretrained import open_model, open_tokenizer
from jaxsft.mesh import batch_sharding, make_mesh, shardings
from jaxsft.training.memory import NAMES, describe_bytes, where_bytes_go
from jaxsft.training.step import abstract_state, make_train_step

ROWS, LENGTH, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 8, 256, 128, 4, 2, 32, 384, 4


@pytest.fixture(scope="module")
def folder(repo, tmp_path_factory):
    """A model folder without weights, in which layers weigh more than what every step has besides."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(repo / "configs" / "quickstart" / name, folder)
    config = json.loads((repo / "configs" / "quickstart" / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "head_dim": HEAD_DIM}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder, overrides=(), sizes=None):
    source = {
        "model": {"path": str(folder), "weights": "random"},
        "data": {"train": "none", "seq_len": LENGTH},
        "train": {"batch_size": ROWS},
    }
    config = load_config(source, [*overrides])
    model = open_model(config.model, open_tokenizer(config.model), config.lora).model
    sizes = sizes or {}
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    table = where_bytes_go(
        model,
        config.optim,
        mesh,
        rows=config.train.microbatch_rows,
        length=LENGTH,
        num_microbatches=config.train.num_microbatches,
    )
    return config, model, mesh, table


def bytes_of(table):
    return {term.name: term.num_bytes for term in table.terms}


def test_quantised_weights_are_counted_as_they_lie_and_as_what_a_layer_makes_of_them(folder):
    sizes = {"fsdp": 2, "tensor": 2}
    _, _, _, plain = opened(folder, ["lora.rank=8"], sizes)
    _, model, mesh, table = opened(folder, ["lora.rank=8", "model.quantize=nf4"], sizes)
    held = [
        math.prod(place.get_value().shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(
            jax.tree.leaves(model.frozen, is_leaf=is_variable),
            jax.tree.leaves(shardings(mesh, model.frozen), is_leaf=is_variable),
            strict=True,
        )
    ]
    assert bytes_of(table)["frozen"] == sum(held) < 0.5 * bytes_of(plain)["frozen"]
    numbers = WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * MLP
    assert bytes_of(table)["one layer"] >= numbers // sizes["tensor"] * 4


def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


@pytest.mark.parametrize(
    ("overrides", "sizes", "error"),
    [
        (["model.remat=none"], {}, 0.15),
        (["model.remat=full", "train.microbatch_size=4", "optim.moment_dtype=bfloat16"], {}, 0.08),
        (["model.remat=attention", "model.param_dtype=bfloat16", "model.compute_dtype=bfloat16"], {"fsdp": 4}, 0.2),
        # XLA on CPUs writes what maps and their adapters give apart, before it adds them.
        (["model.remat=full", "lora.rank=8"], {"fsdp": 2, "tensor": 2}, 0.32),
    ],
    ids=["none", "full, accumulated", "attention, bfloat16, fsdp", "full, adapters, tensor"],
)
def test_the_peak_is_that_of_the_compiled_step(folder, overrides, sizes, error):
    """On CPUs arguments and temporary arrays together; of larger models, docs/memory.md has the errors."""
    config, model, mesh, table = opened(folder, overrides, sizes)
    step = make_train_step(model, config.optim, num_steps=9, num_microbatches=config.train.num_microbatches, mesh=mesh)
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
    weights = jax.ShapeDtypeStruct(rows.shape, jnp.float32, sharding=rows.sharding)
    with jax.set_mesh(mesh):
        state = abstract_state(model.params, config.optim, mesh)
        lowered = step.lower(state, model.frozen, Batch(rows, rows, weights, rows, rows))
        compiled = lowered.compile(TO_READ).memory_analysis()
    peak = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    assert table.peak == pytest.approx(peak, rel=error), {name: n / peak for name, n in bytes_of(table).items()}


def test_what_is_stored_is_counted_by_shapes(folder):
    layer = WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * MLP + 2 * WIDTH
    count = LAYERS * layer + 384 * WIDTH + WIDTH
    plain = bytes_of(opened(folder)[-1])
    assert plain["parameters"] == plain["gradients"] == 4 * count and plain["frozen"] == 0
    assert 0 <= plain["optimizer"] - 8 * count < 64  # moments, and a counter
    halved = bytes_of(opened(folder, ["optim.moment_dtype=bfloat16", "train.microbatch_size=2"])[-1])
    assert halved["optimizer"] < 0.51 * plain["optimizer"]
    assert halved["gradients"] == 2 * plain["gradients"]  # the sum, and what a microbatch gives
    eight_bits = bytes_of(opened(folder, ["optim.name=adamw8bit"])[-1])
    assert eight_bits["optimizer"] < 0.3 * plain["optimizer"]  # a byte in place of four, and scales of blocks
    cut = bytes_of(opened(folder, sizes={"fsdp": 2, "tensor": 2})[-1])
    assert cut["parameters"] < 0.26 * plain["parameters"]
    adapters = bytes_of(opened(folder, ["lora.rank=8"])[-1])
    assert adapters["frozen"] == pytest.approx(plain["parameters"], rel=1e-4)  # and the numbers of layers and maps
    assert adapters["gradients"] == adapters["parameters"] < 0.1 * plain["parameters"]


def test_what_layers_keep_is_what_their_names_say(folder):
    """Letters by hand; besides, what is kept once for all layers: a few arrays as large as the hidden states."""
    tokens = ROWS * LENGTH
    kept = {
        remat: bytes_of(opened(folder, [f"model.remat={remat}"])[-1])["activations"]
        for remat in ("none", "attention", "full", "offload")
    }
    attended = HEADS * HEAD_DIM + HEADS  # what comes out, and the logarithms of totals
    linear = (HEADS + 2 * KV_HEADS) * HEAD_DIM + WIDTH + 2 * MLP
    expected = {
        "full": WIDTH,
        "attention": WIDTH + attended + WIDTH,
        "none": WIDTH + attended + linear,
        "offload": 0,
    }
    besides = 4 * tokens * 4 * WIDTH
    for remat, each in expected.items():
        assert 0 <= kept[remat] - 4 * tokens * LAYERS * each <= besides, remat


def test_the_largest_entry_comes_with_keys_that_exist_and_are_not_set_so(folder):
    known = {key for key, *_ in config_keys()} | {"lora.rank"}
    for overrides, sizes in (([], {}), (["model.remat=none", "lora.rank=8"], {"data": 2})):
        *_, table = opened(folder, overrides, sizes)
        assert [term.name for term in table.terms] == list(NAMES)
        assert table.peak < sum(bytes_of(table).values())
        for term in table.terms:
            advised = re.findall(r"[a-z]+\.[a-z_]+", term.lowered_by)
            assert set(advised) <= known and bool(advised) == bool(term.num_bytes), term
    by_name = {term.name: term.lowered_by for term in table.terms}
    assert "model.remat attention, or full (now none)" in by_name["activations"]
    assert "instead of mesh.data (now 2)" in by_name["frozen"] and "model.quantize nf4 (now none)" in by_name["frozen"]
    text = describe_bytes(table, limit=2**20)
    assert f"most are {table.largest.name}; fewer with {table.largest.lowered_by}" in text
    assert "WARNING" in text and "more than a device has" in text
    assert "WARNING" not in describe_bytes(table, limit=table.peak)
