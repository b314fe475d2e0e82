"""Tiny models of transformers with adapters, here and in PEFT: what the tests of adapter folders compare."""

import functools
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.config import LoraConfig, MeshConfig, ModelConfig
from jaxsft.folders.pretrained import OpenTokenizer, Pretrained, load_weights, open_model
from jaxsft.folders.weights.layout import path_text, variables_of
from jaxsft.mesh import make_mesh
from jaxsft.model.lora import shapes_of

_SPEC = importlib.util.spec_from_file_location(
    "conftest_of_models", pathlib.Path(__file__).parents[1] / "model" / "conftest.py"
)
models = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(models)

TINY: dict[str, pathlib.Path] = {path.stem: path for path in sorted(models.TINY.glob("*.json"))}


class StubTokenizer:
    """These models have a vocabulary of some 60 tokens, and nothing here is said in words."""

    bos_token_id = pad_token_id = chat_template = None
    added_tokens_decoder: dict[int, str] = {}

    def get_vocab(self) -> dict[str, int]:
        return {f"<{id}>": id for id in range(60)}

    def convert_ids_to_tokens(self, id: int) -> str:
        return f"<{id}>"

    def save_pretrained(self, folder: pathlib.Path) -> None:
        pass


TOKENIZER = OpenTokenizer(StubTokenizer(), "", (2, 5))


def one_device() -> Any:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def make_base(name: str, folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A random model of transformers in a folder, by the name of its config in tests/model/tiny."""
    models.make_theirs(json.loads(TINY[name].read_text()) | changes, folder)
    return folder


def open_ours(path: pathlib.Path, lora: dict[str, Any] | None = None, **model: Any) -> Pretrained:
    """A model or adapter folder, opened."""
    config = ModelConfig(path=str(path), remat="none", **model)
    return open_model(config, TOKENIZER, None if lora is None else LoraConfig(**lora))


def random_adapters(pretrained: Pretrained, *, seed: int = 0) -> Any:
    """All weights of a model; A, B and magnitudes are as if they had been trained."""
    rng = np.random.default_rng(seed)
    ranks = {path: shape.ranks for path, shape in _shapes(pretrained).items()}

    def changed(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        name, value = path_text(path), np.asarray(variable.get_value())
        if name.endswith(".adapter.magnitude"):
            return variable.replace(jnp.asarray(value * rng.uniform(0.7, 1.4, value.shape).astype(np.float32)))
        if not name.endswith((".adapter.a", ".adapter.b")):
            return variable
        drawn = 0.15 * rng.normal(size=value.shape).astype(np.float32)
        axes = variable.get_metadata("axes").split()
        if "v" in axes:  # rows that only fill up the table
            np.moveaxis(drawn, axes.index("v"), 0)[pretrained.decoder_config.vocab_size :] = 0
        for layer, rank in np.ndenumerate(ranks[name.rpartition(".adapter.")[0]]):  # what fills up the rank
            of_layer = drawn[layer]
            np.moveaxis(of_layer, axes.index("r") - len(layer), 0)[int(rank) :] = 0
        return variable.replace(jnp.asarray(drawn, value.dtype))

    weights = load_weights(pretrained, one_device(), seed=seed)
    return jax.tree_util.tree_map_with_path(changed, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _shapes(pretrained: Pretrained) -> dict[str, Any]:
    return shapes_of(nnx.merge(*pretrained.model), pretrained.lora, pretrained.family)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, params: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params, frozen)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(tokens, jnp.ones_like(tokens), positions).hidden)


def our_logits(pretrained: Pretrained, weights: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    with jax.set_mesh(one_device()):
        found = _forward(pretrained.model.graphdef, *pretrained.model.split(weights), jnp.asarray(tokens))
    return np.asarray(found)[..., : pretrained.decoder_config.vocab_size]


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def with_peft(base: pathlib.Path, adapter: pathlib.Path) -> Any:
    """transformers' model with an adapter that PEFT loads; any warning that concerns its tensors is an error."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected|inconsistency|no module was|Unknown).*")
        return peft.PeftModel.from_pretrained(models.load_theirs(base), str(adapter)).eval()


def some_tokens(vocab_size: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (2, 20)).astype(np.int32)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def assert_same_state(one: Any, other: Any) -> None:
    """Equal to the bit, with the same Variables."""
    ours, theirs = variables_of(one), variables_of(other)
    assert ours.keys() == theirs.keys()
    for path, variable in ours.items():
        np.testing.assert_array_equal(np.asarray(variable[...]), np.asarray(theirs[path][...]), err_msg=path)
