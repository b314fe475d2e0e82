"""What is minimised in place of the loss, against PyTorch in float64: values and gradients, cut in every way."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from placing import place

from jaxsft.batches.loader import Loader
from jaxsft.config import ConfigError, LossConfig, MeshConfig
from jaxsft.config_files import dump_config, load_config
from jaxsft.folders.pretrained import load_weights
from jaxsft.mesh import make_mesh
from jaxsft.model.layers import Logits
from jaxsft.model.noise import noise_scale, noisy, row_keys, token_keys
from jaxsft.setup import Setup
from jaxsft.training import chunks, loss_in_blocks
from jaxsft.training.loss import next_token_objective
from jaxsft.training.metrics import Totals, dump_steps, load_steps, summarise
from jaxsft.training.step import (
    init_state,
    make_eval_step,
    make_train_step,
    put_batch,
    split_microbatches,
    split_rows,
    summed_gradients,
)

torch = pytest.importorskip("torch")

LOSSES = [
    LossConfig(label_smoothing=0.1),
    LossConfig(z_loss=1e-2),
    LossConfig(label_smoothing=0.3, z_loss=1e-3),
    LossConfig(dft=True),
    LossConfig(dft=True, z_loss=1e-2),
]
KINDS = [Logits(40), Logits(33, scale=1.7, soft_cap=5.0)]
"""The second is of a table that is filled up with 7 rows that are no tokens."""


def name_of(loss):
    return "+".join(loss.asked)


def in_pytorch(hidden, unembedding, targets, weights, logits, loss):
    """(objective sum, loss sum) and the gradients of the first by hidden and unembedding, in float64 by autograd."""
    double = functools.partial(torch.tensor, dtype=torch.float64, requires_grad=True)
    hidden, unembedding = (double(np.asarray(each, np.float64)) for each in (hidden, unembedding))
    products = (hidden @ unembedding[: logits.vocab_size].T * logits.scale).reshape(-1, logits.vocab_size)
    if logits.soft_cap is not None:
        products = logits.soft_cap * torch.tanh(products / logits.soft_cap)
    targets = torch.tensor(np.asarray(targets, np.int64)).reshape(-1)
    entropy = functools.partial(torch.nn.functional.cross_entropy, products, targets, reduction="none")
    nll = entropy()
    each = entropy(label_smoothing=loss.label_smoothing)
    if loss.dft:
        each = torch.exp(-nll).detach() * nll  # as TRL's SFTTrainer with loss_type "dft"
    each = each + loss.z_loss * torch.logsumexp(products, dim=-1) ** 2
    weights = torch.tensor(np.asarray(weights, np.float64)).reshape(-1)
    total = (weights * each).sum()
    total.backward()
    return float(total.detach()), float((weights * nll).sum().detach()), (hidden.grad.numpy(), unembedding.grad.numpy())


def make_inputs(logits, rows=8, seq_len=100, width=16, dtype=jnp.float32, seed=0):
    """Row r is trained in about r / 8 of its positions; where nothing is trained, targets are no tokens."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([1.0, 0.3], size=(rows, seq_len)) * (
        rng.random((rows, seq_len)) < np.arange(rows)[:, None] / 8
    )
    targets = np.where(weights > 0, rng.integers(0, logits.vocab_size, (rows, seq_len)), 10**6)
    return (
        jnp.asarray(rng.normal(size=(rows, seq_len, width)), dtype),
        jnp.asarray(rng.normal(size=(40, width)), dtype),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def check(mesh, logits, loss, *, dtype=jnp.float32, tolerance=1e-6):
    hidden, unembedding, targets, weights = make_inputs(logits, dtype=dtype)

    def objective(hidden, unembedding):
        return next_token_objective(hidden, unembedding, targets, weights, logits=logits, loss=loss)

    with jax.set_mesh(mesh):
        (value, sums), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(
            hidden, unembedding
        )
        alone, _ = jax.jit(objective)(hidden, unembedding)
    known = np.where(weights > 0, targets, 0)
    expected, nll, expected_gradients = in_pytorch(hidden, unembedding, known, weights, logits, loss)
    assert abs(expected - nll) > 1e-3 * nll  # the objective is another
    for ours in (value, alone):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(sums.loss_sum, nll, rtol=1e-6)  # and the loss is reported
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected_gradient) < tolerance
    assert not gradients[0][0].any()  # a row without a trained token
    assert not gradients[1][logits.vocab_size :].any()  # rows that are no tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 1)  # the smallest: 128 tokens


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("logits", KINDS, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_values_and_gradients_are_those_of_pytorch(loss, logits):
    check(one_device(), logits, loss)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_in_bfloat16_they_are_but_for_the_rounding_of_matmuls(loss):
    """What goes into a matmul is rounded to 8 bits, its sums are float32."""
    check(one_device(), KINDS[1], loss, dtype=jnp.bfloat16, tolerance=2**-8)


MESHES = [{"fsdp": 2, "tensor": 4}, {"context": 2, "tensor": 2, "data": 2}, {"fsdp": 8}]


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=lambda number: name_of(LOSSES[number]))
@pytest.mark.parametrize("in_blocks", [False, True], ids=["whole", "in blocks"])
def test_meshes_change_nothing(monkeypatch, in_blocks, number):
    if in_blocks:  # of rows that are no divisor of a device's: the last block overlaps the one before
        monkeypatch.setattr(loss_in_blocks, "TABLE_AT_ONCE", 3 * 16)
        assert [loss_in_blocks.block_rows(rows, 16) for rows in (40, 20, 10)] == [3, 2, 1]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1} | MESHES[number % len(MESHES)]))
    check(mesh, KINDS[number % 2], LOSSES[number], tolerance=2e-6)


def test_a_batch_without_a_trained_token_gives_zeros():
    hidden, unembedding, targets, weights = make_inputs(KINDS[1])
    for loss in LOSSES:
        total, gradients = jax.value_and_grad(
            lambda h, loss=loss: next_token_objective(h, unembedding, targets, weights * 0, logits=KINDS[1], loss=loss)[
                0
            ]
        )(hidden)
        assert float(total) == 0 and not gradients.any()


# Through the step: accumulated, packed or not, on meshes.


@pytest.fixture(scope="module")
def run(tiny_config, tiny_data, tmp_path_factory):
    """Config, model, prepared data, and parameters on the host."""
    path = tmp_path_factory.mktemp("few") / "rows.jsonl"
    path.write_text("".join((tiny_data / "train.jsonl").read_text().splitlines(keepends=True)[:16]))
    config = load_config(tiny_config, [f"data.train={path}", "train.batch_size=16", "train.microbatch_size=4"])
    setup = Setup(config)
    params = jax.device_get(load_weights(setup.pretrained, one_device(), seed=0))
    return config, setup.pretrained, setup.prepared(config.data.train), params


def summed(run, loss, mesh, *, packing=True, num_microbatches=1, noise_seed=None):
    config, pretrained, data, params = run
    loader = Loader(data, seq_len=128, batch_size=16, seed=0, packing=packing)
    batch = loader.batch(0)
    assert packing == bool((batch.segment_ids > 1).any()) and loader.num_rows <= 16

    def compute(params, batch):
        microbatches, noise = split_microbatches(batch, num_microbatches), None
        if noise_seed is not None:
            noise = split_rows(row_keys(noise_seed, jnp.int32(3), len(batch.tokens)), num_microbatches, "w")
        keys = {"optim": config.optim, "loss": loss, "noise": noise}
        return summed_gradients(pretrained.model.graphdef, params, nnx.State({}), microbatches, **keys)

    with jax.set_mesh(mesh):
        placed = put_batch(lambda rows: jax.tree.map(lambda x: x[rows], batch), batch.tokens.shape, mesh)
        return batch, jax.device_get(jax.jit(compute)(place(params, mesh), placed))


def by_all_logits(run, loss, batch):
    """The sum that is minimised and its gradients, of logits [B, T, V] by the formulas of optax, in float32."""
    _, pretrained, _, params = run
    size = pretrained.decoder_config.vocab_size

    def objective(params):
        decoder = nnx.merge(pretrained.model.graphdef, params, nnx.State({}))
        logits = decoder.logits(decoder(batch.tokens, batch.segment_ids, batch.positions).hidden)[..., :size]
        labels = jax.nn.one_hot(batch.targets, size)
        each = optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, loss.label_smoothing))
        if loss.dft:
            each *= jax.lax.stop_gradient(jnp.sum(labels * jax.nn.softmax(logits), axis=-1))
        each += loss.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(batch.loss_weights * each)

    return jax.jit(jax.value_and_grad(objective))(params)


@pytest.mark.parametrize("loss", [LOSSES[2], LOSSES[4]], ids=name_of)
def test_a_step_sums_what_all_logits_at_once_give_however_it_is_cut(run, loss):
    batch, whole = summed(run, loss, one_device())
    expected, expected_gradients = by_all_logits(run, loss, batch)
    _, single = summed(run, loss, one_device(), packing=False, num_microbatches=4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, meshed = summed(run, loss, mesh, num_microbatches=2)
    for ours in (whole, single, meshed):
        np.testing.assert_allclose(ours.objective, expected, rtol=1e-5)
        np.testing.assert_allclose(ours.loss, whole.loss, rtol=1e-5)
        leaves = zip(jax.tree.leaves(ours.gradients), jax.tree.leaves(expected_gradients), strict=True)
        assert max(relative_error(*pair) for pair in leaves) < 1e-5


def test_lines_report_the_loss_and_held_out_rows_know_nothing_else(run):
    """With a learning rate of nothing to speak of: what is reported is of the same parameters."""
    config, pretrained, data, params = run
    mesh, frozen = one_device(), nnx.State({})
    batch, plain = summed(run, LossConfig(), mesh)
    assert plain.objective is None
    step = make_train_step(pretrained.model, config.optim, num_steps=12, num_microbatches=1, mesh=mesh, loss=LOSSES[2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch)
        sums = make_eval_step(pretrained.model, mesh)(place(params, mesh), placed)
        _, metrics = step(init_state(place(params, mesh), config.optim, mesh), frozen, placed)
    np.testing.assert_allclose(sums, plain.loss, rtol=1e-6)
    line, _ = summarise(load_steps(dump_steps([jax.device_get(metrics)])), Totals(), batch_positions=batch.tokens.size)
    assert line["loss"] == pytest.approx(float(plain.loss.loss_sum / plain.loss.weight_sum), rel=1e-6)
    assert line["objective"] == pytest.approx(float(metrics.objective / plain.loss.weight_sum), rel=1e-6)
    assert line["objective"] != pytest.approx(line["loss"], rel=1e-3)


# Noise on embeddings.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_noise_is_that_of_transformers_on_a_row_of_the_segments_length(dtype):
    """A row of segments of 100 and 28 tokens and 72 of padding, against a row of each length."""
    hook = pytest.importorskip("transformers.integrations.neftune").neftune_post_forward_hook
    lengths, alpha, width = (100, 28), 5.0, 256
    segments = np.concatenate([np.repeat([1, 2], lengths), np.zeros(72, int)])[None].repeat(4, 0)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(72, int)])[None].repeat(4, 0)
    scale = noise_scale(jnp.asarray(segments), jnp.asarray(positions), alpha=alpha, width=width)
    keys = token_keys(row_keys(0, jnp.int32(0), 4), segments.shape[1])
    noise = np.asarray(noisy(jnp.zeros((*segments.shape, width), dtype), keys, scale), np.float64)
    assert not noise[segments == 0].any()
    for segment, length in enumerate(lengths, start=1):
        module = torch.nn.Module()
        module.neftune_noise_alpha = alpha
        torch.manual_seed(0)
        theirs = (
            hook(module, None, torch.zeros(4, length, width, dtype=getattr(torch, dtype.__name__))).double().numpy()
        )
        ours, bound = noise[segments == segment], alpha / math.sqrt(length * width)
        assert np.abs(ours).max() <= bound * (1 + 2**-8) and np.abs(theirs).max() <= bound * (1 + 2**-8)
        assert np.abs(ours).max() > 0.999 * bound * (1 - 2**-8)
        assert ours.std() == pytest.approx(theirs.std(), rel=0.02) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(ours.mean()) < 0.02 * bound
    assert len(np.unique(noise[:, 0, 0])) == 4  # each row has its own
    assert len(np.unique(np.round(noise[0, :100, 0] / np.asarray(scale)[0, 0], 5))) > 90  # and each token


def test_noise_is_the_same_however_a_step_is_cut(run):
    """Rows in microbatches and over devices, positions over `context`, where they change their order."""
    loss = LossConfig(neftune_alpha=10.0)
    _, ours = summed(run, loss, one_device(), noise_seed=7)
    _, plain = summed(run, LossConfig(), one_device())
    _, other = summed(run, loss, one_device(), noise_seed=8)
    assert ours.objective is None  # with noise, it is the loss that is minimised
    for another in (plain, other):
        assert abs(another.loss.loss_sum / ours.loss.loss_sum - 1) > 1e-4
    for mesh, num_microbatches in (
        (one_device(), 4),
        (make_mesh(MeshConfig(data=2, context=2, tensor=2)), 2),
    ):
        _, cut = summed(run, loss, mesh, num_microbatches=num_microbatches, noise_seed=7)
        np.testing.assert_allclose(cut.loss, ours.loss, rtol=1e-5)
        leaves = zip(jax.tree.leaves(cut.gradients), jax.tree.leaves(ours.gradients), strict=True)
        assert max(relative_error(*pair) for pair in leaves) < 1e-5


def test_keys_that_exclude_each_other_or_are_no_shares_are_refused_by_name(tiny_config):
    with pytest.raises(ConfigError, match="`dft` with `label_smoothing`"):
        load_config(tiny_config, ["loss.dft=true", "loss.label_smoothing=0.1"])
    for key in ("label_smoothing=1.0", "z_loss=-0.1", "neftune_alpha=-5"):
        with pytest.raises(ConfigError, match=f"loss.{key.split('=')[0]}"):
            load_config(tiny_config, [f"loss.{key}"])
    config = load_config(tiny_config, ["loss.dft=true", "loss.z_loss=1e-4"])
    assert "dft: true" in dump_config(config)
    assert math.isclose(config.loss.z_loss, 1e-4) and not config.loss.is_plain
    assert LossConfig(neftune_alpha=5.0).is_plain
