"""The check of a kernel before a run: what is right passes, and each kind of fault is found and named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_attention import naive

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.config_files import load_config
from jaxsft.mesh import make_mesh
from jaxsft.model import kernel_check
from jaxsft.model.architecture import LayerKind
from jaxsft.model.attention import attention
from jaxsft.model.families.known import decoder_config
from jaxsft.model.kernel_check import check_kernel, formula, packed_rows
from jaxsft.model.needed import Rule
from jaxsft.setup import Setup

CONFIG = dataclasses.replace(
    decoder_config(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
        }
    ),
    layers=(LayerKind(window=4096), LayerKind()),
)
WITH_ALL = dataclasses.replace(CONFIG, attention_soft_cap=20.0, sinks=True, attention_scale=0.1)


def xla(*arrays, **options):
    """Our own attention in the place of the kernel: what is planted into it is the fault of a kernel."""
    return attention(*arrays, **options | {"kernel": "xla"})


def wrong_grouping(q, k, v, **options):
    """Head n reads key/value head n % K."""
    turned = q.reshape(*q.shape[:2], -1, k.shape[2], q.shape[3]).swapaxes(2, 3).reshape(q.shape)
    out = xla(turned, k, v, **options)
    return out.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]).swapaxes(2, 3).reshape(q.shape)


def leak(q, k, v, **options):
    """The second example of each row sees the first one, too."""
    ids = options["q_segment_ids"]
    merged = jnp.where(ids == 2, 1, ids)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return xla(
        q,
        k,
        v,
        **options | {"q_segment_ids": merged, "kv_segment_ids": merged, "q_positions": places, "kv_positions": places},
    )


def shifted_window(by):
    def attend(q, k, v, **options):
        window = options["window"]
        return xla(q, k, v, **options | {"window": window and window + by})

    return attend


def of_the_future(q, k, v, **options):
    """A query sees the token after it."""
    places = options["kv_positions"]
    return xla(q, k, v, **options | {"kv_positions": places - (places > 0)})


def no_soft_cap(q, k, v, **options):
    return xla(q, k, v, **options | {"soft_cap": None})


def no_sinks(q, k, v, **options):
    out = xla(q, k, v, **options | {"sinks": None})
    return out + 0 * options["sinks"].sum().astype(out.dtype)


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, gradient: (gradient / 2,))


def half_the_gradient_by_keys(q, k, v, **options):
    return xla(q, halved(k), v, **options)


def not_a_number(q, k, v, **options):
    return xla(q, k, v, **options) * jnp.nan


FAULTS = {
    "wrong grouping": (wrong_grouping, "output by "),
    "a leak between segments": (leak, "output by "),
    "a window that is one too long": (shifted_window(1), "with a window of 100: output by"),
    "a window that is one too short": (shifted_window(-1), "with a window of 100: output by"),
    "the next token": (of_the_future, "output by "),
    "no soft cap": (no_soft_cap, "output by "),
    "no sinks": (no_sinks, "output by "),
    "a gradient": (half_the_gradient_by_keys, "tokens of an example: gradient by keys by "),
    "not a number": (not_a_number, "output, which is not finite"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_fault_is_found_and_named(fault, dtype):
    attend, words = FAULTS[fault]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), pytest.raises(ConfigError) as caught:
        check_kernel("splash", WITH_ALL, dtype, attend=attend)
    said = str(caught.value)
    assert said.startswith(f"model.attention: splash: on cpu, in {dtype}, the kernel differs from the formula")
    assert words in said and said.endswith("set model.attention to xla")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [CONFIG, WITH_ALL], ids=["plain", "with all"])
def test_our_own_attention_passes_with_room(config, dtype):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert check_kernel("splash", config, dtype, attend=xla) < 0.5 * kernel_check.BOUNDS[dtype]


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2, "tensor": 2}, {"data": 8}], ids=str)
def test_the_kernel_passes_on_a_mesh(axes):
    config = dataclasses.replace(WITH_ALL, layers=(LayerKind(window=7),))
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        assert check_kernel("splash", config, "float32") < 1e-5
        with pytest.raises(ConfigError, match="with a window of 7: output by"):
            check_kernel("splash", config, "float32", attend=shifted_window(1))


def test_what_does_not_run_is_an_error_of_the_config():
    def fail(x):
        raise RuntimeError("out of memory")

    def attend(q, k, v, **options):
        failing = jax.pure_callback(fail, q, jax.lax.stop_gradient(q))
        return xla(q, k, v, **options) + failing

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), pytest.raises(ConfigError, match="does not run"):
        check_kernel("splash", CONFIG, "float32", attend=attend)


def test_the_summary_says_what_computes_attention_and_why(tiny_config):
    def line(*overrides):
        return Setup(load_config(tiny_config, overrides)).attention

    assert line() == "xla (there is no kernel for cpu)"
    assert line("model.attention=xla") == "xla (as asked for)"
    by_splash = line("model.attention=splash")
    assert by_splash.startswith("splash (as asked for; on a CPU it is interpreted")
    assert by_splash.endswith("apart from the formula by 0.00% at most")


@pytest.mark.parametrize("num_devices", [1, 3, 16])
def test_rows_are_packed_padded_and_cut_evenly(num_devices):
    segment_ids, positions = packed_rows(7, num_devices)
    assert segment_ids.shape[1] % (2 * num_devices) == 0 and segment_ids.shape[1] > 300
    assert {len(np.unique(row)) for row in segment_ids} == {6} and (segment_ids[:, -1] == 0).all()
    new = np.diff(segment_ids, axis=1) != 0
    np.testing.assert_array_equal(np.diff(positions, axis=1)[~new], 1)
    assert (positions[:, 1:][new] == 0).all()


@pytest.mark.parametrize("window", [None, 30])
def test_the_formula_is_that_of_the_tests(window):
    segment_ids, positions = packed_rows(2, 1)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 360, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    sinks = jax.random.normal(keys[3], (4,))
    ours = formula(Rule(0.3, window, 2.0), segment_ids, positions, q, k, v, sinks)
    theirs = naive(q, k, v, segment_ids, positions, scale=0.3, window=window, soft_cap=2.0, sinks=sinks)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
