"""Which weights are trained: their gradients are those of full fine-tuning, and no others are made."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from placing import place

from jaxsft.batch import Batch
from jaxsft.config import ConfigError, MeshConfig, OptimConfig
from jaxsft.folders.weights.layout import join, variables_of
from jaxsft.mesh import make_mesh
from jaxsft.model.abstract import abstract_model, random_weights
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.model.freezing import frozen_key, train_only
from jaxsft.training.step import put_batch, split_microbatches, summed_gradients

TINY = pathlib.Path(__file__).parent / "tiny"
LAST = [r"layers\.[23]\..*", "norms"]


def config_of(name):
    config = json.loads((TINY / f"{name}.json").read_text()) | {"num_hidden_layers": 4, "initializer_range": 0.05}
    return config | ({"layer_types": (config["layer_types"] * 2)[:4]} if "layer_types" in config else {})


def make_model(name, only=None, *, compute_dtype="float32", remat="full"):
    hf_config = config_of(name)
    config = decoder_config(hf_config)

    def make(rngs):
        decoder = Decoder(config, compute_dtype=compute_dtype, param_dtype="float32", remat=remat, rngs=rngs)
        if only is not None:
            train_only(decoder, only, family(hf_config).WEIGHTS)
        return decoder

    return make


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def by_layers(state):
    """Values by path; those of stacks layer by layer."""
    found = {}
    for path, variable in variables_of(state).items():
        value = np.asarray(variable.get_value())
        if "layers" not in path:
            found[path] = value
            continue
        first = 2 if path.startswith("last_") else 0
        for number, of_layer in enumerate(value):
            found[path.removeprefix("last_").replace("layers.", f"layers.{first + number}.")] = of_layer
    return found


def gradients_of(make, mesh):
    model = abstract_model(make)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 67, (8, 33)).astype(np.int32)
    ones = np.ones((8, 32), np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)

    @jax.jit
    def compute(params, frozen, batch):
        return summed_gradients(model.graphdef, params, frozen, split_microbatches(batch, 1), optim=OptimConfig())

    with jax.set_mesh(mesh):
        placed = put_batch(lambda rows: jax.tree.map(lambda leaf: leaf[rows], batch), batch.tokens.shape, mesh)
        weights = place(jax.device_get(random_weights(make, mesh_of(fsdp=1), seed=0)), mesh)
        found = jax.device_get(compute(*model.split(weights), placed))
    return float(found.loss.loss_sum), by_layers(found.gradients)


@functools.cache
def whole(name):
    return gradients_of(make_model(name), mesh_of(fsdp=1))


@pytest.mark.parametrize(
    ("name", "only", "sizes"),
    [
        ("llama", ["embeddings"], {"fsdp": 1}),
        ("llama", ["norms", "q_proj"], {"fsdp": 2, "tensor": 2}),
        ("llama", LAST, {"fsdp": 2, "tensor": 2}),
        ("gemma2", [r"layers\.[23]\.mlp\..*", "embed_tokens"], {"fsdp": 1}),
        ("qwen3_moe", [r"layers\.[23]\..*"], {"fsdp": 1}),
        ("qwen3_moe", ["router", "norms"], {"fsdp": 1}),
        ("qwen3_moe", [r"layers\..*\.experts\.down_proj"], {"expert": 2, "tensor": 2}),
        ("gpt_oss", [".*bias"], {"fsdp": 1}),
        ("gpt2", [r"transformer\.h\.[23]\..*"], {"fsdp": 1}),
    ],
    ids=str,
)
def test_what_is_trained_has_the_gradients_of_full_fine_tuning(name, only, sizes):
    loss, gradients = gradients_of(make_model(name, only), mesh_of(**sizes))
    expected_loss, expected = whole(name)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert 0 < len(gradients) < len(expected)
    for path, gradient in gradients.items():
        scale = np.linalg.norm(expected[path])
        assert np.linalg.norm(gradient - expected[path]) <= 1e-5 * scale + 1e-9, path


def test_layers_below_the_first_trained_one_keep_nothing_for_a_gradient():
    """By the temporary memory of the compiled gradients: what three layers keep is not there."""

    def temp(only):
        model = abstract_model(make_model("llama", only, remat="none"))
        rows = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
        batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows, rows)

        def compute(params, frozen, batch):
            return summed_gradients(model.graphdef, params, frozen, split_microbatches(batch, 1), optim=OptimConfig())

        with jax.set_mesh(mesh_of(fsdp=1)):
            compiled = jax.jit(compute).lower(model.params, model.frozen, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Residual stream, queries, keys, values, attention, its projection, gate and up, float32.
    of_layer = 8 * 2048 * 4 * (48 + 48 + 16 + 16 + 48 + 48 + 70 + 70)
    assert temp(None) - temp([r"layers\.3\..*"]) > 0.8 * 3 * of_layer


def test_files_are_the_same_whatever_is_trained():
    for name in ("llama", "phi3", "qwen3_moe"):
        hf_config = config_of(name)
        plain, parted = (abstract_model(make_model(name, only)).weights for only in (None, LAST))
        names = []
        for state in (plain, parted):
            weights = join(state, family(hf_config), vocab_size=67)
            names.append(
                {weight.name(at): weight.file_shape for weight, _ in weights.values() for at in weight.indices()}
            )
        assert names[0] == names[1]
        drawn = [by_layers(random_weights(make_model(name, only), mesh_of(fsdp=1), seed=0)) for only in (None, LAST)]
        jax.tree.map(np.testing.assert_array_equal, *drawn)


def test_frozen_matrices_are_kept_in_the_compute_dtype():
    frozen = variables_of(abstract_model(make_model("qwen3_moe", ["lm_head"], compute_dtype="bfloat16")).frozen)
    exact = {path for path, variable in frozen.items() if variable.dtype == np.float32}
    assert exact == {path for path in frozen if "norm" in path or "router" in path}


@pytest.mark.parametrize(
    ("only", "said"),
    [
        (["mpl", "nroms"], ["'mpl', 'nroms' fits no weight", "embeddings, norms"]),
        ([r"layers\.[01]\..*"], ["the last ones are, from the same layer on", "layers with others after them"]),
        ([r"layers\.3\.mlp.*", r"layers\.[23]\.self_attn.*"], ["layers from 3 on", "layers from 2 on"]),
        (["(x"], ["'(x' is no regular expression"]),
    ],
    ids=str,
)
def test_what_cannot_be_trained_so_is_refused(only, said):
    with pytest.raises(ConfigError) as error:
        make_model("llama", only)(nnx.Rngs(0))
    assert all(text in str(error.value) for text in said), error.value


def test_the_key_of_frozen_weights_is_the_same_on_every_mesh_and_sees_every_change():
    make = make_model("qwen3_moe", ["norms"], compute_dtype="bfloat16")
    model = abstract_model(make)
    host = jax.device_get(random_weights(make, mesh_of(fsdp=1), seed=0))

    def key_of(weights, **sizes):
        return frozen_key(model.split(place(weights, mesh_of(**sizes)))[1])

    key = key_of(host, fsdp=1)
    assert len(key) == 16
    assert key_of(host, fsdp=2, tensor=2) == key_of(host, expert=2, data=2) == key

    def changed(path, change):
        flat = dict(nnx.to_flat_state(host))
        value = np.array(flat[path].get_value())
        change(value)
        return nnx.from_flat_state(flat | {path: flat[path].replace(value)})

    def one_bit(value):
        value.view(np.uint16).reshape(-1)[77] ^= 1

    def swap(value):
        value[[0, 1]] = value[[1, 0]]

    path = ("layers", "self_attn", "q_proj", "weight")
    others = [key_of(changed(path, change), fsdp=1) for change in (one_bit, swap)]
    assert len({key, *others}) == 3
    assert frozen_key(abstract_model(make_model("llama")).frozen) == ""
