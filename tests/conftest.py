"""Eight simulated CPU devices for every test, and the real material where this machine has it."""

import os
import pathlib

# Before jax is imported anywhere: the number of devices is fixed when its backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
MATERIAL = pathlib.Path(os.environ.get("JAXSFT_MATERIAL", REPO.parent / "shared" / "material"))


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
    return REPO


@pytest.fixture(scope="session")
def material() -> pathlib.Path:
    """Real tokenizers, templates, data and a small model; users do not have them."""
    if not MATERIAL.is_dir():
        pytest.skip(f"needs the real material folder, looked for at {MATERIAL} (set JAXSFT_MATERIAL)")
    return MATERIAL
