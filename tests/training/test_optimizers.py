"""Every optimizer against its formula in float64, layer by layer as papers write them, and against public ones."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import _muon

from jaxsft.config import KEYS_OF, ConfigError, GroupConfig, OptimConfig
from jaxsft.training.optim import OPTIMIZERS, make_optimizer
from jaxsft.training.optimizers import eight_bit
from jaxsft.training.optimizers.muon import orthogonalised
from jaxsft.training.optimizers.optimizer import Given
from jaxsft.training.optimizers.params import by_path, check_groups
from jaxsft.training.optimizers.schedule_free import averaged
from jaxsft.training.rounding import round_at_random, step_key

# Path -> axes, shape, and the shape of one layer's (and expert's) weight: a matrix inputs x outputs, or a vector.
PARAMS = {
    "embed_tokens.weight": ("v d", (12, 8), (12, 8)),
    "layers.q_proj.weight": ("l d n h", (2, 8, 2, 4), (8, 8)),
    "layers.q_proj.bias": ("l n h", (2, 2, 4), (8,)),
    "layers.q_norm.weight": ("l n h", (2, 2, 4), (8,)),
    "layers.o_proj.weight": ("l n h d", (2, 2, 4, 6), (8, 6)),
    "layers.up_proj.weight": ("l d f", (2, 40, 120), (40, 120)),
    "layers.experts.weight": ("l e d f", (2, 3, 6, 4), (6, 4)),
    "layers.router.weight": ("l d e", (2, 8, 3), (8, 3)),
    "norm.weight": ("d", (8,), (8,)),
}
NOT_DECAYED = ("layers.q_proj.bias", "layers.q_norm.weight", "norm.weight")
MUONS = ("layers.q_proj.weight", "layers.o_proj.weight", "layers.up_proj.weight", "layers.experts.weight")
WHOLE = (*NOT_DECAYED, "layers.router.weight")
"""Of which adafactor keeps the whole second moment."""
CODED = ("layers.up_proj.weight",)
NUM_STEPS = 50


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: scale * rng.normal(size=shape) for path, (_, shape, _) in PARAMS.items()}


def as_state(values, dtype=jnp.float32):
    tree = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        inner = functools.reduce(lambda at, name: at.setdefault(name, {}), parents, tree)
        inner[leaf] = nnx.Param(jnp.asarray(value, dtype), axes=PARAMS[path][0])
    return nnx.State(tree)


def rates(num_steps=NUM_STEPS):
    """A warm-up, and then ups and downs."""
    return [0.01 * min(1, (step + 1) / 5) * (1 - 0.1 * (step % 3)) for step in range(num_steps)]


def gradients(num_steps=NUM_STEPS):
    """float32; some rows of the embedding are not seen at every step."""
    found = [drawn(100 + step, 0.1) for step in range(num_steps)]
    for step, each in enumerate(found):
        each["embed_tokens.weight"][step % 12] = 0
    return [{path: value.astype(np.float32) for path, value in each.items()} for each in found]


def train(config, params, all_gradients, seed=0, at=None):
    """The parameters and the state after some steps, by our optimizer."""
    optimizer = make_optimizer(config)

    @jax.jit
    def step(params, state, gradients, rate, number):
        # Twice the gradients times a half: what a step gives is a sum and a factor.
        given = Given(jax.tree.map(lambda g: 2 * g, gradients), jnp.float32(0.5), rate, step_key(seed, number))
        return optimizer.move(given, state, params), optimizer.advance(given, state, params)

    state = jax.jit(optimizer.init)(params)
    for number, (gradient, rate) in enumerate(zip(all_gradients, at or rates(), strict=False)):
        params, state = step(params, state, as_state(gradient), jnp.float32(rate), number)
    return params, state


def host(params):
    return {path: np.asarray(leaf.get_value(), np.float64) for path, leaf in by_path(params).items()}


# The formulas, of one layer's weight in float64: (weight, gradient, state, step from 1, rate, decay) -> weight.


def adam_direction(g, kept, t, *, beta1=0.9, beta2=0.999, eps=1e-8):
    kept["m"] = beta1 * kept.get("m", 0) + (1 - beta1) * g
    kept["v"] = beta2 * kept.get("v", 0) + (1 - beta2) * g**2
    return kept["m"] / (1 - beta1**t) / (np.sqrt(kept["v"] / (1 - beta2**t)) + eps)


def adamw(path, w, g, kept, t, rate, decay):
    return w - rate * (adam_direction(g, kept, t) + decay * w)


def lion(path, w, g, kept, t, rate, decay):
    m = kept.get("m", 0)
    kept["m"] = 0.99 * m + 0.01 * g
    return w - rate * (np.sign(0.9 * m + 0.1 * g) + decay * w)


def sgd(path, w, g, kept, t, rate, decay):
    kept["m"] = 0.9 * kept.get("m", 0) + g
    return w - rate * (kept["m"] + decay * w)


def adafactor(path, w, g, kept, t, rate, decay):
    beta, square = 1 - t**-0.8, g**2 + 1e-30
    if path in WHOLE:
        v = kept["v"] = beta * kept.get("v", 0) + (1 - beta) * square
    else:
        kept["r"] = beta * kept.get("r", 0) + (1 - beta) * square.mean(axis=1)
        kept["c"] = beta * kept.get("c", 0) + (1 - beta) * square.mean(axis=0)
        v = np.outer(kept["r"], kept["c"]) / kept["r"].mean()
    u = g / np.sqrt(v)
    return w - rate * (u / max(1, np.sqrt((u**2).mean())) + decay * w)


def newton_schulz(x):
    turned = x.shape[0] > x.shape[1]
    x = (x.T if turned else x) / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def muon(path, w, g, kept, t, rate, decay):
    if path not in MUONS:
        return adamw(path, w, g, kept, t, rate, decay)
    m = kept["m"] = 0.95 * kept.get("m", 0) + 0.05 * g
    u = 0.2 * math.sqrt(max(w.shape)) * newton_schulz(0.95 * m + 0.05 * g)
    return w - rate * (u + decay * w)


def schedule_free_adamw(path, y, g, kept, t, rate, decay):
    """As in the paper, with x, y and z; returns y."""
    if t == 1:
        kept |= {"x": y, "z": y, "largest": 0, "weights": 0}
    kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * g**2
    kept["z"] = kept["z"] - rate * (g / (np.sqrt(kept["v"] / (1 - 0.999**t)) + 1e-8) + decay * y)
    kept["largest"] = max(kept["largest"], rate)
    kept["weights"] += kept["largest"] ** 2
    c = kept["largest"] ** 2 / kept["weights"]
    kept["x"] = (1 - c) * kept["x"] + c * kept["z"]
    return 0.1 * kept["z"] + 0.9 * kept["x"]


def from_rounded_y(path, y, g, kept, t, rate, decay):
    """Where y is rounded, x is what y and z say it is."""
    if t > 1:
        kept["x"] = (y - 0.1 * kept["z"]) / 0.9
    return schedule_free_adamw(path, y, g, kept, t, rate, decay)


def table(num_segments):
    values = [0.0]
    for n in range(2, 2**num_segments + 1):
        j = int(math.log2(n))
        values.append(10.0 ** (j - num_segments) * (9 * n / 2**j - 8))
    return np.array(values)


def coded(x, num_segments, block, at_least=0):
    """Each number as the nearest of the table times the largest of its block; of one layer [inputs, outputs]."""
    blocks, values = x.reshape(x.shape[0], -1, block), table(num_segments)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    codes = np.abs(values - (np.abs(blocks) / largest)[..., None]).argmin(axis=-1)
    return (np.sign(blocks) * values[np.maximum(codes, at_least)] * largest).reshape(x.shape)


def adamw8bit(path, w, g, kept, t, rate, decay):
    new = adamw(path, w, g, kept, t, rate, decay)
    if path in CODED:
        kept["m"] = coded(kept["m"], 7, 120)
        kept["v"] = coded(np.sqrt(kept["v"]), 8, 120, at_least=1) ** 2
    return new


FORMULAS = {
    "adamw": adamw, "adamw8bit": adamw8bit, "adafactor": adafactor, "lion": lion, "muon": muon, "sgd": sgd,
    "schedule_free_adamw": schedule_free_adamw,
}  # fmt: skip


def by_formula(formula, values, all_gradients, dtype, decay=0.1):
    """The same in float64, one layer and expert after the other; the weight is rounded after each step."""
    finals, kept_of = {}, {}
    for path, (_, shape, of_layer) in PARAMS.items():
        weights = values[path].astype(dtype).astype(np.float64).reshape(-1, *of_layer)
        kept = kept_of[path] = [{} for _ in weights]
        for step, (gradient, rate) in enumerate(zip(all_gradients, rates(), strict=False)):
            of_step = gradient[path].astype(np.float64).reshape(weights.shape)
            for number, g in enumerate(of_step):
                decay_here = 0.0 if path in NOT_DECAYED else decay
                new = formula(path, weights[number], g, kept[number], step + 1, rate, decay_here)
                weights[number] = new.astype(dtype)
        finals[path] = weights.reshape(shape)
    return finals, kept_of


def test_every_optimizer_of_the_table_is_held_against_a_formula():
    assert OPTIMIZERS.keys() == FORMULAS.keys() == KEYS_OF.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_fifty_steps_are_those_of_the_formula(name):
    values, all_gradients = drawn(0), gradients()
    config = OptimConfig(name=name, weight_decay=0.1)
    ours, state = train(config, as_state(values), all_gradients)
    expected, kept = by_formula(FORMULAS[name], values, all_gradients, np.float32)
    for path, value in host(ours).items():
        moved = np.linalg.norm(expected[path] - values[path])
        # Codes of moments flip where rounding decides.
        tolerance = 1e-3 if name == "adamw8bit" and path in CODED else 2e-5
        assert np.linalg.norm(value - expected[path]) < tolerance * moved, path
    if name == "schedule_free_adamw":
        for path, value in host(averaged(ours, state, beta1=0.9)).items():
            x = np.stack([each["x"] for each in kept[path]]).reshape(value.shape)
            assert np.linalg.norm(value - x) < 2e-5 * np.linalg.norm(x - values[path]), path


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_parameters_are_rounded_once_a_step_and_nothing_else_is(name):
    values, all_gradients = drawn(0), gradients()
    config = OptimConfig(name=name, weight_decay=0.1)
    ours, state = train(config, as_state(values, jnp.bfloat16), all_gradients)
    formula = from_rounded_y if name == "schedule_free_adamw" else FORMULAS[name]
    expected, _ = by_formula(formula, values, all_gradients, ml_dtypes.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(ours))
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state)), "moments keep their dtype"
    for path, value in host(ours).items():
        # A number that lies in the middle between two, but for rounding, ends at either, and steps after it with it.
        assert (value == expected[path]).mean() > 0.97, path
        np.testing.assert_allclose(value, expected[path], rtol=2**-7, atol=1e-4, err_msg=path)


# Public implementations.


def in_torch(make, path, all_gradients, values):
    """A weight's layers as PyTorch parameters, after some steps."""
    torch = pytest.importorskip("torch", reason="holds against PyTorch's optimizers")
    of_layer = PARAMS[path][2]
    layers = [torch.nn.Parameter(torch.tensor(each)) for each in values[path].reshape(-1, *of_layer)]
    optimizer = make(layers)
    for gradient, rate in zip(all_gradients, rates(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for layer, each in zip(layers, gradient[path].reshape(-1, *of_layer), strict=True):
            layer.grad = torch.tensor(each.astype(np.float64))
        optimizer.step()
    return np.stack([layer.detach().numpy() for layer in layers]).reshape(values[path].shape), optimizer, layers


def check_against(theirs, ours, path, values, tolerance=2e-5):
    moved = np.linalg.norm(theirs - values[path])
    assert np.linalg.norm(host(ours)[path] - theirs) < tolerance * moved, path


def test_sgd_is_pytorchs():
    torch = pytest.importorskip("torch")
    values, all_gradients = drawn(0), gradients(20)
    ours, _ = train(OptimConfig(name="sgd", momentum=0.8), as_state(values), all_gradients)
    for path in PARAMS:
        theirs, *_ = in_torch(lambda p: torch.optim.SGD(p, lr=1, momentum=0.8), path, all_gradients, values)
        check_against(theirs, ours, path, values)


def test_adafactor_is_that_of_transformers():
    pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    values, all_gradients = drawn(0), gradients(20)
    ours, _ = train(OptimConfig(name="adafactor", weight_decay=0.1), as_state(values), all_gradients)
    for path in set(PARAMS) - set(WHOLE):
        make = functools.partial(Adafactor, lr=1, scale_parameter=False, relative_step=False, weight_decay=0.1)
        theirs, *_ = in_torch(make, path, all_gradients, values)
        # It decays before it moves, so by the rate times the move more.
        check_against(theirs, ours, path, values, tolerance=2e-3)
    ours, _ = train(OptimConfig(name="adafactor"), as_state(values), all_gradients)
    for path in set(PARAMS) - {"layers.router.weight"}:
        make = functools.partial(Adafactor, lr=1, scale_parameter=False, relative_step=False)
        theirs, *_ = in_torch(make, path, all_gradients, values)
        check_against(theirs, ours, path, values)


def test_schedule_free_is_that_of_its_authors():
    schedulefree = pytest.importorskip("schedulefree", reason="pip install schedulefree: the authors' own")
    values, all_gradients = drawn(0), gradients(20)
    ours, state = train(OptimConfig(name="schedule_free_adamw", weight_decay=0.1), as_state(values), all_gradients)
    for path in set(PARAMS) - set(NOT_DECAYED):

        def make(layers):
            optimizer = schedulefree.AdamWScheduleFree(layers, lr=1, weight_decay=0.1, foreach=False)
            optimizer.train()
            return optimizer

        theirs, optimizer, layers = in_torch(make, path, all_gradients, values)
        check_against(theirs, ours, path, values)
        optimizer.eval()
        x = np.stack([layer.detach().numpy() for layer in layers]).reshape(values[path].shape)
        check_against(x, averaged(ours, state, beta1=0.9), path, values)


def test_schedule_free_is_that_of_optax():
    values, all_gradients = drawn(0), gradients(20)
    # At one rate: optax weighs each step by the rate of the next one.
    ours, state = train(OptimConfig(name="schedule_free_adamw"), as_state(values), all_gradients, at=[0.01] * 20)
    theirs = optax.contrib.schedule_free_adamw(0.01, b1=0.9, b2=0.999, eps=1e-8)
    params = {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}
    their_state, update = theirs.init(params), jax.jit(theirs.update)
    for gradient in all_gradients:
        updates, their_state = update(gradient, their_state, params)
        params = optax.apply_updates(params, updates)
    x = optax.contrib.schedule_free_eval_params(their_state, params)
    for path in PARAMS:
        check_against(params[path], ours, path, values, tolerance=1e-4)
        check_against(x[path], averaged(ours, state, beta1=0.9), path, values, tolerance=1e-4)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 6, 6)])
def test_the_iteration_of_muon_is_that_of_optax_and_comes_near_orthogonal_matrices(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    ours = np.asarray(orthogonalised(x))
    theirs = functools.partial(_muon.orthogonalize_via_newton_schulz, ns_coeffs=jnp.asarray([3.4445, -4.7750, 2.0315]))
    expected = np.asarray(jax.vmap(theirs)(x) if len(shape) == 3 else theirs(x))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    singular = np.linalg.svd(ours, compute_uv=False)
    assert singular.min() > 0.4 and singular.max() < 1.3


# Moments in 8 bits.


@pytest.mark.parametrize("num_segments", [7, 8])
def test_a_code_stands_for_the_nearest_number_and_is_as_near_as_it_says(num_segments):
    values = table(num_segments)
    decoded = np.asarray(eight_bit.decode(jnp.arange(2**num_segments), num_segments), np.float64)
    np.testing.assert_allclose(decoded, values, rtol=3e-6)
    assert decoded[0] == 0 and decoded[-1] == 1 and (np.diff(decoded) > 0).all()
    np.testing.assert_array_equal(
        eight_bit.encode(jnp.asarray(decoded, jnp.float32), num_segments), np.arange(2**num_segments)
    )
    shares = np.random.default_rng(0).uniform(size=20_000) ** 8
    codes = np.asarray(eight_bit.encode(jnp.asarray(shares, jnp.float32), num_segments))
    error = np.abs(values[codes] - shares)
    nearest = np.abs(values[None] - shares[:, None]).min(axis=1)
    assert (error <= nearest + 1e-6 * shares).all()
    segment = np.clip(np.floor(np.log10(shares)) + num_segments, 0, num_segments - 1)
    bound = np.where(segment > 0, 4.5 / 2**segment * 10.0 ** (segment - num_segments), 5 * 10.0**-num_segments)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error[shares >= 0.1] <= 4.5 / 2 ** (num_segments - 1) * shares[shares >= 0.1]).all()


def test_blocks_lie_within_a_row_a_head_and_a_layer():
    cases = {
        ("l d n h", (30, 576, 9, 64)): (3, 64),
        ("l n h d", (30, 9, 64, 576)): (2, 64),
        ("l d f", (30, 576, 1536)): (2, 128),
        ("l f d", (30, 1536, 576)): (1, 128),
        ("l e d f", (4, 8, 64, 96)): (3, 96),
        ("v d", (49152, 576)): (1, 96),
        ("l d", (30, 8192)): None,  # a norm
        ("l d f", (30, 32, 64)): None,  # small
        ("l d f", (30, 4096 + 1, 8191)): None,  # of odd sizes
        ("l d r", (30, 576, 16)): (1, 96),
    }
    for (axes, shape), expected in cases.items():
        found = eight_bit.block_of(axes, shape)
        assert (None if found is None else tuple(found)) == expected, axes


def test_a_second_moment_that_is_not_0_never_becomes_0():
    block = eight_bit.Block(1, 64)
    x = np.zeros((2, 64), np.float32)
    x[0, 0], x[0, 1], x[1, 1] = 1.0, 1e-20, 1e-30
    moment = eight_bit._unsigned(jnp.asarray(x), block)
    back = np.asarray(eight_bit._decoded(moment, block))
    np.testing.assert_array_equal(back > 0, x > 0)
    assert back[0, 0] == 1 and np.isclose(back[0, 1], 1e-7) and back[1, 1] == np.float32(1e-30)


def test_moments_in_8_bits_lead_to_about_where_those_in_32_bits_do():
    """Of gradients whose sizes differ by layer, row and column."""
    values, all_gradients = drawn(0), gradients()
    sizes = np.exp(np.random.default_rng(5).normal(size=PARAMS["layers.up_proj.weight"][1]))
    for each in all_gradients:
        each["layers.up_proj.weight"] = (each["layers.up_proj.weight"] * sizes).astype(np.float32)
    ours, exact = (host(train(OptimConfig(name=n), as_state(values), all_gradients)[0]) for n in ("adamw8bit", "adamw"))
    for path in PARAMS:
        apart = np.linalg.norm(ours[path] - exact[path]) / np.linalg.norm(exact[path] - values[path])
        assert (0.001 < apart < 0.06) if path in CODED else apart < 1e-5, (path, apart)


# Rounding at random.


def test_what_is_rounded_at_random_is_a_neighbour_and_right_on_average():
    low, high = np.float32(1.0), np.float32(1 + 2**-7)
    x = jnp.full(40_000, low + (high - low) / 4, jnp.float32)
    for sign in (1, -1):
        rounded = np.asarray(round_at_random(sign * x, jax.random.key(0)), np.float32)
        assert set(np.unique(sign * rounded)) == {low, high}
        assert abs((sign * rounded == high).mean() - 0.25) < 0.01
    kept = jnp.asarray([0.0, 1.5, -2.0, np.inf, -np.inf, np.nan], jnp.float32)
    np.testing.assert_array_equal(round_at_random(kept, jax.random.key(1)).astype(jnp.float32), kept)


def test_small_updates_count_where_they_are_rounded_at_random():
    """50 steps of a 4,096th each, on numbers whose neighbours are 128ths away."""
    config = OptimConfig(name="sgd", momentum=0.0, stochastic_rounding=True)
    values = {path: np.ones(shape) for path, (_, shape, _) in PARAMS.items()}
    same = [{path: np.float32(np.ones(shape)) for path, (_, shape, _) in PARAMS.items()}] * NUM_STEPS
    nearest = config.model_copy(update={"stochastic_rounding": False})
    rate = 2.0**-12 / np.mean(rates())
    same = [{path: value * np.float32(rate) for path, value in each.items()} for each in same]
    still, _ = train(nearest, as_state(values, jnp.bfloat16), same)
    assert all((leaf == 1).all() for leaf in host(still).values())
    ours, _ = train(config, as_state(values, jnp.bfloat16), same)
    up = host(ours)["layers.up_proj.weight"]
    assert abs(up.mean() - (1 - 50 / 4096)) < 5e-4 and up.std() > 0
    again, _ = train(config, as_state(values, jnp.bfloat16), same)
    other, _ = train(config, as_state(values, jnp.bfloat16), same, seed=1)
    np.testing.assert_array_equal(host(again)["layers.up_proj.weight"], up)
    assert (host(other)["layers.up_proj.weight"] != up).any()
    assert (up[0] != up[1]).any(), "layers are rounded by keys of their own"


# Groups.


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw", "muon"])
def test_a_group_has_its_own_rate_and_decay(name):
    values, all_gradients = drawn(0), gradients(5)
    groups = [
        {"match": ["embed_tokens", r"^norm\."], "learning_rate_factor": 0.5, "weight_decay": 0.3},
        {"match": "norm.weight", "weight_decay": 0.0},
    ]
    ours = host(train(OptimConfig(name=name, weight_decay=0.1, groups=groups), as_state(values), all_gradients)[0])
    plain = host(train(OptimConfig(name=name, weight_decay=0.1), as_state(values), all_gradients)[0])
    formula = FORMULAS[name]
    slower = lambda path, w, g, kept, t, rate, decay: formula(path, w, g, kept, t, rate / 2, decay)  # noqa: E731
    expected, _ = by_formula(slower, values, all_gradients, np.float32, decay=0.3)
    for path, value in ours.items():
        if path in ("embed_tokens.weight", "norm.weight"):  # the second is not decayed, by its second group
            np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6)
            assert (value != plain[path]).any()
        else:
            np.testing.assert_array_equal(value, plain[path])


def test_a_pattern_that_is_in_no_parameter_is_refused_with_those_that_there_are():
    config = OptimConfig(groups=[GroupConfig(match=["norm", "lm_head"], weight_decay=0.0)])
    with pytest.raises(ConfigError, match=r"(?s)optim.groups.0.match: 'lm_head' is found in no .*embed_tokens.weight"):
        check_groups(config, as_state(drawn(0)))
    check_groups(OptimConfig(groups=[GroupConfig(match=["norm"], weight_decay=0.0)]), as_state(drawn(0)))
