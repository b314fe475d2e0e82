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

from jaxsft.config import MeshConfig
from jaxsft.folders.weights.layout import join, variables_of
from jaxsft.folders.weights.load import load_params
from jaxsft.folders.weights.stored import open_folder
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.abstract import abstract_model
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.model.quantize import dequantize, quantize
from jaxsft.model.quantized import Frozen, QuantizedWeight
from jaxsft.model.quantized_maps import quantize_maps

LLAMA = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
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

MESHES = [{"fsdp": 1}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}, {"tensor": 4}]


def mesh_of(sizes):
    config = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])


def abstract(hf_config, kind, *, dtype="float32", remat="full", unroll=False):
    """A decoder whose layers are frozen."""

    def make(rngs):
        decoder = Decoder(
            decoder_config(hf_config),
            compute_dtype=dtype,
            param_dtype="float32",
            remat=remat,
            unroll=unroll,
            rngs=rngs,
        )
        freeze_layers(decoder)
        if kind is not None:
            quantize_maps(decoder, kind)
        return decoder

    return abstract_model_of(make)


def freeze_layers(decoder):
    for _, module in list(nnx.iter_modules(decoder.layers)):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nnx.Param) and hasattr(module, "einsum"):
            module.weight = Frozen(weight[...], axes=weight.get_metadata("axes"))


def abstract_model_of(make):
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), ...)


@functools.cache
def write_folder(folder, model_type):
    """Random weights of a model; its config.json."""
    hf_config = {"llama": LLAMA, "gpt_neox": NEOX}[model_type]
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
    for model_type in ("llama", "gpt_neox"):
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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_codes_of_each_layer_are_those_of_its_tensor_on_every_mesh(folders, kind, sizes):
    folder, hf_config = folders["llama"]
    mesh = mesh_of(sizes)
    _, state = abstract(hf_config, kind)
    loaded = load(folder, hf_config, state, mesh)
    names = {"self_attn.k_proj": "self_attn.k_proj", "self_attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"}
    for ours, theirs in names.items():
        weight = functools.reduce(lambda at, key: at[key], f"layers.{ours}.weight".split("."), loaded)
        for layer in range(3):
            alone = jax.jit(quantize, static_argnums=1)(tensor(folder, f"model.layers.{layer}.{theirs}.weight"), kind)
            for name, array in alone._asdict().items():
                np.testing.assert_array_equal(weight[name].get_value()[layer], array, err_msg=f"{ours} {name}")
    # No device holds a row that another one of its copies could hold.
    codes = loaded["layers"]["mlp"]["up_proj"]["weight"]["codes"].get_value()
    ways = int(np.prod([size for axis, size in sizes.items() if axis != "data"]))
    assert codes.addressable_shards[0].data.size * ways == codes.size
