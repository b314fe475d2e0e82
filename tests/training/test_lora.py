"""Adapters: gradients by the chain rule from those of whole weights, nothing where B is 0, and the same however cut."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from flax import nnx
from placing import place

from jaxsft.batch import Batch
from jaxsft.config import ConfigError, LoraConfig, MeshConfig, OptimConfig
from jaxsft.mesh import batch_sharding, make_mesh
from jaxsft.model import adapter, noise
from jaxsft.model.abstract import abstract_model, random_weights
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.model.lora import add_adapters, of_files, shapes_of, with_magnitudes, without_dropout
from jaxsft.model.noise import row_keys
from jaxsft.training.program import read_program
from jaxsft.training.step import (
    abstract_state,
    init_state,
    make_train_step,
    put_batch,
    split_microbatches,
    split_rows,
    summed_gradients,
)

TINY = pathlib.Path(__file__).parents[1] / "model" / "tiny"
ROWS, LENGTH = 8, 48
EVERYTHING = ["all_linear", "embed_tokens", "lm_head"]
MODELS = {
    "llama": LoraConfig(rank=3, alpha=4.5, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}),
    "llama_untied": LoraConfig(rank=4, targets=EVERYTHING, exclude=[r"layers\.0\..*up_proj"], rslora=True),
    "gpt_oss": LoraConfig(rank=3, targets=[*EVERYTHING, "router"], alpha_pattern={"down_proj": 2.0}),
    "qwen3_moe": LoraConfig(rank=2, targets=["up_proj", "down_proj", "o_proj"]),
}


def config_of(name):
    """A tiny model that is no more sensitive than a large one: of small random weights."""
    return json.loads((TINY / f"{name}.json").read_text()) | {"initializer_range": 0.05, "num_hidden_layers": 2}


def make_model(name, lora=None, *, compute_dtype="float32", remat="none", unroll=False):
    hf_config = config_of(name)
    config = decoder_config(hf_config)

    def make(rngs):
        options = {"compute_dtype": compute_dtype, "param_dtype": "float32", "remat": remat, "unroll": unroll}
        decoder = Decoder(config, **options, rngs=rngs)
        if lora is not None:
            add_adapters(decoder, lora, family(hf_config), key=rngs.params())
        return decoder

    return make


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


@functools.cache
def make_batch(vocab_size):
    """Rows of two examples."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    second = np.arange(LENGTH) >= LENGTH // 3
    shape = (ROWS, LENGTH)
    return Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        (rng.random(shape) < 0.7).astype(np.float32),
        np.broadcast_to(1 + second, shape).astype(np.int32),
        np.broadcast_to(np.arange(LENGTH) - second * (LENGTH // 3), shape).astype(np.int32),
    )


@functools.cache
def weights_of(name):
    """All weights on the host, adapters as after some steps: B is not 0."""
    lora = MODELS[name]
    make = make_model(name, lora)
    weights = jax.device_get(random_weights(make, mesh_of(fsdp=1), seed=0))
    rng = np.random.default_rng(1)
    flat = dict(nnx.to_flat_state(weights))
    for path, variable in flat.items():
        if path[-1] in ("a", "b") and path[-2] == "adapter":
            value = variable.get_value()
            drawn = rng.normal(0, 0.05, value.shape).astype(np.float32)
            # What lies beyond a layer's rank stays 0.
            is_used = np.asarray(shapes(name, lora)[".".join(path[:-2])].ranks)[..., None] > np.arange(
                rank_of(variable)
            )
            flat[path] = variable.replace(drawn * on_rank(variable, is_used))
    return nnx.from_flat_state(flat)


def shapes(name, lora):
    hf_config = config_of(name)
    decoder = nnx.eval_shape(lambda: make_model(name)(nnx.Rngs(0)))
    return shapes_of(decoder, lora, family(hf_config))


def rank_of(variable):
    return variable.shape[variable.get_metadata("axes").split().index("r")]


def on_rank(variable, is_used):
    """[L, R] or [R] as a factor of A or B."""
    axes = variable.get_metadata("axes").split()
    at = [size if letter in ("l", "r") else 1 for letter, size in zip(axes, variable.shape, strict=True)]
    return is_used.reshape(at)


def gradients_of(make, weights, mesh, *, num_microbatches=1, noise_seed=None, vocab_size=67):
    """Loss, and gradients of the loss sum by what is trained; float64, on the host."""
    model, batch = abstract_model(make), make_batch(vocab_size)

    @jax.jit
    def compute(params, frozen, batch):
        noise = None
        if noise_seed is not None:
            noise = split_rows(row_keys(noise_seed, jnp.int32(5), ROWS), num_microbatches, "w")
        microbatches = split_microbatches(batch, num_microbatches)
        return summed_gradients(model.graphdef, params, frozen, microbatches, optim=OptimConfig(), noise=noise)

    with jax.set_mesh(mesh):
        placed = put_batch(lambda rows: jax.tree.map(lambda leaf: leaf[rows], batch), batch.tokens.shape, mesh)
        params, frozen = model.split(place(weights, mesh))
        found = jax.device_get(compute(params, frozen, placed))
    return float(found.loss.loss_sum), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found.gradients)


def flat_of(state):
    return {".".join(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def axes_of(state):
    return {".".join(path): variable.get_metadata("axes") for path, variable in nnx.to_flat_state(state)}


def letters(path, axes):
    """Axes of weight, A and B of a map as einsum letters, and whether the weight lies the other way around."""
    weight, a, b = (axes[f"{path}.{name}"].replace(" ", "") for name in ("weight", "adapter.a", "adapter.b"))
    return weight, a, b


def merged(weights):
    """W + scale A B in float64, as the weights of a model without adapters; and the gradients that follow from its."""
    flat, axes = flat_of(weights), axes_of(weights)
    values = dict(flat)
    adapted = [path.removesuffix(".adapter.a") for path in flat if path.endswith(".adapter.a")]
    for path in adapted:
        weight, a, b = letters(path, axes)
        scale = np.asarray(flat[f"{path}.adapter.scale"], np.float64)
        of_layers = "l" if scale.ndim else ""
        product = np.einsum(
            f"{a},{b},{of_layers}->{weight}",
            *(np.asarray(flat[f"{path}.adapter.{name}"], np.float64) for name in "ab"),
            scale,
        )
        values[f"{path}.weight"] = np.asarray(flat[f"{path}.weight"], np.float64) + product
    files = of_files(weights)
    return adapted, jax.tree_util.tree_map_with_path(
        lambda at, leaf: nnx.Param(
            np.asarray(values[".".join(str(key.key) for key in at)], np.float32), axes=leaf.get_metadata("axes")
        ),
        files,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


@functools.cache
def expected_of(name):
    """Loss and gradients by A and B, by the chain rule from those by whole weights: dA = dW B^T, dB = A^T dW."""
    weights = weights_of(name)
    adapted, plain = merged(weights)
    loss, by_weights = gradients_of(make_model(name), plain, mesh_of(fsdp=1))
    flat, axes, by_weights = flat_of(weights), axes_of(weights), flat_of(by_weights)
    gradients = {}
    for path in adapted:
        weight, a, b = letters(path, axes)
        scale = np.asarray(flat[f"{path}.adapter.scale"], np.float64)
        of_layers = "l" if scale.ndim else ""
        for name_, ours, other in (("a", a, b), ("b", b, a)):
            factor = np.asarray(flat[f"{path}.adapter.{'b' if name_ == 'a' else 'a'}"], np.float64)
            gradients[f"{path}.adapter.{name_}"] = np.einsum(
                f"{weight},{other},{of_layers}->{ours}", by_weights[f"{path}.weight"], factor, scale
            )
    return loss, gradients


def assert_near(given, expected, tolerance):
    assert given[0] == pytest.approx(expected[0], rel=tolerance)
    given, expected = flat_of(given[1]) if not isinstance(given[1], dict) else given[1], expected[1]
    expected = expected if isinstance(expected, dict) else flat_of(expected)
    assert given.keys() == expected.keys()
    for path, gradient in expected.items():
        scale = np.linalg.norm(gradient)
        assert scale > 0, path
        assert np.linalg.norm(given[path] - gradient) < tolerance * scale, path


@pytest.mark.parametrize("name", MODELS)
def test_gradients_follow_from_those_of_whole_weights(name):
    given = gradients_of(make_model(name, MODELS[name]), weights_of(name), mesh_of(fsdp=1))
    assert_near(given, expected_of(name), 2e-5)


@pytest.mark.parametrize("name", ["llama_untied", "gpt_oss"])
def test_gradients_in_bfloat16_are_as_near_as_rounding_lets_them(name):
    """Rounding the weights alone moves a gradient by so much; compute rounds sqrt(6) times that (test_precision)."""
    weights, lora = weights_of(name), MODELS[name]
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32) if leaf.dtype == np.float32 else leaf, weights
    )
    make, mesh = make_model(name, lora), mesh_of(fsdp=1)
    exact, moved = (flat_of(gradients_of(make, each, mesh)[1]) for each in (weights, rounded))
    model = make_model(name, lora, compute_dtype="bfloat16")
    # Frozen matrices are kept in the compute dtype.
    stored = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), weights, abstract_model(model).weights)
    given = flat_of(gradients_of(model, stored, mesh)[1])
    for path, gradient in exact.items():
        bound = np.linalg.norm(moved[path] - gradient)
        # Of a small matrix the distance is a matter of luck; it is no smaller than that of the typical one.
        typical = np.median([np.linalg.norm(moved[p] - g) / np.linalg.norm(g) for p, g in exact.items()])
        bound = max(bound, typical * np.linalg.norm(gradient))
        assert np.linalg.norm(given[path] - gradient) < 2 * math.sqrt(6) * bound, path


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"context": 2, "tensor": 2},
        {"expert": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_gradients_are_equal_on_every_mesh(sizes):
    given = gradients_of(
        make_model("gpt_oss", MODELS["gpt_oss"], remat="full"), weights_of("gpt_oss"), mesh_of(**sizes)
    )
    assert_near(given, expected_of("gpt_oss"), 2e-5)


@functools.cache
def dropping():
    """A model with dropout, its weights, and its gradients on one device."""
    lora = LoraConfig(rank=4, dropout=0.25)
    make = make_model("llama_untied", lora, remat="full")
    weights = jax.device_get(random_weights(make, mesh_of(fsdp=1), seed=0))
    weights = nnx.from_flat_state(
        {
            path: variable.replace(np.full(variable.shape, 0.02, np.float32)) if path[-1] == "b" else variable
            for path, variable in nnx.to_flat_state(weights)
        }
    )
    return make, weights, gradients_of(make, weights, mesh_of(fsdp=1), noise_seed=3)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2}], ids=str
)
def test_dropout_is_the_same_however_a_batch_is_cut(sizes):
    make, weights, expected = dropping()
    given = gradients_of(make, weights, mesh_of(**sizes), noise_seed=3, num_microbatches=2)
    assert_near(given, expected, 1e-5)
    other = gradients_of(make, weights, mesh_of(fsdp=1), noise_seed=4)
    assert other[0] != pytest.approx(expected[0], rel=1e-5)


def test_dropout_is_drawn_anew_for_each_seed_step_row_token_layer_and_map(monkeypatch):
    make, batch = make_model("llama", LoraConfig(rank=4, dropout=0.4), unroll=True), make_batch(67)
    drawn = []

    def uniform(keys, size):
        drawn.append(noise.uniform(keys, size))
        return drawn[-1]

    monkeypatch.setattr(adapter, "uniform", uniform)
    decoder = make(nnx.Rngs(0))
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        keys = row_keys(seed, jnp.int32(step), ROWS)
        decoder(batch.tokens, batch.segment_ids, batch.positions, noise=keys)
    assert len(drawn) == 3 * 2 * 7
    # A width that all maps have.
    numbers = [np.asarray(each)[..., :48] for each in drawn]
    assert all(abs((each < 0.4).mean() - 0.4) < 0.02 for each in numbers)
    of_tokens = np.concatenate(numbers, axis=0).reshape(-1, 48)
    assert len(np.unique(of_tokens, axis=0)) == len(of_tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_untied", "gpt_oss", "qwen3_moe"])
def test_where_b_is_zero_nothing_differs_by_a_bit(name, dtype):
    batch = make_batch(67)
    lora = MODELS[name].model_copy(
        update={"targets": ["all_linear", "embed_tokens"], "exclude": [], "alpha_pattern": {}}
    )
    adapted, plain = (make_model(name, each, compute_dtype=dtype)(nnx.Rngs(0)) for each in (lora, None))
    assert abstract_model(make_model(name, lora)).params
    hidden = [
        np.asarray(nnx.jit(each)(batch.tokens, batch.segment_ids, batch.positions).hidden, np.float32)
        for each in (adapted, plain)
    ]
    np.testing.assert_array_equal(*hidden)


def compiled_step(lora, mesh, *, unroll=False):
    """The optimised program of a step."""
    model, optim = abstract_model(make_model("llama_untied", lora, remat="full", unroll=unroll)), OptimConfig()
    step = make_train_step(model, optim, num_steps=10, num_microbatches=2, mesh=mesh)
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32, sharding=rows.sharding), rows, rows)
    with jax.set_mesh(mesh):
        return step.lower(abstract_state(model.params, optim, mesh), model.frozen, batch).compile(TO_READ)


def products_like_weights(text):
    """Matrix products whose result has as many numbers as a weight of one layer or a table: they make gradients."""
    sizes = {48 * 70, 48 * 6 * 8, 48 * 2 * 8, 48 * 128}
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    return [shape for shape in shapes if math.prod(map(int, shape.split(","))) in sizes]


def test_no_gradient_by_a_frozen_weight_is_computed():
    """By the optimised program; that of full fine-tuning has one product for each weight at least."""
    mesh = mesh_of(fsdp=1)
    assert not products_like_weights(compiled_step(LoraConfig(rank=5), mesh).as_text())
    assert len(products_like_weights(compiled_step(None, mesh).as_text())) >= 8


def test_no_gradient_by_a_frozen_weight_travels():
    """Over fsdp: what devices add up at once is no larger than the adapters; whole weights are larger."""
    mesh = mesh_of(fsdp=2)
    largest = []
    for lora in (LoraConfig(rank=2), None):
        report = read_program(compiled_step(lora, mesh).as_text(), mesh.shape)
        largest.append(max(each.num_bytes for each in report.collectives if each.axes and "reduce" in each.kind))
    params = abstract_model(make_model("llama_untied", LoraConfig(rank=2))).params
    assert largest[0] <= sum(4 * leaf.size for leaf in jax.tree.leaves(params)) < 4 * 48 * 70 <= largest[1]


def test_a_step_moves_adapters_alone():
    mesh, model = mesh_of(fsdp=1), abstract_model(make_model("llama", LoraConfig(rank=2, dropout=0.1)))
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
    step = make_train_step(model, optim, num_steps=10, num_microbatches=1, mesh=mesh)
    params, frozen = model.split(random_weights(make_model("llama", LoraConfig(rank=2, dropout=0.1)), mesh, seed=0))
    before = jax.device_get(frozen)
    state = init_state(params, optim, mesh)
    losses = []
    with jax.set_mesh(mesh):
        batch = jax.tree.map(jnp.asarray, make_batch(67))
        for _ in range(8):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics.sums.loss_sum))
    assert step.program._cache_size() == 1
    assert losses[-1] < losses[0] * 0.95
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 3 * sum(
        leaf.size for leaf in jax.tree.leaves(state.params)
    )


DORA = LoraConfig(rank=3, dora=True, exclude=[r"layers\.0\.self_attn\.k_proj"])


def test_dora_is_its_formula():
    """In float64: m V / |V|, V = W + scale A B, with no gradient through the norm (Liu et al. 2024, section 4.3)."""
    weights = jax.device_get(random_weights(make_model("llama", DORA), mesh_of(fsdp=1), seed=0))
    weights = jax.device_get(with_magnitudes(jax.tree.map(jnp.asarray, weights)))
    plain = of_files(weights)
    loss, _ = gradients_of(make_model("llama"), jax.tree.map(np.asarray, plain_params(plain)), mesh_of(fsdp=1))
    assert gradients_of(make_model("llama", DORA), weights, mesh_of(fsdp=1))[0] == pytest.approx(loss, rel=1e-6)

    rng = np.random.default_rng(2)
    weights = nnx.from_flat_state(
        {path: variable.replace(drawn_like(rng, path, variable)) for path, variable in nnx.to_flat_state(weights)}
    )
    flat, axes = flat_of(weights), axes_of(weights)
    values, chains = {path: np.asarray(value) for path, value in flat.items()}, {}
    for path in [path.removesuffix(".adapter.a") for path in flat if path.endswith(".adapter.a")]:
        weight, a, b = letters(path, axes)
        out = axes[f"{path}.adapter.magnitude"].replace(" ", "")
        w, factor_a, factor_b, magnitude, scale = (
            np.asarray(flat[f"{path}.{name}"], np.float64)
            for name in ("weight", "adapter.a", "adapter.b", "adapter.magnitude", "adapter.scale")
        )
        turned = w + np.einsum(f"{a},{b},l->{weight}", factor_a, factor_b, scale)
        norm = np.sqrt(np.einsum(f"{weight},{weight}->{out}", turned, turned))
        # A layer without an adapter has no magnitude either.
        is_adapted = (scale != 0).reshape(-1, *[1] * (magnitude.ndim - 1))
        magnitude = np.where(is_adapted, magnitude, norm)
        values[f"{path}.weight"] = np.einsum(f"{weight},{out}->{weight}", turned, magnitude / norm).astype(np.float32)
        chains[path] = (weight, a, b, out, turned, factor_a, factor_b, magnitude, norm, scale)
    plain = jax.tree_util.tree_map_with_path(
        lambda at, leaf: nnx.Param(values[".".join(str(key.key) for key in at)], axes=leaf.get_metadata("axes")),
        of_files(weights),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    loss, by_weights = gradients_of(make_model("llama"), plain, mesh_of(fsdp=1))
    by_weights, expected = flat_of(by_weights), {}
    for path, (weight, a, b, out, turned, factor_a, factor_b, magnitude, norm, scale) in chains.items():
        gradient = by_weights[f"{path}.weight"]
        by_magnitude = np.einsum(f"{weight},{weight},{out}->{out}", gradient, turned, 1 / norm)
        expected[f"{path}.adapter.magnitude"] = by_magnitude * (scale != 0).reshape(-1, *[1] * (magnitude.ndim - 1))
        by_turned = np.einsum(f"{weight},{out},l->{weight}", gradient, magnitude / norm, scale)
        expected[f"{path}.adapter.a"] = np.einsum(f"{weight},{b}->{a}", by_turned, factor_b)
        expected[f"{path}.adapter.b"] = np.einsum(f"{weight},{a}->{b}", by_turned, factor_a)
    for sizes in ({"fsdp": 1}, {"fsdp": 2, "tensor": 2}):
        assert_near(gradients_of(make_model("llama", DORA), weights, mesh_of(**sizes)), (loss, expected), 2e-5)


def plain_params(state):
    """Frozen weights as those of a model without adapters."""
    return jax.tree.map(
        lambda leaf: nnx.Param(leaf.get_value(), axes=leaf.get_metadata("axes")),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def drawn_like(rng, path, variable):
    value = np.asarray(variable.get_value())
    if path[-1] == "b":
        return rng.normal(0, 0.05, value.shape).astype(np.float32)
    return (value * rng.uniform(0.8, 1.2, value.shape)).astype(np.float32) if path[-1] == "magnitude" else value


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"targets": ["q_prj", "lm_head"]},
            ["'q_prj' fits nothing", "lm_head is one with the embedding", "q_proj, up_proj"],
        ),
        ({"exclude": ["gate"]}, ["lora.exclude: 'gate' fits nothing"]),
        ({"rank_pattern": {"qproj": 3}, "alpha_pattern": {"x": 1.0}}, ["rank_pattern: 'qproj'", "alpha_pattern: 'x'"]),
        ({"targets": ["q_proj"], "exclude": ["attention"]}, ["no map is left that gets an adapter"]),
        ({"targets": ["(q_proj"]}, ["'(q_proj' is no regular expression"]),
        ({"targets": ["embed_tokens"], "dropout": 0.1, "dora": True}, ["lora.dropout", "lora.dora", "embed_tokens"]),
    ],
    ids=str,
)
def test_what_fits_no_map_is_refused_all_at_once(keys, said):
    with pytest.raises(ConfigError) as error:
        shapes("llama", LoraConfig(rank=2, **keys))
    assert all(text in str(error.value) for text in said), error.value


def test_what_peft_takes_for_experts_has_neither_dropout_nor_magnitudes():
    shared = [f"layers.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    for name in ("gate_proj", "up_proj", "down_proj"):
        targets = ["q_proj", f"shared_expert.{name}"]
        assert f"layers.mlp.shared_expert.{name}" in shapes("hunyuan_v1_moe", LoraConfig(rank=2, targets=targets))
        assert shapes("qwen2_moe", LoraConfig(rank=2, targets=targets, dropout=0.1, dora=True))
        with pytest.raises(ConfigError) as error:
            shapes("hunyuan_v1_moe", LoraConfig(rank=2, targets=targets, dropout=0.1, dora=True))
        for key in ("dropout", "dora"):
            assert f"lora.{key}: not possible on layers.mlp.shared_expert.{name} (" in str(error.value)
    assert shapes("hunyuan_v1_moe", LoraConfig(rank=2, targets=["attention"], dropout=0.1, dora=True))
    decoder = nnx.eval_shape(lambda: make_model("hunyuan_v1_moe")(nnx.Rngs(0)))
    assert without_dropout(decoder, [*shared, "layers.self_attn.q_proj"], family(config_of("hunyuan_v1_moe"))) == shared


def test_targets_are_named_by_us_or_by_files():
    def paths(name, *targets, **keys):
        return sorted(shapes(name, LoraConfig(rank=2, targets=list(targets), **keys)))

    fused = ["layers.self_attn.k_proj", "layers.self_attn.q_proj", "layers.self_attn.v_proj"]
    assert paths("phi3", "qkv_proj") == fused
    assert paths("gpt2", "c_attn") == fused
    assert paths("gpt_neox", "query_key_value") == fused
    assert paths("gpt2", "attn.c_proj") == ["layers.self_attn.o_proj"]
    assert paths("mixtral", "attention") == [*fused[:1], "layers.self_attn.o_proj", *fused[1:]]
    assert paths("mixtral", "mlp") == [f"layers.mlp.experts.{name}_proj" for name in ("down", "gate", "up")]
    assert paths("llama", "all_linear", exclude=["attention"]) == [
        f"layers.mlp.{n}_proj" for n in ("down", "gate", "up")
    ]
    only_last = shapes("llama", LoraConfig(rank=2, targets=[r"layers\.1\.mlp\..*"], alpha_pattern={"up_proj": 9.0}))
    assert {tuple(shape.ranks) for shape in only_last.values()} == {(0, 2)}
    assert only_last["layers.mlp.up_proj"].scales(LoraConfig(rank=2)).tolist() == [0, 4.5]
    rslora = LoraConfig(rank=4, alpha=6.0, rslora=True)
    assert shapes("llama", rslora)["layers.mlp.up_proj"].scales(rslora).tolist() == [3, 3]
