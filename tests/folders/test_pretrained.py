"""A model folder from opening to export: what the config asks for, and what comes out."""

import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxsft.config import ConfigError, MeshConfig, ModelConfig
from jaxsft.folders import hf
from jaxsft.folders.pretrained import check_positions, export_model, load_weights, open_model, open_tokenizer
from jaxsft.mesh import make_mesh
from jaxsft.model.abstract import whole


class Positions(NamedTuple):
    """What `check_positions` asks of a DecoderConfig."""

    learned_positions: bool
    max_position: int


def open_both(folder, **options):
    config = ModelConfig(path=str(folder), **options)
    tokenizer = open_tokenizer(config)
    return tokenizer, open_model(config, tokenizer)


def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def exported(folder, out, **options):
    tokenizer, pretrained = open_both(folder, **options)
    params = load_weights(pretrained, mesh(), seed=0)
    export_model(pretrained, tokenizer, params, out)
    return params


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """Random weights; the embeddings are tied."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    exported(tiny_model, folder, weights="random")
    return folder


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_that_was_not_trained_goes_out_as_it_came_in_every_file_equal(model, tmp_path):
    exported(model, tmp_path / "out")
    assert files(tmp_path / "out") == files(model)


def test_random_weights_have_zeros_in_the_rows_that_only_fill_up_the_vocabulary(tiny_model, model):
    config = hf.load_hf_config(model)
    params = load_weights(open_both(tiny_model, weights="random")[1], mesh(), seed=0)
    table = np.asarray(params["embed_tokens"]["weight"][...])
    assert len(table) % 128 == 0 and not table[config["vocab_size"] :].any()
    stored = safetensors.numpy.load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[: config["vocab_size"]], stored)


def test_an_unrolled_model_has_the_same_state(model):
    scanned, unrolled = (open_both(model, unroll=unroll)[1] for unroll in (False, True))
    assert jax.tree.structure(scanned.model.params) == jax.tree.structure(unrolled.model.params)
    both = [load_weights(each, mesh(), seed=0) for each in (scanned, unrolled)]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_embeddings_are_untied_on_request_and_the_export_says_so(model, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert hf.load_hf_config(model)["tie_word_embeddings"]
    assert "lm_head" not in open_both(model)[1].model.params
    tokenizer, pretrained = open_both(model, tie_embeddings=False)
    params = load_weights(pretrained, mesh(), seed=0)
    np.testing.assert_array_equal(params["lm_head"]["weight"][...], params["embed_tokens"]["weight"][...])
    params["lm_head"]["weight"].set_value(params["lm_head"]["weight"].get_value() * 2)
    out = tmp_path / "out"
    export_model(pretrained, tokenizer, params, out)

    before = json.loads((model / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == before | {"tie_word_embeddings": False}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    embedding = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), 2 * embedding)
    # Opened again, it is a model with two tables, which nobody may tie.
    again = load_weights(open_both(out)[1], mesh(), seed=0)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ConfigError, match="model.tie_embeddings: true, but the model has an output projection of its"):
        open_both(out, tie_embeddings=True)


def test_a_dtype_for_the_export_is_every_tensor_s(model, tmp_path):
    exported(model, tmp_path / "out", export_dtype="float16")
    dtypes = {x.dtype for x in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {np.dtype(np.float16)}
    assert hf.load_hf_config(tmp_path / "out")["dtype"] == "float16"


def test_rows_longer_than_a_table_of_positions_are_refused_with_both_numbers():
    check_positions(Positions(True, 1024), 1024)
    check_positions(Positions(False, 1024), 4096)
    with pytest.raises(ConfigError, match="data.seq_len: 1025, but the model has a table of 1024 positions"):
        check_positions(Positions(True, 1024), 1025)


def test_what_is_not_trained_is_exported_to_the_bit_whatever_it_is_computed_in(model, tmp_path):
    """In memory it lies in bfloat16; of two layers, the first and the table."""
    config = ModelConfig(path=str(model), compute_dtype="bfloat16")
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer, only=[r"layers\.1\..*"])
    weights = load_weights(pretrained, mesh(), seed=0)
    params, frozen = pretrained.model.split(weights)
    assert frozen["layers"]["mlp"]["up_proj"]["weight"].dtype == np.dtype("bfloat16")
    trained = jax.tree.map(lambda leaf: leaf + 1, params)
    export_model(pretrained, tokenizer, whole(trained, frozen), tmp_path / "out")
    before, after = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    for name, tensor in before.items():
        moved = 1.0 if ".layers.1." in name else 0.0
        np.testing.assert_array_equal(after[name], tensor + np.float32(moved), err_msg=name)
