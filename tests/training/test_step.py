"""The step: the same loss and gradients however the batch is cut, and nothing changed by what is not finite."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from flax import nnx
from placing import place

from jaxsft.batch import Batch
from jaxsft.batches.loader import Loader
from jaxsft.config import ConfigError, MeshConfig
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import load_weights, open_model, open_tokenizer
from jaxsft.mesh import batch_sharding, make_mesh
from jaxsft.model.abstract import abstract_model
from jaxsft.model.architecture import LayerKind
from jaxsft.model.decoder import Decoder
from jaxsft.setup import Setup
from jaxsft.training.metrics import Totals, summarise
from jaxsft.training.program import read_program
from jaxsft.training.step import (
    abstract_state,
    attention_pairs,
    forward_loss,
    init_state,
    make_eval_step,
    make_train_step,
    put_batch,
    split_microbatches,
    summed_gradients,
)

FROZEN = nnx.State({})


@pytest.fixture(scope="module")
def run(tiny_config):
    """Config, model and prepared data."""
    config = load_config(tiny_config)
    setup = Setup(config)
    return config, setup.pretrained, setup.prepared(config.data.train)


@pytest.fixture(scope="module")
def few(tiny_config, tiny_data, tmp_path_factory):
    """Fewer conversations, prepared."""
    path = tmp_path_factory.mktemp("few") / "rows.jsonl"
    path.write_text("".join((tiny_data / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    config = load_config(tiny_config, [f"data.train={path}"])
    return Setup(config).prepared(config.data.train)


def make_loader(run, **keys):
    config, _, data = run
    return Loader(data, **{"seq_len": 128, "batch_size": 8, "seed": 0, "packing": True} | keys)


def mesh_of(num_devices=8, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


DRAWN = {}
"""Folder of a model -> its parameters, on the host."""


def params_on(mesh, run):
    """The seed's parameters, drawn once on one device."""
    config, pretrained, _ = run
    if config.model.path not in DRAWN:
        DRAWN[config.model.path] = jax.device_get(load_weights(pretrained, mesh_of(1), seed=config.seed))
    return place(DRAWN[config.model.path], mesh)


def gradients_of(run, batches, mesh, *, num_microbatches=1):
    """Loss and gradients of all batches together, as one host tree, from the seed's parameters."""
    config, pretrained, _ = run
    params = params_on(mesh, run)

    @jax.jit
    def compute(params, batch):
        microbatches = split_microbatches(batch, num_microbatches)
        return summed_gradients(pretrained.model.graphdef, params, FROZEN, microbatches, optim=config.optim)

    total = None
    with jax.set_mesh(mesh):
        for batch in batches:
            part = compute(params, put_batch(lambda r, b=batch: jax.tree.map(lambda x: x[r], b), batch[0].shape, mesh))
            part = jax.device_get(part)
            total = part if total is None else jax.tree.map(np.add, total, part)
    loss = float(total.loss.loss_sum / total.loss.weight_sum)
    return loss, jax.tree.map(lambda g: g / total.loss.weight_sum, total.gradients), total.router


def assert_equal(ours, expected, *, tolerance=1e-5):
    np.testing.assert_allclose(ours[0], expected[0], rtol=tolerance)
    for sums, expected_sums in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(sums, expected_sums, rtol=tolerance)
    for path, gradient in jax.tree_util.tree_flatten_with_path(ours[1])[0]:
        other = functools.reduce(lambda tree, key: tree[key.key] if hasattr(key, "key") else tree, path, expected[1])
        other = other.get_value() if isinstance(other, nnx.Variable) else other
        scale = np.linalg.norm(other)
        assert scale > 0, f"{path}: no gradient"
        assert np.linalg.norm(gradient - other) < tolerance * scale, f"{path}"


@pytest.fixture(scope="module")
def on_one_device(run):
    return gradients_of(run, [make_loader(run).batch(0)], mesh_of(1))


MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4 x fsdp 2": {"tensor": 4, "fsdp": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context 2 x fsdp 4": {"context": 2, "fsdp": 4},
    "context 4 x tensor 2": {"context": 4, "tensor": 2},
    "context 8": {"context": 8},
    "expert 2 x data 4": {"expert": 2, "data": 4},
}


@pytest.mark.parametrize("name", ["fsdp 8", "data 2 x fsdp 2 x tensor 2", "context 4 x tensor 2", "expert 2 x data 4"])
def test_the_seed_draws_the_same_parameters_on_every_mesh(mixture, name):
    config, pretrained, _ = mixture
    mesh = mesh_of(**MESHES[name])
    drawn, expected = load_weights(pretrained, mesh, seed=config.seed), params_on(mesh, mixture)
    for ours, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(expected), strict=True):
        assert ours.sharding == other.sharding
        np.testing.assert_allclose(ours, other, rtol=1e-6)


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_are_equal_on_every_mesh(run, on_one_device, name):
    mesh = mesh_of(**MESHES[name])
    assert_equal(gradients_of(run, [make_loader(run).batch(0)], mesh), on_one_device)


@pytest.mark.parametrize("num_microbatches", [2, 4])
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2}, {"data": 2}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
def test_loss_and_gradients_are_equal_for_every_accumulation(run, on_one_device, num_microbatches, sizes):
    mesh = mesh_of(math.prod(sizes.values()), **sizes)
    batch = make_loader(run).batch(0)
    assert_equal(gradients_of(run, [batch], mesh, num_microbatches=num_microbatches), on_one_device)


def test_loss_and_gradients_are_equal_by_the_kernels_of_tpus(tiny_config, run, on_one_device):
    """Interpreted, under what sums up the gradients of copies once a step, with rows that are cut."""
    config = load_config(tiny_config, ["model.attention=splash"])
    by_splash = config, Setup(config).pretrained, run[2]
    mesh = mesh_of(data=2, context=2, tensor=2)
    assert_equal(gradients_of(by_splash, [make_loader(run).batch(0)], mesh, num_microbatches=2), on_one_device)


@pytest.mark.parametrize("model", ["run", "mixture"])
def test_what_is_of_all_copies_is_summed_up_once_a_step(request, model):
    """Over `data`, by the compiled program: nothing within the loops over microbatches and layers."""
    config, pretrained, _ = request.getfixturevalue(model)
    mesh, num_microbatches = mesh_of(data=2, fsdp=2, tensor=2), 4
    step = make_train_step(pretrained.model, config.optim, num_steps=12, num_microbatches=num_microbatches, mesh=mesh)
    rows = jax.ShapeDtypeStruct((16, 128), jnp.int32, sharding=batch_sharding(mesh))
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32, sharding=rows.sharding), rows, rows)
    with jax.set_mesh(mesh):
        lowered = step.lower(abstract_state(pretrained.model.params, config.optim, mesh), FROZEN, batch)
        report = read_program(lowered.compile(TO_READ).as_text(), mesh.shape)
    assert {each.times for each in report.collectives} >= {1, num_microbatches}
    over_copies = [each for each in report.collectives if "data" in each.axes]
    assert {each.times for each in over_copies} == {1}
    gradients = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for leaf in jax.tree.leaves(abstract_state(pretrained.model.params, config.optim, mesh).params)
    )
    assert gradients <= sum(each.num_bytes for each in over_copies) < 1.01 * gradients + 4096


def test_loss_and_gradients_are_equal_packed_or_one_example_per_row(run, few):
    run = *run[:2], few
    packed, single = make_loader(run), make_loader(run, packing=False, batch_size=20)
    assert packed.num_rows < single.num_rows == 40
    ours = gradients_of(run, [packed.batch(step) for step in range(packed.steps_per_epoch)], mesh_of(1))
    expected = gradients_of(run, [single.batch(step) for step in range(2)], mesh_of(1))
    assert_equal(ours, expected)


def test_padding_changes_nothing(run, on_one_device):
    """The same rows, in rows of twice the length."""
    batch = make_loader(run).batch(0)
    longer = Batch(*(np.pad(leaf, ((0, 4), (0, 128))) for leaf in batch))
    assert_equal(gradients_of(run, [longer], mesh_of(1)), on_one_device)


@pytest.mark.parametrize("segment", [1, 2])
def test_no_segment_sees_another(run, segment):
    """Changing the tokens of one segment leaves the loss of all others, before and after it, as it was to the bit."""
    _, pretrained, _ = run
    params = params_on(mesh_of(1), run)
    batch = make_loader(run).batch(0)
    of_one = batch.segment_ids == segment
    assert of_one.any() and (batch.segment_ids > 1).any()
    others = batch._replace(loss_weights=np.where(of_one, 0, batch.loss_weights))
    changed = others._replace(tokens=np.where(of_one, (batch.tokens + 1) % 90, batch.tokens))
    loss = jax.jit(lambda *inputs: forward_loss(pretrained.model.graphdef, *inputs)[0])
    before, after = loss(params, others), loss(params, changed)
    assert float(before.loss_sum) == float(after.loss_sum) > 0
    swapped = loss(params, batch._replace(tokens=changed.tokens))
    assert float(swapped.loss_sum) != float(loss(params, batch).loss_sum)  # so the change does change its own


# Mixtures of experts: the routers' losses are of the whole batch too.


@pytest.fixture(scope="module")
def mixture(run, tiny_model, tmp_path_factory):
    """A small mixtral on the same data, with losses of its routers large enough to matter."""
    config, _, data = run
    folder = tmp_path_factory.mktemp("mixture")
    for file in tiny_model.iterdir():
        shutil.copy(file, folder)
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    tiny = json.loads((tiny_model / "config.json").read_text())
    mixtral = {"model_type": "mixtral", "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral |= {key: tiny[key] for key in keys} | {"initializer_range": 0.3, "architectures": ["MixtralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(mixtral))
    model = config.model.model_copy(update={"path": str(folder), "tokenizer": None})
    optim = config.optim.model_copy(update={"router_balance": 0.5, "router_z": 0.1})
    config = config.model_copy(update={"model": model, "optim": optim})
    return config, open_model(model, open_tokenizer(model)), data


@pytest.fixture(scope="module")
def mixture_on_one_device(mixture):
    return gradients_of(mixture, [make_loader(mixture).batch(0)], mesh_of(1))


def test_the_losses_of_routers_are_added_as_they_are_written(mixture, mixture_on_one_device):
    """loss + 0.5 * balance + 0.1 * z of the batch as a whole, differentiated at once."""
    config, pretrained, _ = mixture
    batch = make_loader(mixture).batch(0)
    num_tokens = (batch.segment_ids > 0).sum()
    assert num_tokens < batch.tokens.size and (batch.segment_ids > 1).any()

    def objective(params, batch):
        sums, router = forward_loss(pretrained.model.graphdef, params, batch)
        layers = [
            4 * jnp.sum(router.counts[layer] / num_tokens * router.probabilities[layer] / num_tokens)
            for layer in range(2)
        ]
        z = (router.z[0] + router.z[1]) / (2 * num_tokens)
        return sums.loss_sum / sums.weight_sum + 0.5 * (layers[0] + layers[1]) / 2 + 0.1 * z

    params = params_on(mesh_of(1), mixture)
    loss, _, router = mixture_on_one_device
    assert_equal(mixture_on_one_device, (loss, jax.device_get(jax.jit(jax.grad(objective))(params, batch)), router))
    np.testing.assert_array_equal(router.counts.sum(axis=-1), 2 * num_tokens)
    without = config.model_copy(update={"optim": config.optim.model_copy(update={"router_balance": 0, "router_z": 0})})
    _, gradients, _ = gradients_of((without, *mixture[1:]), [batch], mesh_of(1))
    routers = [tree["layers"]["mlp"]["router"]["weight"].get_value() for tree in (mixture_on_one_device[1], gradients)]
    assert np.linalg.norm(routers[0] - routers[1]) > 0.1 * np.linalg.norm(routers[1])  # so they do matter here


@pytest.mark.parametrize("num_microbatches", [2, 4])
@pytest.mark.parametrize("sizes", [{}, {"expert": 2}, {"data": 2, "context": 2}], ids=str)
def test_the_losses_of_routers_are_equal_for_every_accumulation(
    mixture, mixture_on_one_device, num_microbatches, sizes
):
    mesh = mesh_of(math.prod(sizes.values()), **sizes)
    batch = make_loader(mixture).batch(0)
    assert_equal(gradients_of(mixture, [batch], mesh, num_microbatches=num_microbatches), mixture_on_one_device)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_a_mixture_may_be_computed_again_in_the_backward_pass(mixture, mixture_on_one_device, remat):
    config, _, data = mixture
    model = config.model.model_copy(update={"remat": remat})
    again = config.model_copy(update={"model": model}), open_model(model, open_tokenizer(model)), data
    mesh = mesh_of(4, expert=2, fsdp=2)
    assert_equal(gradients_of(again, [make_loader(again).batch(0)], mesh), mixture_on_one_device)


def test_losses_of_routers_are_refused_where_there_are_no_routers(run):
    config = run[0].model_copy(update={"optim": run[0].optim.model_copy(update={"router_z": 0.1})})
    with pytest.raises(ConfigError, match="optim.router_z: no effect on .* no mixture of experts"):
        Setup(config).check_fit()


MIXTURE_MESHES = [
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "expert": 4},
    {"context": 2, "expert": 2, "fsdp": 2},
    {"context": 4, "expert": 2},
]


@pytest.mark.parametrize("sizes", MIXTURE_MESHES, ids=str)
def test_the_losses_of_routers_are_equal_on_every_mesh(mixture, mixture_on_one_device, sizes):
    batch = make_loader(mixture).batch(0)
    assert_equal(gradients_of(mixture, [batch], mesh_of(**sizes)), mixture_on_one_device)


def test_the_losses_of_routers_are_equal_packed_or_one_example_per_row_and_padded(mixture, few):
    mixture = *mixture[:2], few
    num_rows = make_loader(mixture).num_rows
    packed = make_loader(mixture, batch_size=num_rows).batch(0)
    single = make_loader(mixture, packing=False, batch_size=40).batch(0)
    expected = gradients_of(mixture, [single], mesh_of(1))
    assert_equal(gradients_of(mixture, [packed], mesh_of(1)), expected)
    padded = Batch(*(np.pad(leaf, ((0, -num_rows % 4 + 4), (0, 64))) for leaf in packed))
    assert_equal(gradients_of(mixture, [padded], mesh_of(1), num_microbatches=4), expected)


def test_a_mixture_compiles_its_step_once_and_reports_its_routers(mixture):
    mesh = mesh_of(expert=2, fsdp=2, tensor=2)
    state, step = make_step(mixture, mesh, num_microbatches=2)
    loader, steps = make_loader(mixture), []
    with jax.set_mesh(mesh):
        for index in range(2):
            batch = put_batch(functools.partial(loader.batch, index), loader.shape, mesh)
            state, metrics = step(state, FROZEN, batch)
            steps.append(jax.device_get(metrics))
    assert step.program._cache_size() == 1
    line, _ = summarise(steps, Totals(), batch_positions=loader.shape[0] * loader.shape[1])
    assert 1.9 < line["router_balance"] < 4 and line["router_z"] > 0 and 1 < line["router_max_share"] < 2
    expert = state.params["layers"]["mlp"]["experts"]["up_proj"]["weight"].get_value()
    assert expert.shape == (2, 4, 32, 16) and expert.addressable_shards[0].data.shape == (2, 2, 16, 8)
    query = state.params["layers"]["self_attn"]["q_proj"]["weight"].get_value()
    assert query.addressable_shards[0].data.size == query.size // 8  # its width over experts too


def make_step(run, mesh, *, num_microbatches=1, **optim):
    config, pretrained, _ = run
    section = config.optim.model_copy(update=optim)
    state = init_state(params_on(mesh, run), section, mesh)
    step = make_train_step(pretrained.model, section, num_steps=12, num_microbatches=num_microbatches, mesh=mesh)
    return state, step


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_run_compiles_its_step_once(run, sizes):
    mesh = mesh_of(**sizes)
    state, step = make_step(run, mesh)
    loader = make_loader(run)
    with jax.set_mesh(mesh):
        for index in range(3):
            state, _ = step(state, FROZEN, put_batch(functools.partial(loader.batch, index), loader.shape, mesh))
    assert step.program._cache_size() == 1
    _, pretrained, _ = run
    eval_step = make_eval_step(pretrained.model, mesh)
    with jax.set_mesh(mesh):
        for index in range(2):
            eval_step(state.params, put_batch(functools.partial(loader.batch, index), loader.shape, mesh))
    assert eval_step._cache_size() == 1


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"context": 4, "fsdp": 2}], ids=str)
def test_evaluation_gives_the_same_sums_on_every_mesh(run, sizes):
    _, pretrained, _ = run
    batch, sums = make_loader(run).batch(0), []
    for mesh in (mesh_of(1), mesh_of(**sizes)):
        params, step = params_on(mesh, run), make_eval_step(pretrained.model, mesh)
        with jax.set_mesh(mesh):
            placed = put_batch(lambda rows: jax.tree.map(lambda leaf: leaf[rows], batch), batch.tokens.shape, mesh)
            sums.append(jax.device_get(step(params, placed)))
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)


def test_parameters_and_moments_are_cut_by_the_table(run):
    mesh = mesh_of(fsdp=2, tensor=4)
    state, step = make_step(run, mesh)
    loader = make_loader(run)
    with jax.set_mesh(mesh):
        state, _ = step(state, FROZEN, put_batch(functools.partial(loader.batch, 0), loader.shape, mesh))
    moments = state.opt_state[0]
    for tree in (state.params, moments.mu, moments.nu):
        shares = {
            name: tree["layers"]["self_attn"][name]["weight"].get_value().addressable_shards[0].data.shape
            for name in ("q_proj", "k_proj", "o_proj")
        }
        # q "l d n h" [2, 32, 8, 4], k "l d k h" [2, 32, 4, 4], o "l n h d" [2, 8, 4, 32]; d over fsdp 2, heads over 4
        assert shares == {"q_proj": (2, 16, 2, 4), "k_proj": (2, 16, 1, 4), "o_proj": (2, 2, 4, 16)}
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
    assert held < 0.14 * whole  # an eighth, and the norms that only fsdp cuts


def test_a_loss_that_is_not_finite_leaves_the_state_and_is_counted(run):
    mesh = mesh_of(1)
    state, step = make_step(run, mesh)
    loader = make_loader(run)
    good = loader.batch(0)
    bad = good._replace(loss_weights=np.where(good.loss_weights > 0, np.inf, 0).astype(np.float32))
    with jax.set_mesh(mesh):
        state, metrics = step(state, FROZEN, put_batch(lambda r: good, loader.shape, mesh))
        assert float(metrics.skipped) == 0
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = step(state, FROZEN, put_batch(lambda r: bad, loader.shape, mesh))
        assert float(metrics.skipped) == 1
        assert int(state.step) == 2  # the data goes on
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
        state, metrics = step(state, FROZEN, put_batch(lambda r: good, loader.shape, mesh))
    assert float(metrics.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_beside_the_state_a_step_holds_its_gradients_once_and_no_copies_of_weights_or_moments(run, remat):
    """Of a model whose weights are much larger than its activations and its vocabulary."""
    config, pretrained, _ = run
    sizes = dict(hidden_size=256, intermediate_size=2048, layers=(LayerKind(),) * 4)
    wide = dataclasses.replace(pretrained.decoder_config, **sizes)
    options = dict(compute_dtype="float32", param_dtype="float32", remat=remat)
    model, mesh = abstract_model(lambda rngs: Decoder(wide, **options, rngs=rngs)), mesh_of(1)
    rows = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows, rows)
    with jax.set_mesh(mesh):
        step = make_train_step(model, config.optim, num_steps=12, num_microbatches=1, mesh=mesh)
        lowered = step.lower(abstract_state(model.params, config.optim, mesh), FROZEN, batch)
        memory = lowered.compile(TO_READ).memory_analysis()
    of_params = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.params))
    assert memory.alias_size_in_bytes > 3 * of_params  # parameters and moments are written where they lie
    assert memory.temp_size_in_bytes < 1.5 * of_params


def test_a_batch_without_trained_tokens_only_decays(run):
    mesh = mesh_of(1)
    state, step = make_step(run, mesh, weight_decay=0.0)
    loader = make_loader(run)
    empty = loader.batch(0)._replace(loss_weights=np.zeros(loader.shape, np.float32))
    before = jax.device_get(state.params)
    with jax.set_mesh(mesh):
        state, metrics = step(state, FROZEN, put_batch(lambda r: empty, loader.shape, mesh))
    assert float(metrics.skipped) == 0
    assert float(metrics.grad_norm) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_clipping_bounds_the_norm_and_reports_it_as_it_was(run):
    mesh = mesh_of(1)
    loader = make_loader(run)
    moments = {}
    for clip_norm in (None, 1e-3):
        state, step = make_step(run, mesh, clip_norm=clip_norm)
        with jax.set_mesh(mesh):
            state, metrics = step(state, FROZEN, put_batch(functools.partial(loader.batch, 0), loader.shape, mesh))
        norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state[0].mu))]
        moments[clip_norm] = float(metrics.grad_norm), np.linalg.norm(norms) / 0.1  # mu = (1 - beta1) g
    np.testing.assert_allclose(moments[None][0], moments[None][1], rtol=1e-5)
    np.testing.assert_allclose(moments[1e-3], (moments[None][0], 1e-3), rtol=1e-5)


def test_a_window_bounds_the_pairs_that_are_counted(run):
    """Segments of 4 and 2 tokens and padding; two layers, the second sees 3 keys at most."""
    config = run[1].decoder_config
    rows = Batch(*[np.array([[0, 1, 2, 3, 0, 1, 0, 1]])] * 5)
    batch = rows._replace(segment_ids=np.array([[1, 1, 1, 1, 2, 2, 0, 0]]))
    assert attention_pairs(batch, config) == 2 * ((1 + 2 + 3 + 4) + (1 + 2))
    windowed = dataclasses.replace(config, layers=(LayerKind(), LayerKind(window=3)))
    assert attention_pairs(batch, windowed) == (10 + 3) + ((1 + 2 + 3 + 3) + 3)


def test_microbatches_take_their_rows_in_turn():
    batch = Batch(*(np.arange(6)[:, None] * np.ones((1, 2), np.int32),) * 5)
    assert split_microbatches(batch, 3).tokens[:, :, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
