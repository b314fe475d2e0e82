"""Weights in files and on meshes: the language of the tables, round trips to the byte, memory, processes, bad files."""

import json
import os
import pathlib
import resource
import socket
import struct
import subprocess
import sys
import textwrap
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.folders.weights import copying, layout
from jaxsft.folders.weights import load as weights
from jaxsft.folders.weights.check import check_weights
from jaxsft.folders.weights.save import write_weights
from jaxsft.folders.weights.stored import INDEX_FILE, Stored, open_folder
from jaxsft.folders.weights.together import cast_bits
from jaxsft.mesh import make_mesh, shardings

SIZES = dict(l=3, v=128, d=16, n=8, k=4, h=6, f=24, e=4)
VOCAB = 121
"""Of the 128 rows in the state."""

WEIGHTS = {
    "embed_tokens.weight": ("model.embed.weight", "v d"),
    "layers.norm.weight": ("model.layers.{l}.norm.weight", "d"),
    "layers.q.weight": ("model.layers.{l}.qkv.weight", "(n*+k+k h) d"),
    "layers.k.weight": ("model.layers.{l}.qkv.weight", "(n+k*+k h) d"),
    "layers.v.weight": ("model.layers.{l}.qkv.weight", "(n+k+k* h) d"),
    "layers.q.bias": ("model.layers.{l}.qkv.bias", "(n*+k+k h)"),
    "layers.k.bias": ("model.layers.{l}.qkv.bias", "(n+k*+k h)"),
    "layers.v.bias": ("model.layers.{l}.qkv.bias", "(n+k+k* h)"),
    "layers.o.weight": ("model.layers.{l}.o.weight", "d (n h)"),
    "layers.conv_q.weight": ("model.layers.{l}.conv.weight", "d (1*+1 n h)"),
    "layers.conv_k.weight": ("model.layers.{l}.conv.weight", "d (1+1* n h)"),
    "layers.head_q.weight": ("model.layers.{l}.heads.weight", "(n 1*+1+1 h) d"),
    "layers.head_k.weight": ("model.layers.{l}.heads.weight", "(n 1+1*+1 h) d"),
    "layers.head_v.weight": ("model.layers.{l}.heads.weight", "(n 1+1+1* h) d"),
    "layers.gate.weight": ("model.layers.{l}.experts.gate_up", "e d (f 1*+1)"),
    "layers.up.weight": ("model.layers.{l}.experts.gate_up", "e d (f 1+1*)"),
    "layers.down.weight": ("model.layers.{l}.experts.{e}.down.weight", "d f"),
    "lm_head.weight": ("lm_head.weight", "v d"),
}
FAMILY = types.SimpleNamespace(WEIGHTS=WEIGHTS, IGNORED=("*.inv_freq", "model.layers.*.mask"))

AXES = {
    "embed_tokens.weight": "v d",
    "layers.norm.weight": "l d",
    **{f"layers.{name}.weight": f"l d {name[-1].replace('q', 'n').replace('v', 'k')} h" for name in "qkv"},
    **{f"layers.{name}.bias": f"l {name.replace('q', 'n').replace('v', 'k')} h" for name in "qkv"},
    "layers.o.weight": "l n h d",
    **{f"layers.{name}.weight": "l d n h" for name in ("conv_q", "conv_k", "head_q", "head_k", "head_v")},
    "layers.gate.weight": "l e d f",
    "layers.up.weight": "l e d f",
    "layers.down.weight": "l e f d",
    "lm_head.weight": "v d",
}


def expected(tensors, path):
    """The naive way, by hand for each line of the table."""
    n, k, h, f = (SIZES[letter] for letter in "nkhf")
    d = SIZES["d"]

    def of(layer):
        def get(name):
            return tensors[f"model.layers.{layer}.{name}"]

        rows = {"q": slice(0, n * h), "k": slice(n * h, (n + k) * h), "v": slice((n + k) * h, None)}
        name, kind = path.split(".")[1:]
        if name in rows and kind == "weight":
            return get("qkv.weight")[rows[name]].T.reshape(d, -1, h)
        if name in rows:
            return get("qkv.bias")[rows[name]].reshape(-1, h)
        return {
            "norm": lambda: get("norm.weight"),
            "o": lambda: get("o.weight").T.reshape(n, h, d),
            "conv_q": lambda: get("conv.weight")[:, : n * h].reshape(d, n, h),
            "conv_k": lambda: get("conv.weight")[:, n * h :].reshape(d, n, h),
            "head_q": lambda: get("heads.weight").reshape(n, 3, h, d)[:, 0].transpose(2, 0, 1),
            "head_k": lambda: get("heads.weight").reshape(n, 3, h, d)[:, 1].transpose(2, 0, 1),
            "head_v": lambda: get("heads.weight").reshape(n, 3, h, d)[:, 2].transpose(2, 0, 1),
            "gate": lambda: get("experts.gate_up")[..., ::2],
            "up": lambda: get("experts.gate_up")[..., 1::2],
            "down": lambda: np.stack([get(f"experts.{e}.down.weight").T for e in range(SIZES["e"])]),
        }[name]()

    if path in ("embed_tokens.weight", "lm_head.weight"):
        table = tensors["model.embed.weight" if path.startswith("embed") else "lm_head.weight"]
        return np.concatenate([table, np.zeros((SIZES["v"] - VOCAB, d), table.dtype)])
    return np.stack([of(layer) for layer in range(SIZES["l"])])


def random_tensors(dtype_of=lambda name: np.float32, *, odd=True):
    """The tensors of the table; unless they are to be computed with, some are tiny or very large."""
    n, k, h, f, d, e = (SIZES[letter] for letter in "nkhfde")
    shapes = {"model.embed.weight": (VOCAB, d), "lm_head.weight": (VOCAB, d)}
    for layer in range(SIZES["l"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "norm.weight": (d,),
                "qkv.weight": ((n + 2 * k) * h, d),
                "qkv.bias": ((n + 2 * k) * h,),
                "o.weight": (d, n * h),
                "conv.weight": (d, 2 * n * h),
                "heads.weight": (3 * n * h, d),
                "experts.gate_up": (e, d, 2 * f),
                **{f"experts.{expert}.down.weight": (d, f) for expert in range(e)},
            }.items()
        }
    rng = np.random.default_rng(0)
    values_at_first = [-0.0, 0.0, 1e-40, -1e-42, 6e-8, 6.5e4, 1e38] if odd else []
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        values.reshape(-1)[: len(values_at_first)] = values_at_first
        if dtype_of(name) == np.float16:
            values = values.clip(-6.5e4, 6.5e4)
        tensors[name] = values.astype(dtype_of(name))
    return tensors


def state_of(param_dtype="float32", without=()):
    tree = {}
    for path, axes in AXES.items():
        if path in without:
            continue
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        shape = tuple(SIZES[letter] for letter in axes.split())
        node[leaf] = nnx.Param(jax.ShapeDtypeStruct(shape, np.dtype(param_dtype)), axes=axes)
    return nnx.State(tree)


MESHES = {
    "one": None,
    "fsdp": MeshConfig(fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "expert": MeshConfig(fsdp=2, expert=2, tensor=2),
}


def mesh_of(name):
    return make_mesh(MESHES[name]) if MESHES[name] else make_mesh(MeshConfig(), jax.devices()[:1])


def load(stored, mesh="one", *, param_dtype="float32", without=(), family=FAMILY, **options):
    abstract = state_of(param_dtype, without)
    options = {"vocab_size": VOCAB} | options
    return weights.load_params(
        stored, family, abstract=abstract, shardings=shardings(mesh_of(mesh), abstract), **options
    )


def write(folder, params, stored, *, dtype=None, family=FAMILY, vocab_size=VOCAB, max_shard_bytes=10**9):
    folder.mkdir(exist_ok=True)
    write_weights(
        folder,
        params,
        family,
        vocab_size=vocab_size,
        dtype=None if dtype is None else np.dtype(dtype),
        stored=stored,
        max_shard_bytes=max_shard_bytes,
    )
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" in path.name}


def save(folder, tensors, metadata=None):
    """In one file."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder


def save_split(folder, tensors, *, num_files=3, order=None, metadata=None):
    """In several files, with an index."""
    folder.mkdir(exist_ok=True)
    names = order or list(tensors)
    places = {name: f"part-{at % num_files}.safetensors" for at, name in enumerate(names)}
    for file in set(places.values()):
        inside = {name: tensors[name] for name in names if places[name] == file}
        safetensors.numpy.save_file(inside, folder / file, metadata=metadata)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"weight_map": places, "metadata": {"total_size": size, "made_by": "hand"}}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=4))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), random_tensors(), {"format": "pt"})


# The language of the tables.


def test_a_weight_says_where_it_lies_as_in_its_docstring():
    sizes = dict(l=2, d=64, n=8, k=4, h=8)
    weight = layout.make_weight("k", ("l", "d", "k", "h"), "layers.{l}.qkv.weight", "(n+k*+k h) d", sizes)
    assert [weight.name(index) for index in weight.indices()] == ["layers.0.qkv.weight", "layers.1.qkv.weight"]
    assert (weight.shape, weight.file_shape, weight.to_ours) == ((2, 64, 4, 8), (128, 64), (2, 0, 1))
    assert weight.in_file(((0, 64), (1, 3), (0, 8))) == ((9, 11), (0, 8), (0, 64))
    tensor = np.arange(128 * 64).reshape(128, 64)
    ours = tensor.reshape(16, 8, 64)[8:12].transpose(weight.to_ours)
    np.testing.assert_array_equal(weight.file_order(ours), tensor.reshape(16, 8, 64)[8:12])


@pytest.mark.parametrize(
    "lines",
    [
        {"a": "(f*+f) d"},  # half of the tensor is nobody's
        {"a": "(f*+f) d", "b": "(f*+f) d"},  # one half is two's
        {"a": "(f*+f) d", "b": "(f+f*+f) d"},  # of different shapes
        {"a": "(f 1*+1) d", "b": "(f*+f) d"},
        {"a": "f d", "b": "f d"},
    ],
)
def test_weights_that_do_not_fill_the_tensor_they_share_are_a_bug_of_the_table(lines):
    made = [layout.make_weight(path, ("f", "d"), "x", line, dict(f=4, d=2)) for path, line in lines.items()]
    with pytest.raises(AssertionError):
        layout.check_tiling(made)


@pytest.mark.parametrize("line", ["f", "f d h", "(f+f) d", "(f*+f*) d", "f f d"])
def test_a_layout_that_does_not_name_our_dims_is_a_bug_of_the_table(line):
    with pytest.raises(AssertionError):
        layout.make_weight("a", ("f", "d"), "x", line, dict(f=4, d=2, h=3))


@pytest.mark.parametrize("has_cpu", [True, False])
@pytest.mark.parametrize("dtypes", ["f4 f4", "bf16 f4", "bf16 bf16", "f2 f4", "f4 bf16", "f4 f2"])
def test_copies_are_those_of_numpy_whatever_lies_how(dtypes, has_cpu, monkeypatch):
    monkeypatch.setattr(copying, "TURNED_BYTES", 40)
    if not has_cpu:
        monkeypatch.setattr(copying, "_cpu", lambda: None)
    source_dtype, dtype = (np.dtype(ml_dtypes.bfloat16) if d == "bf16" else np.dtype(d) for d in dtypes.split())
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(rng.integers(1, 12, rng.integers(1, 5)))
        num_rows = int(rng.integers(0, len(shape) + 1))
        views = []
        for each in (dtype, source_dtype):
            order = rng.permutation(len(shape))
            whole = rng.normal(size=[shape[at] + int(rng.integers(0, 3)) for at in order]).astype(each)
            views.append(whole.transpose(np.argsort(order))[tuple(slice(0, size) for size in shape)])
        out, source = views
        copying.copy(out, source, num_rows)
        np.testing.assert_array_equal(out, source.astype(dtype))


# Reading.


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 21])
def test_every_line_of_a_table_reads_what_is_meant_on_every_mesh(mesh, block_bytes, folder, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    loaded = layout.variables_of(load(open_folder(folder), mesh))
    for path, variable in loaded.items():
        value = np.asarray(variable[...])
        np.testing.assert_array_equal(value.view(np.uint32), expected(tensors, path).view(np.uint32), err_msg=path)


class Counted:
    """A stored tensor that counts the bytes that are read of it."""

    def __init__(self, tensor, counts):
        self.tensor, self.counts = tensor, counts
        self.file, self.dtype, self.shape = tensor.file, tensor.dtype, tensor.shape

    def read(self, rows, columns):
        part = self.tensor.read(rows, columns)
        assert part.shape == (rows.stop - rows.start, columns.stop - columns.start)
        self.counts.append(part.nbytes)
        return part


@pytest.mark.parametrize("mesh", MESHES)
def test_a_process_reads_no_byte_twice_however_many_devices_it_has(mesh, folder):
    stored, counts = open_folder(folder), []
    counted = stored._replace(tensors={name: Counted(tensor, counts) for name, tensor in stored.tensors.items()})
    load(counted, mesh)
    # But for two weights whose columns alternate: each is read with the other.
    twice = sum(tensor.num_bytes for name, tensor in stored.tensors.items() if "gate_up" in name)
    assert sum(counts) == sum(tensor.num_bytes for tensor in stored.tensors.values()) + twice


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_cast_as_numpy_casts_them(dtype, param_dtype, tmp_path):
    tensors = random_tensors(lambda name: dtype)
    loaded = load(open_folder(save(tmp_path, tensors)), "all", param_dtype=param_dtype)
    for path, variable in layout.variables_of(loaded).items():
        with np.errstate(over="ignore", invalid="ignore"):
            value = expected(tensors, path).astype(np.float32).astype(param_dtype)
        ours = np.asarray(variable[...])
        assert ours.dtype == param_dtype
        np.testing.assert_array_equal(ours.astype(np.float32), value.astype(np.float32), err_msg=path)


def test_rows_behind_the_vocabulary_are_zeros_and_new_ones_the_mean(tmp_path):
    tensors = random_tensors(odd=False)
    stored = open_folder(save(tmp_path, tensors))
    loaded = load(stored, "all", vocab_size=125, stored_vocab_size=VOCAB, mean_rows=[7])
    for name, tensor in (("embed_tokens", "model.embed.weight"), ("lm_head", "lm_head.weight")):
        table = np.asarray(loaded[name]["weight"][...])
        mean = tensors[tensor].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(table[[7, 121, 122, 123, 124]], np.tile(mean, (5, 1)), rtol=1e-5, atol=1e-6)
        assert not table[125:].any()
        np.testing.assert_array_equal(np.delete(table[:VOCAB], 7, 0), np.delete(tensors[tensor], 7, 0))


# Round trips.


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("split", [False, True])
def test_what_was_read_is_written_again_to_the_byte_in_its_dtypes_and_files(mesh, split, tmp_path):
    def dtype_of(name):
        if name == "lm_head.weight" or "norm" in name or ".0." in name:
            return np.float32
        return np.float16 if ".1.q" in name else ml_dtypes.bfloat16

    tensors = random_tensors(dtype_of)
    tensors |= {"model.layers.1.mask": np.ones((1, 4), np.uint8), "layers.0.inv_freq": np.arange(3, dtype=np.int64)}
    make = save_split if split else save
    folder = make(tmp_path / "model", tensors, metadata={"format": "pt", "z": "ü", "a": "1"})
    stored = open_folder(folder)
    again = write(tmp_path / "again", load(stored, mesh), stored)
    assert contents(again) == contents(folder)


def test_bytes_in_another_order_than_their_header_stay_so(tmp_path):
    """Other writers than the safetensors library: names unsorted in the header, spaces in its JSON."""
    tensors = random_tensors()
    entries, blobs, at = {}, [], 0
    for name in sorted(tensors, reverse=True):
        blob = tensors[name].tobytes()
        entries[name] = {"shape": list(tensors[name].shape), "data_offsets": [at, at + len(blob)], "dtype": "F32"}
        blobs.append(blob)
        at += len(blob)
    header = json.dumps(dict(sorted(entries.items())), indent=1).encode()
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(blobs))
    stored = open_folder(tmp_path / "model")
    again = write(tmp_path / "again", load(stored), stored)
    assert contents(again) == contents(tmp_path / "model")


def test_trained_weights_keep_names_dtypes_and_files_unless_a_dtype_is_asked_for(tmp_path):
    tensors = random_tensors(lambda name: np.float32 if "norm" in name else ml_dtypes.bfloat16, odd=False)
    folder = save_split(tmp_path / "model", tensors, metadata={"format": "pt"})
    stored = open_folder(folder)
    trained = jax.tree.map(lambda x: x + 1, load(stored, "all"))
    again = write(tmp_path / "again", trained, stored)
    assert (again / INDEX_FILE).read_bytes() == (folder / INDEX_FILE).read_bytes()
    for file in folder.glob("part-*"):
        ours, theirs = safetensors.numpy.load_file(again / file.name), safetensors.numpy.load_file(file)
        assert {name: (x.dtype, x.shape) for name, x in ours.items()} == {
            name: (x.dtype, x.shape) for name, x in theirs.items()
        }
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], (value.astype(np.float32) + 1).astype(value.dtype))
        with safetensors.safe_open(again / file.name, "np") as opened:
            assert opened.metadata() == {"format": "pt"}

    small = write(tmp_path / "small", trained, stored, dtype="float16")
    index = json.loads((small / INDEX_FILE).read_text())
    assert index["weight_map"] == json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    assert index["metadata"] == {"total_size": 2 * sum(x.size for x in tensors.values()), "made_by": "hand"}
    for file in folder.glob("part-*"):
        assert {x.dtype for x in safetensors.numpy.load_file(small / file.name).values()} == {np.dtype(np.float16)}


def test_a_vocabulary_that_has_grown_is_written_with_its_new_size_in_the_same_files(tmp_path):
    tensors = random_tensors()
    folder = save_split(tmp_path / "model", tensors)
    stored = open_folder(folder)
    grown = load(stored, "all", vocab_size=127, stored_vocab_size=VOCAB)
    again = write(tmp_path / "again", grown, stored, vocab_size=127)
    both = [json.loads((each / INDEX_FILE).read_text()) for each in (folder, again)]
    assert both[0]["weight_map"] == both[1]["weight_map"]
    assert both[1]["metadata"]["total_size"] - both[0]["metadata"]["total_size"] == 2 * 6 * SIZES["d"] * 4
    reread = load(open_folder(again), vocab_size=127)
    jax.tree.map(np.testing.assert_array_equal, reread, grown)


def test_a_model_saved_without_its_head_has_no_prefix_in_its_names_and_gets_none(tmp_path):
    tensors = {
        name.removeprefix("model."): value for name, value in random_tensors().items() if name != "lm_head.weight"
    }
    tensors["layers.2.mask"] = np.ones(2, bool)
    folder = save(tmp_path / "model", tensors)
    stored = open_folder(folder)
    tied = load(stored, without=["lm_head.weight"])
    assert contents(write(tmp_path / "again", tied, stored)) == contents(folder)
    with pytest.raises(ConfigError, match="lm_head.weight is missing, expected with shape"):
        load(stored)


# Embedding and output projection.


def test_an_output_projection_stored_beside_tied_embeddings_is_written_again_as_the_embedding_is(tmp_path):
    tensors = random_tensors(odd=False)
    tensors["lm_head.weight"] = tensors["model.embed.weight"]
    folder = save(tmp_path / "model", tensors)
    stored = open_folder(folder)
    tied = load(stored, "all", without=["lm_head.weight"])
    assert contents(write(tmp_path / "again", tied, stored)) == contents(folder)
    trained = write(tmp_path / "trained", jax.tree.map(lambda x: x * 2, tied), stored)
    written = safetensors.numpy.load_file(trained / "model.safetensors")
    np.testing.assert_array_equal(written["lm_head.weight"], 2 * tensors["model.embed.weight"])
    np.testing.assert_array_equal(written["lm_head.weight"], written["model.embed.weight"])


def test_one_that_differs_from_the_embedding_is_refused_and_says_what_to_do(folder):
    with pytest.raises(ConfigError, match="lm_head.weight differs from the embedding.*model.tie_embeddings: false"):
        load(open_folder(folder), without=["lm_head.weight"])
    # Which then trains it.
    loaded = load(open_folder(folder), untied=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(loaded["lm_head"]["weight"][:VOCAB], tensors["lm_head.weight"])


@pytest.mark.parametrize("split", [False, True])
def test_embeddings_that_are_untied_begin_equal_and_are_both_written(split, tmp_path):
    tensors = {name: value for name, value in random_tensors().items() if name != "lm_head.weight"}
    folder = (save_split if split else save)(tmp_path / "model", tensors)
    stored = open_folder(folder)
    with pytest.raises(ConfigError, match="lm_head.weight is missing"):
        load(stored, "all")
    untied = load(stored, "all", untied=True)
    np.testing.assert_array_equal(untied["lm_head"]["weight"][...], untied["embed_tokens"]["weight"][...])
    untied["lm_head"]["weight"].set_value(untied["lm_head"]["weight"].get_value() * 2)
    again = write(tmp_path / "again", untied, stored)
    jax.tree.map(np.testing.assert_array_equal, load(open_folder(again)), untied)


# What is wrong with files.


def problems(folder, without=()):
    with pytest.raises(ConfigError) as error:
        check_weights(open_folder(folder), FAMILY, state_of(without=without), vocab_size=VOCAB)
    return str(error.value)


def test_everything_that_is_wrong_with_tensors_is_said_at_once_with_file_and_name(tmp_path):
    tensors = random_tensors()
    del tensors["model.layers.1.o.weight"]
    tensors["model.layers.0.o.weight"] = np.ones((3, 4), np.float32)
    tensors["model.layers.2.o.weight"] = np.ones((16, 48), np.int8)
    tensors["model.norm.weight"] = np.ones(16, np.float32)
    tensors["model.layers.0.norm.weight"] = np.ones(16, np.float64)
    text = problems(save_split(tmp_path, tensors))
    file = {
        name: tmp_path / place for name, place in json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"].items()
    }
    assert f"{tmp_path}: model.layers.1.o.weight is missing, expected with shape [16, 48]" in text
    name = "model.layers.0.o.weight"
    assert f"{file[name]}: {name} has shape [3, 4], but config.json asks for [16, 48]" in text
    for name, dtype in (("model.layers.2.o.weight", "I8"), ("model.layers.0.norm.weight", "F64")):
        assert f"{file[name]}: {name} has dtype {dtype}; read are F32, BF16, F16" in text
    assert f"{file['model.norm.weight']}: model.norm.weight [16] is extra" in text
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer, not the file"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page, not the file itself"),
        (b"\n  <html>\n</html> and more", "a web page, not the file itself"),
        (b"abc", "truncated, or not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "truncated, or not a safetensors file"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "corrupt header"),
        (struct.pack("<Q", 2) + b"[]", "corrupt header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "corrupt header"),
        (struct.pack("<Q", 2) + b"{}" + b"rest", "4 bytes behind the last tensor"),
        (
            struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}       ' + bytes(4),
            "corrupt",
        ),
        (struct.pack("<Q", 61) + b'{"a":{"dtype":"Q32","shape":[1],"data_offsets":[0,4]}}       ' + bytes(4), "'Q32'"),
        (struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}       ' + bytes(8), "begins"),
        (
            struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}       ' + bytes(4),
            "truncated",
        ),
    ],
)
def test_a_file_that_is_something_else_is_named_beside_all_other_problems(content, problem, tmp_path):
    tensors = random_tensors()
    tensors["model.layers.0.norm.weight"] = np.ones(15, np.float32)
    save_split(tmp_path, tensors)
    places = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    bad = next(place for place in places.values() if place != places["model.layers.0.norm.weight"])
    (tmp_path / bad).write_bytes(content)
    text = problems(tmp_path)
    assert f"{tmp_path / bad}: " in text and problem in text
    assert "model.layers.0.norm.weight has shape [15], but config.json asks for [16]" in text
    assert "missing" not in text


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    file = save(tmp_path, random_tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    text = problems(tmp_path)
    assert f"{file}: truncated" in text and "missing" not in text


def test_an_index_that_leads_astray_is_refused(tmp_path):
    save_split(tmp_path, random_tensors())
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    places = index["weight_map"]
    first, second, third, fourth, fifth = list(places)[:5]
    moved = {first: "../part-0.safetensors", second: "/etc/passwd", third: "lost.safetensors", fourth: ".."}
    moved[fifth] = next(place for place in places.values() if place != places[fifth])
    places |= moved
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    text = problems(tmp_path)
    for name in (first, second, fourth):
        assert f"{tmp_path / INDEX_FILE}: names {places[name]!r}, which is not a file of this folder" in text
    assert f"{tmp_path / 'lost.safetensors'}: no such file" in text
    assert f"lacks {fifth}, which {INDEX_FILE} places there" in text
    (tmp_path / INDEX_FILE).write_text('{"weight_map": [1]}')
    assert "weight_map is not a mapping of tensor names to files" in problems(tmp_path)


def test_links_are_followed_as_the_hub_s_cache_has_them(folder, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    check_weights(open_folder(tmp_path), FAMILY, state_of(), vocab_size=VOCAB)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / 'gone' / 'model.safetensors'}: no such file" in problems(tmp_path / "gone")


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    text = problems(tmp_path)
    assert "neither model.safetensors nor" in text and "pytorch_model.bin: pickled weights are not read" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mesh", ["one", "all"])
def test_every_tensor_that_holds_what_is_no_number_is_named_with_where(dtype, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 200)
    tensors = random_tensors(lambda name: dtype)
    bad = {
        "model.embed.weight": ((120, 15), np.nan),
        "model.layers.1.norm.weight": ((3,), -np.inf),
        "model.layers.2.qkv.bias": ((95,), np.inf),
        "model.layers.0.experts.gate_up": ((2, 5, 47), np.inf),
        "model.layers.0.experts.3.down.weight": ((15, 23), np.nan),
    }
    for name, (at, value) in bad.items():
        tensors[name][at] = value
    with pytest.raises(ConfigError, match="hold numbers that are not finite") as error:
        load(open_folder(save(tmp_path / "model", tensors)), mesh)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(bad)
    for name, (at, value) in bad.items():
        (line,) = [line for line in lines if f" {name} " in line]
        assert line.endswith(f"{name} {list(tensors[name].shape)} holds {value} at {list(at)}")
        assert "model.safetensors: " in line
    # The largest numbers that there are, are numbers.
    for name, (at, _) in bad.items():
        tensors[name][at] = ml_dtypes.finfo(dtype).max
    load(open_folder(save(tmp_path / "model", tensors)), mesh)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_is_what_numpy_calls_so(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == np.float32 else bits.view(dtype)
    for value in (values[:: 7 * 11], values[0x7C00:0x7C02], values[0x7F80:], values[:0x7C00], values[0xFF80:]):
        each = [copying.is_finite(value[at : at + 1]) for at in range(len(value))]
        np.testing.assert_array_equal(each, np.isfinite(value.astype(np.float32)))
        assert copying.is_finite(value) == all(each)
    assert copying.is_finite(values[:0])


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    stored = open_folder(save(tmp_path, random_tensors()))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConfigError, match=f"{file}: became shorter"):
        load(stored)


# Memory and processes.

CHILD = """
    import json, os, pathlib, sys
    import jax
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    from jaxsft.hosts.start import start_processes
    from jaxsft.mesh import make_mesh, shardings
    if "JAX_PROCESS_ID" in os.environ:
        start_processes()
    import numpy as np
    from flax import nnx
    from jaxsft.folders.weights import load as weights
    from jaxsft.folders.weights.save import write_weights
    from jaxsft.config import MeshConfig
    from jaxsft.model.decoder import Decoder
    from jaxsft.model.families.known import decoder_config, family
    from jaxsft.model.abstract import abstract_model
    from jaxsft.folders.weights.stored import open_folder

    folder, out = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])
    mesh = make_mesh(MeshConfig(**json.loads(sys.argv[3])))
    hf_config = json.loads((folder / "config.json").read_text())
    config, module = decoder_config(hf_config), family(hf_config)
    make = lambda rngs: Decoder(config, compute_dtype="float32", param_dtype="float32", remat="none", rngs=rngs)
    abstract = abstract_model(make).params
    counts = []

    class Counted:
        def __init__(self, tensor):
            self.tensor, self.file, self.dtype, self.shape = tensor, tensor.file, tensor.dtype, tensor.shape
        def read(self, rows, columns):
            part = self.tensor.read(rows, columns)
            counts.append(part.nbytes)
            return part

    def peak():
        # getrusage would begin with the memory of the process that started this one.
        return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    jax.block_until_ready(jax.device_put(np.zeros(8), jax.local_devices()[0]))
    stored = open_folder(folder)
    counted = stored._replace(tensors={name: Counted(tensor) for name, tensor in stored.tensors.items()})
    before = peak()
    params = weights.load_params(
        counted, module, abstract=abstract, shardings=shardings(mesh, abstract), vocab_size=config.vocab_size
    )
    loaded = peak()
    held = sum(
        sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
        for leaf in jax.tree.leaves(params)
    )
    out.mkdir(exist_ok=True)
    write_weights(
        out, params, module, vocab_size=config.vocab_size, dtype=None, stored=stored, max_shard_bytes=10**9,
    )
    print("RESULT", json.dumps(
        {"held": held, "read": sum(counts), "load": loaded - before, "export": peak() - loaded}
    ))
"""


def run_child(folder, mesh, out, *, devices, **environment):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    arguments = [str(devices), str(folder), json.dumps(mesh), str(out)]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=pathlib.Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result_of(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return json.loads(output.split("RESULT ")[1])


def write_llama(folder, *, hidden_size, num_layers, num_files=2):
    """Random weights of a llama; the embedding is its largest tensor."""
    config = dict(
        model_type="llama",
        vocab_size=8 * hidden_size - 3,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden_size // 2
    tensors = {
        name: (config["vocab_size"], hidden_size) for name in ("model.embed_tokens.weight", "lm_head.weight")
    } | {"model.norm.weight": (hidden_size,)}
    for layer in range(num_layers):
        shapes = {
            "input_layernorm": (hidden_size,),
            "post_attention_layernorm": (hidden_size,),
            "self_attn.q_proj": (hidden_size, hidden_size),
            "self_attn.k_proj": (kv, hidden_size),
            "self_attn.v_proj": (kv, hidden_size),
            "self_attn.o_proj": (hidden_size, hidden_size),
            "mlp.gate_proj": (4 * hidden_size, hidden_size),
            "mlp.up_proj": (4 * hidden_size, hidden_size),
            "mlp.down_proj": (hidden_size, 4 * hidden_size),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    return save_split(
        folder, {name: rng.random(shape, np.float32) for name, shape in tensors.items()}, num_files=num_files
    )


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda mesh: " ".join(f"{k}={v}" for k, v in mesh.items()),
)
def test_a_process_needs_little_more_memory_than_its_arrays_to_load_them_and_than_a_tensor_to_write_them(
    mesh, tmp_path
):
    folder = write_llama(tmp_path, hidden_size=768, num_layers=4)
    files = contents(folder)
    # What is freed goes back at once: what malloc keeps for itself is not what is measured.
    result = result_of(run_child(folder, mesh, tmp_path / "out", devices=8, MALLOC_MMAP_THRESHOLD_="100000"))
    stored = open_folder(folder)
    sizes = [tensor.num_bytes for tensor in stored.tensors.values()]
    assert sum(sizes) > 170 * 10**6 and result["read"] == sum(sizes)
    assert result["load"] < 1.3 * result["held"] + 30 * 10**6
    # A tensor gathered, once for each copy, and as it is written; and what compiling the gathering takes.
    assert result["export"] < 3 * max(sizes) + 80 * 10**6 < sum(sizes)
    assert contents(tmp_path / "out") == files


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda mesh: " ".join(f"{k}={v}" for k, v in mesh.items()),
)
def test_each_of_two_processes_reads_what_its_devices_hold_and_together_they_write_every_byte(mesh, tmp_path):
    folder = write_llama(tmp_path, hidden_size=256, num_layers=2)
    files = contents(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    processes = [
        run_child(folder, mesh, tmp_path / "out", devices=4, JAX_PROCESS_ID=str(number), **cluster) for number in (0, 1)
    ]
    for result in map(result_of, processes):
        # Rows of the vocabulary that only fill it up are held, but nowhere stored.
        assert 0.98 * result["held"] <= result["read"] <= result["held"]
        if "data" not in mesh:
            whole = sum(tensor.num_bytes for tensor in open_folder(folder).tensors.values())
            assert result["read"] < 0.51 * whole
    assert contents(tmp_path / "out") == files


def test_an_export_that_the_disk_does_not_hold_says_so(folder, tmp_path):
    stored = open_folder(folder)
    params = load(stored)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "out", params, stored)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_files_to_follow_an_export_is_laid_out_as_transformers_does_it(folder, tmp_path):
    params = load(open_folder(folder), "all")
    out = write(tmp_path / "out", params, Stored(folder, {}), dtype="float32", max_shard_bytes=20_000)
    index = json.loads((out / INDEX_FILE).read_text())
    assert sorted(index["weight_map"]) == list(index["weight_map"])
    sizes = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert len(sizes) > 3 and sorted(sizes) == sorted(set(index["weight_map"].values()))
    jax.tree.map(np.testing.assert_array_equal, load(open_folder(out)), params)


def test_devices_round_as_the_host_does():
    chance = np.random.default_rng(0)
    edges = np.array(
        [0, 1, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x3F808000], np.uint32
    )
    bits = np.concatenate([chance.integers(0, 2**32, 200_000, np.uint32), edges, edges | np.uint32(0x80000000)])
    single, brain = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        expected = bits.view(single).astype(brain)
    ours = np.asarray(jax.jit(lambda x: cast_bits(x, single, brain))(bits)).view(brain)
    np.testing.assert_array_equal(ours.view(np.uint16), expected.view(np.uint16))
    back = np.asarray(jax.jit(lambda x: cast_bits(x, brain, single))(expected.view(np.uint16)))
    np.testing.assert_array_equal(back, expected.astype(single).view(np.uint32))
