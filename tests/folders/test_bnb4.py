"""Folders of bitsandbytes' four bits: one that transformers writes, where both are installed, and one by hand."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsft.config import MeshConfig
from jaxsft.folders import hf
from jaxsft.folders.weights.layout import join, variables_of
from jaxsft.folders.weights.load import load_params
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.model.freezing import freeze
from jaxsft.model.quantize import DYNAMIC_VALUES, NF4_VALUES, quantize
from jaxsft.model.quantized_maps import quantize_maps

CONFIG = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def abstract(kind):
    def make():
        config = decoder_config(CONFIG)
        decoder = Decoder(config, compute_dtype="float32", param_dtype="float32", remat="full", rngs=nnx.Rngs(0))
        freeze(decoder, lambda path: True)
        if kind is not None:
            quantize_maps(decoder, kind)
        return decoder

    return nnx.split(nnx.eval_shape(make), ...)[1]


def load(folder, kind, **mesh):
    stored, hf_config = hf.open_source(folder)
    state, mesh = abstract(kind), make_mesh(MeshConfig(**mesh), jax.devices()[: max([1, *mesh.values()])])
    loaded = load_params(
        stored, family(hf_config), abstract=state, shardings=shardings(mesh, state), vocab_size=CONFIG["vocab_size"]
    )
    return {path: variable.get_value() for path, variable in variables_of(loaded).items()}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A folder as documented: the layers' matrices in four bits, all else in bfloat16."""
    folder = tmp_path_factory.mktemp("by_hand")
    rng = np.random.default_rng(0)
    tensors = {}
    for weight, _ in join(abstract(None), family(CONFIG), vocab_size=96).values():
        for name in map(weight.name, weight.indices()):
            numbers = rng.normal(0, 0.1, weight.file_shape).astype(ml_dtypes.bfloat16)
            if "_proj" not in name:
                tensors[name] = numbers
                continue
            codes, absmax, scales, offset = map(np.asarray, jax.jit(quantize, static_argnums=1)(numbers, "nf4"))
            state = {
                "quant_type": "nf4",
                "blocksize": 64,
                "dtype": "bfloat16",
                "shape": list(numbers.shape),
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": float(offset),
            }
            tensors |= {
                name: codes.reshape(-1, 1),
                f"{name}.absmax": absmax.reshape(-1),
                f"{name}.nested_absmax": scales,
                f"{name}.nested_quant_map": DYNAMIC_VALUES,
                f"{name}.quant_map": NF4_VALUES,
                f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
            }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": BITSANDBYTES}))
    return folder


def formula(tensors, name):
    """The numbers [outputs, inputs] of a tensor by name, from all its parts."""
    state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    scales = np.repeat(tensors[f"{name}.nested_absmax"], 256)[: tensors[f"{name}.absmax"].size]
    absmax = tensors[f"{name}.nested_quant_map"][tensors[f"{name}.absmax"]] * scales
    absmax += np.float32(state["nested_offset"])
    codes = np.stack([tensors[name] >> 4, tensors[name] & 15], axis=-1).reshape(-1, 64)
    return (tensors[f"{name}.quant_map"][codes] * absmax[:, None]).reshape(state["shape"])


def test_a_tensor_is_read_as_the_numbers_of_its_codes(by_hand):
    stored, hf_config = hf.open_source(by_hand)
    assert "quantization_config" not in hf_config and not stored.problems
    tensors = load_file(by_hand / "model.safetensors")
    for name in (Q_PROJ, "model.layers.0.mlp.down_proj.weight"):
        expected = formula(tensors, name)
        tensor = stored.tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, ml_dtypes.bfloat16)
        for rows, columns in [
            (slice(0, 128), slice(0, 64)),
            (slice(3, 90), slice(17, 101)),
            (slice(5, 6), slice(1, 2)),
        ]:
            read = tensor.read(rows, columns)
            np.testing.assert_array_equal(
                read.view(np.uint16), expected[rows, columns].astype(read.dtype).view(np.uint16)
            )


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4}, {"tensor": 2}], ids=str)
def test_codes_that_are_ours_are_taken_as_they_are(by_hand, mesh):
    weights, tensors = load(by_hand, "nf4", **mesh), load_file(by_hand / "model.safetensors")
    for path, name in [
        ("layers.self_attn.q_proj.weight", Q_PROJ),
        ("layers.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    ]:
        state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
        np.testing.assert_array_equal(np.ravel(weights[f"{path}.codes"][1]), tensors[name].reshape(-1))
        np.testing.assert_array_equal(np.ravel(weights[f"{path}.absmax"][1]), tensors[f"{name}.absmax"])
        np.testing.assert_array_equal(weights[f"{path}.scales"][1], tensors[f"{name}.nested_absmax"])
        assert float(weights[f"{path}.offset"][1]) == np.float32(state["nested_offset"])


def test_such_a_folder_is_a_model_of_plain_weights_too(by_hand):
    weights, tensors = load(by_hand, None), load_file(by_hand / "model.safetensors")
    expected = formula(tensors, Q_PROJ).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.reshape(weights["layers.self_attn.q_proj.weight"][1], (128, 128)).T, expected)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("absmax", None, "absmax is missing"),
        ("quant_map", np.zeros(15, np.float32), r"quant_map is F32 \[15\], expected F32 of 16 numbers"),
        ("quant_state.bitsandbytes__nf4", np.frombuffer(b"{", np.uint8), "no tensor of bitsandbytes' four bits"),
    ],
)
def test_a_part_that_is_missing_or_wrong_is_named(by_hand, tmp_path, part, value, says):
    tensors = load_file(by_hand / "model.safetensors")
    del tensors[f"{Q_PROJ}.{part}"]
    save_file(tensors | ({} if value is None else {f"{Q_PROJ}.{part}": value}), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((by_hand / "config.json").read_text())
    with pytest.raises(ValueError, match=says):
        load(tmp_path, "nf4")


def test_a_folder_that_transformers_wrote_is_read_to_the_bit(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install bitsandbytes)")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG))
    model.bfloat16().save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, device_map="cpu", dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "four")
    stored, _ = hf.open_source(tmp_path / "four")
    assert not stored.problems
    weights = load(tmp_path / "four", "nf4", fsdp=2)
    module = theirs.model.layers[1].self_attn.q_proj
    numbers = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    read = stored.tensors[Q_PROJ].read(slice(0, 128), slice(0, 128))
    np.testing.assert_array_equal(read.view(np.uint16), numbers.view(torch.uint16).numpy())
    codes = np.ravel(weights["layers.self_attn.q_proj.weight.codes"][1])
    np.testing.assert_array_equal(codes, module.weight.data.numpy().reshape(-1))
