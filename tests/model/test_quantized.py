"""Decoders with quantised weights: loaded on any mesh, they compute what the numbers in their codes stand for."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compilation import TO_READ
from flax import nnx
from safetensors.numpy import save_file

from jaxsft.config import ConfigError, LoraConfig, MeshConfig, ModelConfig
from jaxsft.folders.pretrained import decoder_maker
from jaxsft.folders.weights.layout import join, path_text, variables_of
from jaxsft.folders.weights.load import load_params
from jaxsft.folders.weights.save import write_weights
from jaxsft.folders.weights.stored import open_folder
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.abstract import abstract_model
from jaxsft.model.adapter import Frozen
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.model.lora import add_adapters, maps_of, not_of_files, of_files, with_magnitudes
from jaxsft.model.quantize import RECORDS, dequantize, quantize
from jaxsft.model.quantized_maps import describe_quantized, quantize_maps

LLAMA = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
}
"""A fused projection, in which the heads of queries, keys and values take turns."""

quantized = jax.jit(quantize, static_argnums=1)
dequantized = jax.jit(dequantize, static_argnums=1)

MIXTRAL = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
CONFIGS = {"llama": LLAMA, "gpt_neox": NEOX, "mixtral": MIXTRAL}

MESHES = [{"fsdp": 1}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}]


def mesh_of(sizes):
    config = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])


def abstract(hf_config, kind, *, dtype="float32", remat="full", unroll=False, lora=None):
    """Graphdef and whole state of a decoder; with adapters all else is frozen, without them only the layers' maps."""

    def make(rngs):
        decoder = Decoder(
            decoder_config(hf_config),
            compute_dtype=dtype,
            param_dtype="float32",
            remat=remat,
            unroll=unroll,
            rngs=rngs,
        )
        if lora is not None:
            add_adapters(decoder, lora, family(hf_config), key=rngs.params())
        for place in maps_of(decoder):
            weight = place.module.weight
            if place.kind in ("attention", "mlp") and lora is None:
                place.module.weight = Frozen(weight[...], axes=weight.get_metadata("axes"))
        if kind is not None:
            quantize_maps(decoder, kind)
        return decoder

    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), ...)


@functools.cache
def write_folder(folder, model_type):
    """Random weights of a model; its config.json."""
    hf_config = CONFIGS[model_type]
    rng = np.random.default_rng(0)
    tensors = {}
    _, state = abstract(hf_config, None)
    for weight, _ in join(state, family(hf_config), vocab_size=hf_config["vocab_size"]).values():
        for index in weight.indices():
            values = rng.normal(0, 0.1, weight.file_shape) + (1 if "norm" in weight.path else 0)
            tensors[weight.name(index)] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return hf_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """model_type -> (folder, config.json)."""
    made = {}
    for model_type in CONFIGS:
        folder = tmp_path_factory.mktemp(model_type)
        made[model_type] = folder, write_folder(folder, model_type)
    return made


def load(folder, hf_config, state, mesh):
    return load_params(
        open_folder(folder),
        family(hf_config),
        abstract=state,
        shardings=shardings(mesh, state),
        vocab_size=hf_config["vocab_size"],
    )


def tensor(folder, name):
    read = open_folder(folder).tensors[name]
    return read.read(slice(0, read.shape[0]), slice(0, read.shape[1]))


@pytest.mark.parametrize(("kind", "sizes"), [*(("nf4", sizes) for sizes in MESHES), ("int8", MESHES[2])], ids=str)
def test_the_codes_of_each_layer_are_those_of_its_tensor_on_every_mesh(folders, kind, sizes):
    folder, hf_config = folders["llama"]
    mesh = mesh_of(sizes)
    _, state = abstract(hf_config, kind)
    loaded = load(folder, hf_config, state, mesh)
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        for layer in range(2):
            alone = quantized(tensor(folder, f"model.layers.{layer}.{name}.weight"), kind)
            for part, array in alone._asdict().items():
                found = variables_of(loaded)[f"layers.{name}.weight.{part}"].get_value()[layer]
                np.testing.assert_array_equal(found, array, err_msg=f"{name} {part}")
    # No device holds a row that another one of its copies could hold.
    codes = loaded["layers"]["mlp"]["up_proj"]["weight"]["codes"].get_value()
    ways = int(np.prod([size for axis, size in sizes.items() if axis != "data"]))
    assert codes.addressable_shards[0].data.size * ways == codes.size


def plain(loaded, like):
    """The values of a quantised state in one of plain weights."""
    parts, whole = variables_of(loaded), variables_of(like)

    def value(path):
        if path in parts:
            return parts[path].get_value()
        layout = parts[f"{path}.codes"].get_metadata("layout")
        record = RECORDS[layout.kind](*(parts[f"{path}.{name}"].get_value() for name in RECORDS[layout.kind]._fields))
        stack, count = len(layout.leading.split()), len(layout.outputs.split())
        numbers = dequantized(jax.device_get(record), jnp.float32)
        numbers = numbers.reshape(*numbers.shape[:stack], *layout.sizes)
        dims = range(numbers.ndim)
        return numbers.transpose(*dims[:stack], *dims[stack + count :], *dims[stack : stack + count])

    values = {path: jax.device_get(value(path)) for path in whole}
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(values[path_text(path)]),
        like,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def run(graphdef, weights, mesh=None):
    """A number that depends on all hidden states, and its gradients by what is trained."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 96, (8, 16), np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    mix = rng.normal(size=(8, 16, 128)).astype(np.float32)
    params, frozen = nnx.split_state(weights, nnx.Param, ...)

    def total(params, frozen):
        hidden = nnx.merge(graphdef, params, frozen)(tokens, np.ones_like(tokens), positions).hidden
        return (hidden.astype(jnp.float32) * mix).sum(), hidden

    with jax.set_mesh(mesh or mesh_of({"fsdp": 1})):
        (_, hidden), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params, frozen)
    return np.asarray(hidden, np.float32), {
        path: np.asarray(each.get_value(), np.float32) for path, each in variables_of(gradients).items()
    }


@pytest.mark.parametrize(("model_type", "kind"), [*((name, "nf4") for name in CONFIGS), ("llama", "int8")])
def test_a_decoder_computes_with_the_numbers_of_its_codes(folders, model_type, kind):
    folder, hf_config = folders[model_type]
    graphdef, state = abstract(hf_config, kind)
    loaded = load(folder, hf_config, state, mesh_of({"fsdp": 1}))
    plain_graphdef, plain_state = abstract(hf_config, None)
    hidden, gradients = run(graphdef, loaded)
    expected, plain_gradients = run(plain_graphdef, plain(loaded, plain_state))
    np.testing.assert_allclose(hidden, expected, atol=3e-5 * np.abs(expected).max())
    for path, gradient in gradients.items():
        atol = 3e-5 * np.abs(plain_gradients[path]).max()
        np.testing.assert_allclose(gradient, plain_gradients[path], atol=atol, err_msg=path)
    if kind == "int8":
        unrolled, _ = abstract(hf_config, kind, unroll=True, remat="none")
        np.testing.assert_allclose(run(unrolled, loaded)[0], hidden, atol=3e-5 * np.abs(expected).max())


@functools.cache
def run_alone(folder, model_type, dtype):
    graphdef, state = abstract(CONFIGS[model_type], "nf4", dtype=dtype)
    return run(graphdef, load(folder, CONFIGS[model_type], state, mesh_of({"fsdp": 1})))


@pytest.mark.parametrize(
    ("model_type", "sizes", "dtype"),
    [
        ("llama", MESHES[2], "float32"),
        ("llama", MESHES[3], "float32"),
        ("llama", MESHES[2], "bfloat16"),
        ("mixtral", {"expert": 2, "fsdp": 2, "tensor": 2}, "float32"),
    ],
    ids=str,
)
def test_a_decoder_computes_the_same_on_every_mesh(folders, model_type, sizes, dtype):
    folder, hf_config = folders[model_type]
    graphdef, state = abstract(hf_config, "nf4", dtype=dtype)
    alone, mesh = run_alone(folder, model_type, dtype), mesh_of(sizes)
    together = run(graphdef, load(folder, hf_config, state, mesh), mesh)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(together[0], alone[0], atol=tolerance * np.abs(alone[0]).max())
    for path, gradient in together[1].items():
        expected = alone[1][path]
        np.testing.assert_allclose(gradient, expected, atol=2 * tolerance * np.abs(expected).max(), err_msg=path)


def test_adapters_stand_beside_quantised_weights(folders):
    """With DoRA, whose norms are those of the numbers of the codes."""
    folder, hf_config = folders["llama"]
    mesh, lora = mesh_of({"fsdp": 1}), LoraConfig(rank=4, dora=True)
    rng = np.random.default_rng(2)

    def with_adapters(state, weights):
        drawn = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), not_of_files(state))
        return nnx.merge_state(weights, drawn)

    graphdef, state = abstract(hf_config, "nf4", lora=lora)
    loaded = with_adapters(state, load(folder, hf_config, of_files(state), mesh))
    loaded = jax.jit(with_magnitudes)(loaded)
    plain_graphdef, plain_state = abstract(hf_config, None, lora=lora)
    weights = plain(of_files(loaded), of_files(plain_state))
    weights = nnx.merge_state(weights, not_of_files(loaded))
    for path, magnitude in variables_of(jax.jit(with_magnitudes)(weights)).items():
        if path.endswith("magnitude"):
            found = variables_of(loaded)[path].get_value()
            np.testing.assert_allclose(found, magnitude.get_value(), rtol=1e-5, err_msg=path)
    hidden, gradients = run(graphdef, loaded)
    expected, plain_gradients = run(plain_graphdef, weights)
    np.testing.assert_allclose(hidden, expected, atol=3e-5 * np.abs(expected).max())
    assert gradients.keys() == plain_gradients.keys() == variables_of(nnx.split_state(state, nnx.Param, ...)[0]).keys()
    for path, gradient in gradients.items():
        atol = 3e-5 * np.abs(plain_gradients[path]).max()
        np.testing.assert_allclose(gradient, plain_gradients[path], atol=atol, err_msg=path)


def compiled(hf_config, kind, sizes, **model):
    """A forward and backward pass, not run."""
    graphdef, state = abstract(hf_config, kind, **model)
    mesh, (params, frozen) = mesh_of(sizes), nnx.split_state(state, nnx.Param, ...)

    def total(params, frozen, tokens, segment_ids, positions):
        hidden = nnx.merge(graphdef, params, frozen)(tokens, segment_ids, positions).hidden
        return jnp.square(hidden.astype(jnp.float32)).sum()

    rows = [jax.ShapeDtypeStruct((8, 16), jnp.int32)] * 3
    places = (shardings(mesh, params), shardings(mesh, frozen), *[None] * 3)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(total), in_shardings=places)
        return step.lower(params, frozen, *rows).compile(TO_READ)


WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "tie_word_embeddings": True}


@pytest.mark.parametrize("unroll", [False, True])
def test_no_more_than_a_layer_is_unpacked(unroll):
    numbers = 256 * (8 * 32 * 2 + 4 * 32 * 2 + 3 * 1024)
    temp = []
    for num_layers in (2, 4):
        step = compiled({**WIDE, "num_hidden_layers": num_layers}, "nf4", {"fsdp": 1}, unroll=unroll)
        temp.append(step.memory_analysis().temp_size_in_bytes)
    # Of two layers more, unrolled, there are copies of the codes, and activations; but not their float32 numbers.
    assert temp[1] - temp[0] < (0.8 if unroll else 0.2) * 2 * 4 * numbers, temp


def test_what_is_gathered_over_a_mesh_are_bytes():
    text = compiled(WIDE, "nf4", {"fsdp": 2, "tensor": 2}).as_text()
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", text)
    large = [(dtype, shape) for dtype, shape in found if np.prod([int(size) for size in shape.split(",")]) > 2**12]
    # Forward, and in the backward pass q, k, v, o, gate and up again, and all for the gradients.
    assert len(large) >= 13 and {dtype for dtype, _ in large} == {"u8"}


def test_a_trained_weight_is_not_quantised():
    config = ModelConfig(path="unused", quantize="nf4")
    with pytest.raises(ConfigError, match="a trained weight cannot be quantised"):
        abstract_model(decoder_maker(config, decoder_config(LLAMA), family(LLAMA)))


def test_weights_that_are_trained_beside_frozen_ones_stay_as_they_are():
    config = ModelConfig(path="unused", quantize="nf4", compute_dtype="float32")
    only = ["norms", r"layers\.\d+\.mlp\.up_proj"]
    model = abstract_model(decoder_maker(config, decoder_config(LLAMA), family(LLAMA), only=only))
    assert variables_of(model.params)["layers.mlp.up_proj.weight"].dtype == jnp.float32
    assert "layers.mlp.gate_proj.weight.codes" in variables_of(model.frozen)


def test_maps_that_are_not_of_whole_blocks_stay_in_bfloat16_and_are_listed():
    hf_config = {**LLAMA, "intermediate_size": 200}
    config = ModelConfig(path="unused", quantize="nf4", compute_dtype="float32")
    model = abstract_model(decoder_maker(config, decoder_config(hf_config), family(hf_config), LoraConfig(rank=2)))
    variables = variables_of(model.frozen)
    assert variables["layers.mlp.down_proj.weight"].dtype == jnp.bfloat16
    assert variables["layers.mlp.up_proj.weight.codes"].shape == (2, 200, 64)
    (note,) = describe_quantized(nnx.merge(*model), "nf4")
    assert note.endswith("no multiple of it: layers.mlp.down_proj (200)")


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_what_is_exported_are_the_weights_of_the_files(folders, model_type, tmp_path):
    folder, hf_config = folders[model_type]
    mesh, stored = mesh_of({"fsdp": 2, "tensor": 2}), open_folder(folder)
    _, state = abstract(hf_config, "nf4")
    write_weights(
        tmp_path,
        load(folder, hf_config, state, mesh),
        family(hf_config),
        vocab_size=hf_config["vocab_size"],
        dtype=None,
        stored=stored,
        max_shard_bytes=10**9,
    )
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
