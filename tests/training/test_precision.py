"""bfloat16 compute: every weight's gradient against float32, and no sum over tokens that is made in bfloat16.

The bound is derived, not fitted. Rounding only the weights to bfloat16, in float32 compute, moves a gradient by some
distance. Compute in bfloat16 rounds three things of that size at each product, its two factors and its result, and
between two products as many again (norm, activation, rotation, residual): independent, they make sqrt(6) of that
distance. Sums that are not float32 leave it far behind: by 32 times for the embedding of a frequent token.
"""

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
from jaxsft.config import MeshConfig, OptimConfig
from jaxsft.mesh import make_mesh
from jaxsft.model.abstract import abstract_model, random_weights
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config
from jaxsft.training import loss_in_blocks
from jaxsft.training.step import put_batch, split_microbatches, summed_gradients

TINY = pathlib.Path(__file__).parents[1] / "model" / "tiny"
ROWS, LENGTH = 8, 256
BOUND = math.sqrt(6)


def config_of(name):
    """A tiny model that is no more sensitive than a large one: of small random weights."""
    config = json.loads((TINY / f"{name}.json").read_text()) | {"initializer_range": 0.05}
    config |= {"n_positions": LENGTH} if config["model_type"] == "gpt2" else {"max_position_embeddings": LENGTH}
    return decoder_config(config)


def make_model(config, compute_dtype, param_dtype="float32"):
    make = functools.partial(Decoder, config, compute_dtype=compute_dtype, param_dtype=param_dtype, remat="none")
    return lambda rngs: make(rngs=rngs)


@functools.cache
def make_batch(vocab_size):
    """Rows of two examples, whose tokens are as frequent as words are: the n-th by 1 / n."""
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, vocab_size + 1)
    tokens = rng.choice(vocab_size, (ROWS, LENGTH + 1), p=frequencies / frequencies.sum()).astype(np.int32)
    second = np.arange(LENGTH) >= LENGTH // 3
    shape = (ROWS, LENGTH)
    return Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        (rng.random(shape) < 0.7).astype(np.float32),
        np.broadcast_to(1 + second, shape).astype(np.int32),
        np.broadcast_to(np.arange(LENGTH) - second * (LENGTH // 3), shape).astype(np.int32),
    )


def gradients_of(make, several_weights, batch, mesh, *, num_microbatches=1):
    """Of the loss sum by the parameters, for each of several states, all float64 and on the host."""
    model = abstract_model(make)

    @jax.jit
    def compute(weights, batch):
        params, frozen = model.split(weights)
        microbatches = split_microbatches(batch, num_microbatches)
        return summed_gradients(model.graphdef, params, frozen, microbatches, optim=OptimConfig()).gradients

    with jax.set_mesh(mesh):
        placed = put_batch(lambda rows: jax.tree.map(lambda leaf: leaf[rows], batch), batch.tokens.shape, mesh)
        found = [jax.device_get(compute(place(each, mesh), placed)) for each in several_weights]
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)


@functools.cache
def exact_of(name):
    """Parameters on the host, the gradients of float32 in float32, and those where only the weights are rounded."""
    config = config_of(name)
    batch, exact = make_batch(config.vocab_size), make_model(config, "float32")
    one_device = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_get(random_weights(exact, one_device, seed=0))
    of_rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    gradients = gradients_of(exact, [params, of_rounded], batch, one_device)
    return params, *gradients


def check(name, mesh, *, num_microbatches=1):
    config = config_of(name)
    params, expected, moved = exact_of(name)
    batch, rounded = make_batch(config.vocab_size), make_model(config, "bfloat16")
    (given,) = gradients_of(rounded, [params], batch, mesh, num_microbatches=num_microbatches)
    largest = max(map(np.linalg.norm, jax.tree.leaves(expected)))
    beyond = {}
    leaves = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, gradient), ours, other in zip(leaves, jax.tree.leaves(given), jax.tree.leaves(moved), strict=True):
        # A gradient that is small beside the others (0 by its mathematics, of the bias of keys) is made of large terms.
        rounding = 2**-9 * max(np.linalg.norm(gradient), 0.1 * largest)
        distance = max(np.linalg.norm(other - gradient), rounding)
        if (ratio := np.linalg.norm(ours - gradient) / distance) > BOUND:
            beyond[jax.tree_util.keystr(path)] = round(float(ratio), 1)
    assert not beyond


FAMILIES = {
    "tied": "llama",
    "untied": "llama_untied",
    "biases": "qwen2",
    "learned positions, all biases": "gpt2",
    "mixture": "olmoe",
    "mixture with biases, sinks, windows": "gpt_oss",
    "mixture with a shared expert": "qwen2_moe",
    "mixture with sigmoids and a correction": "minimax_m2",
    "norms after rope, without weights": "nanochat",
    "trained activation": "apertus",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_bfloat16_are_as_near_to_float32_as_rounding_allows(family):
    check(FAMILIES[family], make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    ("name", "axes", "num_microbatches"),
    [
        ("llama", {"fsdp": 8}, 1),
        ("gpt2", {"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ("qwen2", {"context": 2, "fsdp": 2, "data": 2}, 2),
        ("olmoe", {"expert": 2, "fsdp": 2, "tensor": 2}, 1),
        ("olmoe", {"data": 2, "expert": 2, "tensor": 2}, 2),
        ("gpt_oss", {"data": 2, "context": 4}, 2),
    ],
)
def test_they_are_on_a_mesh_and_over_microbatches(name, axes, num_microbatches):
    check(name, make_mesh(MeshConfig(**axes)), num_microbatches=num_microbatches)


@pytest.mark.parametrize(
    ("name", "axes"), [("llama_untied", {"fsdp": 8}), ("llama", {"fsdp": 2, "context": 2, "tensor": 2})]
)
def test_they_are_with_the_vocabulary_in_blocks(monkeypatch, name, axes):
    monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 2**9)  # blocks of several rows
    check(name, make_mesh(MeshConfig(**axes)))


@pytest.mark.parametrize("count", [1024, 16384])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_untied", "gpt2"])
def test_a_token_that_occurs_many_times_gets_all_of_its_gradient(name, param_dtype, count):
    """Its row is a sum of as many terms, known in float64: of embeddings of tokens, and of learned positions."""
    config = config_of(name)
    model = make_model(config, "bfloat16", param_dtype)(nnx.Rngs(0))
    ids = jnp.full((1, count), 3)
    terms = 1 + 0.1 * np.random.default_rng(0).normal(size=(1, count, config.hidden_size))
    terms = np.asarray(jnp.asarray(terms, jnp.bfloat16), np.float64)
    for table in filter(None, (model.embed_tokens, model.embed_positions)):
        graphdef, weights = nnx.split(table)

        def total(weights, graphdef=graphdef):
            rows = nnx.merge(graphdef, weights)(ids, jnp.dtype("bfloat16"))
            return jnp.sum(rows.astype(jnp.float32) * terms.astype(np.float32))

        (gradient,) = jax.tree.leaves(jax.grad(total)(weights))
        assert gradient.dtype == param_dtype
        unit = 5e-7 if param_dtype == "float32" else 2**-8
        np.testing.assert_allclose(np.asarray(gradient, np.float64)[3], terms.sum(axis=(0, 1)), rtol=unit)
        assert not np.asarray(gradient)[:3].any() and not np.asarray(gradient)[4:].any()


def equations(jaxpr):
    for equation in jaxpr.eqns:
        if equation.outvars:
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("axes", [{"fsdp": 1}, {"fsdp": 8}, {"context": 2, "fsdp": 4}], ids=str)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe", "gpt_oss"])
def test_nothing_is_summed_over_tokens_in_bfloat16(name, param_dtype, axes):
    """By the program itself: sums, scatters, sums over devices, and what products put into weights, or loops into
    keys."""
    config = config_of(name)
    make = make_model(config, "bfloat16", param_dtype)
    graphdef, params, _ = abstract_model(make)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), make_batch(config.vocab_size))
    compute = functools.partial(summed_gradients, graphdef, frozen=nnx.State({}), optim=OptimConfig())
    with jax.set_mesh(make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])):
        traced = jax.make_jaxpr(lambda params, batch: compute(params, microbatches=batch))(params, batch)

    def is_rounded(variable):
        return variable.aval.dtype == jnp.bfloat16

    # Of one layer, or of a table.
    weights = {math.prod(leaf.shape[at:]) for leaf in jax.tree.leaves(params) for at in (0, 1)}
    keys = (ROWS, LENGTH, config.num_kv_heads, config.head_dim)
    num_products = num_over_devices = 0
    for equation in equations(traced.jaxpr):
        out, kind = equation.outvars[0], equation.primitive.name
        if kind in ("reduce_sum", "cumsum", "psum", "reduce_scatter") or kind.startswith("scatter-add"):
            num_over_devices += kind == "reduce_scatter"
            assert not is_rounded(out), equation
        if kind == "dot_general" and LENGTH * ROWS in _contracted(equation):
            num_products += 1
            assert out.aval.size in weights and not is_rounded(out), equation
        if kind == "scan":
            assert not any(is_rounded(each) and each.aval.shape == keys for each in equation.outvars), equation
    assert num_products >= 4 - (config.routing is not None) * 3
    assert num_over_devices >= 4 or "context" not in axes  # the gradients of keys and of values, in two parts


def _contracted(equation):
    """How many terms each entry of a product is the sum of."""
    (dims, _), _ = equation.params["dimension_numbers"]
    return {math.prod(equation.invars[0].aval.shape[dim] for dim in dims)}
