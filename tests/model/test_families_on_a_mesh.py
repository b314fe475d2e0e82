"""Every family against transformers, on a mesh of eight devices; variants of a family are left to test_families.py."""

import pathlib

import pytest

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.model.families.known import FAMILIES

NAMES = sorted(path.stem for path in (pathlib.Path(__file__).parent / "tiny").glob("*.json"))
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


@pytest.mark.parametrize("name", [name for name in NAMES if name in FAMILIES or name == "gemma3"])
def test_logits_loss_gradients_answers_and_exported_bytes_are_those_of_transformers(name, compare_family):
    axes = {"expert": 2} if name in MIXTURES else {"data": 2}
    compare_family(name, make_mesh(MeshConfig(fsdp=2, tensor=2, **axes)))
