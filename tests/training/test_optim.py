"""Schedules by hand-computed values, AdamW against PyTorch, and what is decayed against the run in PyTorch."""

import copy
import json
import types

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsft.config import KEYS_OF, OptimConfig
from jaxsft.folders.weights.layout import join
from jaxsft.model.abstract import abstract_model
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.training.optim import make_optimizer, make_schedule, warmup_steps
from jaxsft.training.optimizers.optimizer import Given
from jaxsft.training.optimizers.params import is_decayed


def rates(num_steps, **keys):
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **keys), num_steps)
    return [round(float(schedule(step)), 4) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup_steps": 0, "final_ratio": 0.5}, [1, 0.9167, 0.8333, 0.75, 0.6667, 0.5833]),
        ({"schedule": "cosine", "warmup_steps": 1}, [1, 1, 0.9045, 0.6545, 0.3455, 0.0955]),
        ({"schedule": "wsd", "warmup_steps": 1, "decay_ratio": 0.5, "final_ratio": 0.1}, [1, 1, 1, 1, 0.7, 0.4]),
    ],
)
def test_schedules_take_the_values_computed_by_hand(keys, expected):
    assert rates(6, **keys) == expected


@pytest.mark.parametrize(
    ("num_steps", "keys", "expected"),
    [
        (1, {"schedule": "linear", "warmup_steps": 0}, [1]),
        (2, {"schedule": "linear", "warmup_steps": 0}, [1, 0.5]),
        (3, {"schedule": "linear", "warmup_steps": 0}, [1, 0.6667, 0.3333]),
        (1, {"schedule": "cosine"}, [1]),
        (2, {"schedule": "cosine"}, [1, 1]),
        (3, {"schedule": "cosine", "warmup_steps": 0}, [1, 0.75, 0.25]),
        (1, {"schedule": "wsd"}, [1]),
        (2, {"schedule": "wsd", "warmup_steps": 0, "decay_ratio": 1.0}, [1, 0.5]),
        (3, {"schedule": "linear", "warmup_steps": 3}, [0.3333, 0.6667, 1]),
        (2, {"schedule": "cosine", "warmup_steps": 5}, [0.2, 0.4]),
    ],
)
def test_short_runs_learn_from_every_batch(num_steps, keys, expected):
    assert rates(num_steps, **keys) == expected


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("final_ratio", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_what_decays_is_at_its_end_after_the_last_step_and_not_in_it(schedule, final_ratio, num_steps):
    config = OptimConfig(learning_rate=1.0, schedule=schedule, final_ratio=final_ratio, warmup_steps=0)
    course = make_schedule(config, num_steps)
    assert float(course(num_steps)) == pytest.approx(final_ratio, abs=1e-7) or round(0.2 * num_steps) == 0
    assert float(course(num_steps - 1)) > final_ratio


@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (2, 0), (7, 2), (50, 5)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_decay_is_that_of_transformers(schedule, num_steps, warmup):
    """Its warm-up begins at 0, one step before ours; from the peak on both are the same."""
    torch = pytest.importorskip("torch", reason="transformers' schedules are PyTorch's")
    import transformers

    decay = round(0.5 * num_steps)
    options = {"num_decay_steps": decay, "num_stable_steps": num_steps - warmup - decay, "decay_type": "linear"}
    theirs = transformers.get_scheduler(
        {"wsd": "warmup_stable_decay"}.get(schedule, schedule),
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options if schedule == "wsd" else None,
    )
    expected = [theirs.lr_lambdas[0](step) for step in range(num_steps)]
    config = OptimConfig(
        learning_rate=1.0,
        schedule=schedule,
        warmup_steps=warmup,
        **({"decay_ratio": 0.5} if schedule == "wsd" else {}),
    )
    ours = [float(make_schedule(config, num_steps)(step)) for step in range(num_steps)]
    np.testing.assert_allclose(ours[warmup:], expected[warmup:], atol=1e-6)


def test_warmup_by_ratio_rounds_up():
    assert warmup_steps(OptimConfig(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(OptimConfig(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(OptimConfig(warmup_ratio=0.0), 100) == 0


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return nnx.State(
        {
            "proj": {"weight": nnx.Param(jnp.asarray(rng.normal(size=(2, 3, 4)), dtype), axes="l d f")},
            "bias": nnx.Param(jnp.asarray(rng.normal(size=(2, 3, 2)), dtype), axes="l n h"),
            "norm": nnx.Param(jnp.asarray(rng.normal(size=(2, 3)), dtype), axes="l d"),
        }
    )


def stepped(optimizer, params, state, gradients, rate=0.0):
    given = Given(gradients, jnp.float32(1.0), jnp.float32(rate), jax.random.key(0))
    return optimizer.move(given, state, params), optimizer.advance(given, state, params)


def test_adamw_equals_pytorch_and_spares_norms_and_biases():
    torch = pytest.importorskip("torch", reason="compares with torch.optim.AdamW")
    params = make_params()
    leaves, structure = jax.tree.flatten(params)
    is_decayed = [path[0].key == "proj" for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    ours = make_optimizer(OptimConfig(weight_decay=0.1))
    state = ours.init(params)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    groups = [{"params": [p], "weight_decay": 0.1 * d} for p, d in zip(theirs, is_decayed, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    rng = np.random.default_rng(1)
    for _ in range(20):
        gradients = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
        params, state = stepped(ours, params, state, jax.tree.unflatten(structure, gradients), 0.01)
    for ours_leaf, their_leaf in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours_leaf, their_leaf.detach().numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, keys in KEYS_OF.items() if "moment_dtype" in keys])
def test_moments_keep_their_dtype_whatever_that_of_the_parameters(name):
    for moment_dtype in ("float32", "bfloat16"):
        for param_dtype in (jnp.float32, jnp.bfloat16):
            params = make_params(param_dtype)
            optimizer = make_optimizer(OptimConfig(name=name, moment_dtype=moment_dtype))
            state = optimizer.init(params)
            gradients = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
            _, new_state = stepped(optimizer, params, state, gradients)
            assert [leaf.dtype for leaf in jax.tree.leaves(new_state)] == [
                leaf.dtype for leaf in jax.tree.leaves(state)
            ]
            arrays = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim]
            # z of schedule_free_adamw is no moment: in bfloat16 it would lose small updates.
            expected = {moment_dtype, "float32"} if name == "schedule_free_adamw" else {moment_dtype}
            assert {str(leaf.dtype) for leaf in arrays} == expected


@pytest.mark.parametrize("name", adapters.TINY)
def test_what_is_decayed_is_what_the_run_in_pytorch_decays(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from jaxsft.baseline.hf import make_optimizer as their_optimizer

    hf_config = json.loads(adapters.TINY[name].read_text())
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**copy.deepcopy(hf_config))
        model = transformers.AutoModelForCausalLM.from_config(config)
    request = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "learning_rate": 1e-3, "epsilon": 1e-8}
    decayed = {id(each) for each in their_optimizer(model, request).param_groups[0]["params"]}
    theirs = {each: id(parameter) in decayed for each, parameter in model.named_parameters()}

    module = family(hf_config)
    in_memory = types.SimpleNamespace(WEIGHTS=module.WEIGHTS | getattr(module, "IN_MEMORY", {}))
    options = {"compute_dtype": "float32", "param_dtype": "float32", "remat": "none"}
    params = abstract_model(lambda rngs: Decoder(decoder_config(hf_config), **options, rngs=rngs)).params
    ours = {
        weight.name(index): is_decayed(path, variable)
        for path, (weight, variable) in join(params, in_memory, vocab_size=hf_config["vocab_size"]).items()
        for index in weight.indices()
    }
    assert ours == {each: theirs[each] for each in ours} and ours.keys() == theirs.keys()
