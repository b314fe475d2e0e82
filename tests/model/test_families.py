"""Every family against transformers, on one device: tests/model/tiny/ holds a config.json for each variant.

A new family adds a file there; what is compared is in conftest.py.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.model.families.known import FAMILIES

TINY = {path.stem: path for path in sorted((pathlib.Path(__file__).parent / "tiny").glob("*.json"))}


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_every_family_has_a_tiny_model():
    assert {json.loads(path.read_text())["model_type"] for path in TINY.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_logits_loss_gradients_answers_and_exported_bytes_are_those_of_transformers(name, compare_family):
    compare_family(name, one_device())


def test_the_real_stories260k_has_the_logits_of_transformers_and_goes_out_byte_equal(material, load_decoder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = material / "models" / "stories260K"
    ours = load_decoder(source, one_device())
    tokens = np.random.default_rng(0).integers(0, 512, (2, 200)).astype(np.int32)
    given = ours.logits(tokens)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(given - expected).max() < 1e-5 * np.abs(expected).max()
    ours.export(ours.params, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_guide_to_models_names_every_family_and_shows_the_smallest_as_it_is(repo):
    guide = (repo / "docs" / "models.md").read_text()
    families = repo / "jaxsft" / "model" / "families"
    smallest = min((path for path in families.glob("*.py") if path.stem != "__init__"), key=lambda p: p.stat().st_size)
    assert f"smallest is `{smallest.name}`" in guide and smallest.read_text() in guide
    missing = [model_type for model_type in FAMILIES if f"`{model_type}`" not in guide]
    assert not missing
