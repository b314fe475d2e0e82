"""Every family against transformers, on a mesh of eight devices; variants of a family are left to test_families.py."""

import json
import pathlib

import pytest

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.model.families.known import FAMILIES, decoder_config

TINY = {path.stem: path for path in sorted((pathlib.Path(__file__).parent / "tiny").glob("*.json"))}


@pytest.mark.parametrize("name", [name for name in TINY if name in FAMILIES or name == "gemma3"])
def test_logits_loss_gradients_answers_and_exported_bytes_are_those_of_transformers(name, compare_family):
    is_mixture = decoder_config(json.loads(TINY[name].read_text())).routing is not None
    axes = {"expert": 2} if is_mixture else {"data": 2}
    compare_family(name, make_mesh(MeshConfig(fsdp=2, tensor=2, **axes)))
