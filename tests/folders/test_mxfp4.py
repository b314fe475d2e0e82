"""Weights of four bits against transformers' own unpacking: a tensor, parts of it, and a model that is stored so."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxsft.folders.weights import mxfp4
from jaxsft.folders.weights.stored import open_folder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

EXPERTS, OUTPUTS, GROUPS = 3, 10, 2


def theirs(blocks, scales):
    """bfloat16 [E, inputs, outputs]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))


def random_packed(seed, shape):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(100, 140, shape, np.uint8)


@pytest.fixture
def packed(tmp_path):
    """A folder with one packed tensor, and what transformers makes of it, as bits."""
    from safetensors.numpy import save_file

    blocks, scales = random_packed(0, (EXPERTS, OUTPUTS, GROUPS))
    blocks.reshape(-1)[:256] = np.arange(256)  # every pair
    save_file({"x.up_blocks": blocks, "x.up_scales": scales, "x.y": np.zeros(3, np.float32)}, tmp_path / FILE)
    return tmp_path, theirs(blocks, scales).view(torch.uint16).numpy()


FILE = "model.safetensors"
CONFIG = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


def bits(array):
    assert array.dtype == ml_dtypes.bfloat16
    return array.view(np.uint16)


def test_a_packed_tensor_is_the_bfloat16_that_transformers_makes_of_it(packed):
    folder, expected = packed
    stored, hf_config = mxfp4.unpacked(open_folder(folder), CONFIG)
    assert stored.tensors.keys() == {"x.up", "x.y"} and not stored.problems
    tensor = stored.tensors["x.up"]
    assert tensor.shape == expected.shape == (EXPERTS, GROUPS * 32, OUTPUTS)
    whole = tensor.read(slice(0, EXPERTS * GROUPS * 32), slice(0, OUTPUTS))
    np.testing.assert_array_equal(bits(whole), expected.reshape(-1, OUTPUTS))
    assert hf_config == {"model_type": "gpt_oss", "dtype": "bfloat16"}


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 18])
def test_any_part_of_it_can_be_read(packed, chunk_bytes, monkeypatch):
    folder, expected = packed
    monkeypatch.setattr(mxfp4, "CHUNK_BYTES", chunk_bytes)
    tensor = mxfp4.unpacked(open_folder(folder), CONFIG)[0].tensors["x.up"]
    expected = expected.reshape(-1, OUTPUTS)
    rng = np.random.default_rng(1)
    for _ in range(50):
        (a, b), (c, d) = (sorted(rng.choice(size + 1, 2, replace=False)) for size in expected.shape)
        np.testing.assert_array_equal(bits(tensor.read(slice(a, b), slice(c, d))), expected[a:b, c:d])


def test_packed_tensors_that_do_not_fit_each_other_are_reported_together(tmp_path):
    from safetensors.numpy import save_file

    blocks, scales = random_packed(0, (EXPERTS, OUTPUTS, GROUPS))
    tensors = {"a_blocks": blocks, "a_scales": scales[:, :-1], "b_blocks": blocks[..., :8], "b_scales": scales}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors | {"c_blocks": blocks}, tmp_path / FILE)
    stored, _ = mxfp4.unpacked(open_folder(tmp_path), CONFIG)
    first, second = stored.problems
    assert "a_scales is U8 [3, 9, 2], expected U8 [3, 10, 2], as of a_blocks" in first
    assert "b_blocks is U8 [3, 10, 2, 8], expected U8 [E, outputs, groups, 16]" in second
    assert stored.tensors.keys() == {"c_blocks"}


@pytest.mark.parametrize(
    "hf_config, expected",
    [
        (CONFIG, True),
        ({"model_type": "gpt_oss"}, False),
        ({"quantization_config": {"quant_method": "gptq"}}, False),
        ({"quantization_config": None}, False),
    ],
)
def test_a_config_says_whether_its_model_is_packed(hf_config, expected):
    assert mxfp4.is_mxfp4(hf_config) is expected


SIZES = dict(
    model_type="gpt_oss",
    architectures=["GptOssForCausalLM"],
    vocab_size=67,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    sliding_window=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.2,
)


def test_a_model_stored_in_four_bits_comes_in_with_the_logits_of_transformers(tmp_path):
    import jax
    import transformers
    from flax import nnx
    from safetensors.torch import load_file, save_file

    from jaxsft.config import MeshConfig
    from jaxsft.folders.weights import load as weights
    from jaxsft.mesh import make_mesh, shardings
    from jaxsft.model.decoder import Decoder
    from jaxsft.model.families.known import decoder_config, family

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SIZES))
    for parameter in model.parameters():
        if parameter.std() == 0 or not parameter.isfinite().all():
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.bfloat16().save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / FILE)
    packed = dict(tensors)
    for seed, name in enumerate(name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))):
        experts, inputs, outputs = packed.pop(name).shape
        blocks, scales = random_packed(seed, (experts, outputs, inputs // 32))
        scales = (scales % 3 + 123).astype(np.uint8)  # numbers of up to 0.4 to 1.5
        packed |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        tensors[name] = theirs(blocks, scales)
    (tmp_path / "packed").mkdir()
    for folder, held in (("plain", tensors), ("packed", packed)):
        save_file(held, tmp_path / folder / FILE, metadata={"format": "pt"})
    (tmp_path / "packed" / "config.json").write_text(json.dumps(SIZES | CONFIG))

    tokens = np.random.default_rng(0).integers(0, 67, (1, 24)).astype(np.int32)
    load = transformers.AutoModelForCausalLM.from_pretrained
    their_model = load(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = their_model(torch.from_numpy(tokens).long()).logits.numpy()

    stored, hf_config = mxfp4.unpacked(open_folder(tmp_path / "packed"), SIZES | CONFIG)
    config = decoder_config(hf_config)

    def make():
        return Decoder(config, compute_dtype="float32", param_dtype="float32", remat="none", rngs=nnx.Rngs(0))

    graphdef, abstract = nnx.split(jax.eval_shape(make))
    params = weights.load_params(
        stored,
        family(hf_config),
        abstract=abstract,
        shardings=shardings(make_mesh(MeshConfig(), jax.devices()[:1]), abstract),
        vocab_size=config.vocab_size,
    )
    ours = nnx.merge(graphdef, params)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    given = np.asarray(ours.logits(ours(tokens, np.ones_like(tokens), positions).hidden))[..., : config.vocab_size]
    assert np.abs(given - expected).max() < 1e-5 * np.abs(expected).max()
