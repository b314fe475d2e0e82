"""Every optimizer moves parameters alike on every mesh, also where blocks and matrices lie on several devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from placing import place

from jaxsft.config import KEYS_OF, MeshConfig, OptimConfig
from jaxsft.mesh import make_mesh, shardings
from jaxsft.training.optim import make_optimizer
from jaxsft.training.optimizers.eight_bit import block_of
from jaxsft.training.optimizers.optimizer import Given
from jaxsft.training.optimizers.params import by_path
from jaxsft.training.rounding import step_key

PARAMS = {
    "embed_tokens": ("v d", (128, 32)),
    "q_proj": ("l d n h", (2, 32, 4, 8)),
    "up_proj": ("l d f", (2, 32, 128)),
    "experts": ("l e f d", (2, 4, 8, 32)),
    "norm": ("l d", (2, 32)),
}
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 4, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"context": 2, "fsdp": 4},
    {"context": 4, "tensor": 2},
    {"context": 8},
    {"expert": 2, "data": 4},
    {"expert": 2, "fsdp": 2, "tensor": 2},
]
CASES = {name: OptimConfig(name=name, learning_rate=1e-2, weight_decay=0.1) for name in KEYS_OF}
CASES["rounded at random"] = OptimConfig(name="muon", learning_rate=1e-2, stochastic_rounding=True)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return nnx.State(
        {
            path: nnx.Param(rng.normal(size=shape).astype(np.float32), axes=axes)
            for path, (axes, shape) in PARAMS.items()
        }
    )


def two_steps(mesh):
    """Parameters after two steps of each optimizer, on the host; all are compiled together."""

    def run(params, gradients):
        ends = {}
        for name, config in CASES.items():
            optimizer = make_optimizer(config)
            dtype = jnp.bfloat16 if config.stochastic_rounding else jnp.float32

            def step(number, carry, optimizer=optimizer, config=config):
                params, state = carry
                factor = jnp.float32(1.0) - 0.7 * number
                given = Given(gradients, factor, jnp.float32(config.learning_rate), step_key(0, number))
                return optimizer.move(given, state, params), optimizer.advance(given, state, params)

            first = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
            ends[name] = jax.lax.fori_loop(0, 2, step, (first, optimizer.init(first)))[0]
        return ends

    params, gradients = drawn(0), drawn(1)
    cut = shardings(mesh, params)
    with jax.set_mesh(mesh):
        ends = jax.jit(run, in_shardings=(cut, cut))(place(params, mesh), place(gradients, mesh))
    return jax.device_get(ends)


@pytest.fixture(scope="module")
def on_one_device():
    return two_steps(make_mesh(MeshConfig(), jax.devices()[:1]))


def test_some_of_the_blocks_lie_on_several_devices():
    """On fsdp 8 those of the embedding, on tensor 4 those of the MLP."""
    blocks = {path: block_of(axes, shape) for path, (axes, shape) in PARAMS.items()}
    assert blocks["embed_tokens"] == (1, 32) and blocks["up_proj"] == (2, 128)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_parameters_are_equal_on_every_mesh(on_one_device, sizes):
    assert math.prod(sizes.values()) == 8
    for name, tree in two_steps(make_mesh(MeshConfig(**sizes))).items():
        for (path, leaf), other in zip(by_path(tree).items(), by_path(on_one_device[name]).values(), strict=True):
            a, b = (np.asarray(each.get_value(), np.float64) for each in (leaf, other))
            if name == "rounded at random":  # by the same noise; what is at the edge falls to either side
                assert (a == b).mean() > 0.999, (name, path)
            else:
                assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b), (name, path)
