"""Weights of four and eight bits against bitsandbytes, where it is installed, and against formulas in numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsft.model.quantize import DYNAMIC_VALUES, NF4_VALUES, dequantize, dequantize_absmax, quantize

quantized = jax.jit(quantize, static_argnums=1)
dequantized = jax.jit(dequantize, static_argnums=1)


def random_weights(*shape, dtype=np.float32):
    """With rows of zeros, of one number, and of the middles between the values."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, shape) * rng.lognormal(0, 1, (*shape[:-1], 1))
    weights[..., 0, :] = 0
    weights[..., 1, 1:] = 0
    middles = (NF4_VALUES[:-1] + NF4_VALUES[1:]) / 2
    weights[..., 2, :16] = np.append(middles, np.float32(1))
    return weights.astype(dtype)


@pytest.fixture
def bitsandbytes():
    """On CPU it is right where the number of inputs is a multiple of 64."""
    pytest.importorskip("torch")
    reason = "needs bitsandbytes (pip install bitsandbytes), whose CPU functions are the oracle"
    return pytest.importorskip("bitsandbytes.functional", reason=reason)


def as_torch(weights):
    import torch

    if weights.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(weights.astype(np.float32)).bfloat16()
    return torch.from_numpy(weights)


def formula(weights):
    """NF4 in numpy, without any search: the nearest value of all, and of two as near the lower one."""
    blocks = weights.astype(np.float32).reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=-1)
    scaled = blocks / np.maximum(absmax, np.finfo(np.float32).tiny)[:, None]
    codes = np.abs(scaled[..., None].astype(np.float64) - NF4_VALUES).argmin(axis=-1).astype(np.uint8)
    return codes.reshape(*weights.shape[:-1], -1, 64), absmax.reshape(*weights.shape[:-1], -1)


def formula_of_absmax(absmax, offset):
    """Codes and scales of absmax in blocks of 256, in numpy."""
    centred = absmax.reshape(-1) - np.float32(offset)
    blocks = [centred[at : at + 256] for at in range(0, centred.size, 256)]
    scales = np.array([np.abs(block).max() for block in blocks], np.float32)
    scaled = np.concatenate([block * (1 / scale) for block, scale in zip(blocks, scales, strict=True)])
    nearest = np.abs(scaled[:, None].astype(np.float64) - DYNAMIC_VALUES).argmin(axis=-1)
    return nearest.astype(np.uint8), scales


def exact_absmax(absmax, offset):
    """bitsandbytes' codes and scales of absmax, by its functions in PyTorch, which compare as its CUDA kernels do."""
    import torch
    from bitsandbytes.functional import create_dynamic_map

    quantize_blockwise = torch.ops.bitsandbytes.quantize_blockwise.default
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    found = quantize_blockwise._op_dk(key, absmax - float(offset), create_dynamic_map(), 256)
    return [each.numpy() for each in found]


SHAPES = [(48, 64), (33, 192), (80, 576)]
DTYPES = [np.float32, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_that_of_bitsandbytes_to_the_bit(bitsandbytes, shape, dtype):
    weights = random_weights(*shape, dtype=dtype)
    _, plain = bitsandbytes.quantize_4bit(as_torch(weights), quant_type="nf4")
    codes, state = bitsandbytes.quantize_4bit(as_torch(weights), quant_type="nf4", compress_statistics=True)
    ours = quantized(weights, "nf4")
    np.testing.assert_array_equal(ours.codes.reshape(-1), codes.numpy().reshape(-1))
    np.testing.assert_array_equal(formula(weights)[1].reshape(-1), plain.absmax.numpy())
    np.testing.assert_array_equal(NF4_VALUES, state.code.numpy())
    np.testing.assert_array_equal(DYNAMIC_VALUES, state.state2.code.numpy())
    # In which order torch adds up a mean is its own affair; all that follows from ours is as with theirs to the bit.
    np.testing.assert_allclose(ours.offset, state.offset.numpy(), rtol=3e-7)
    absmax, scales = exact_absmax(plain.absmax, ours.offset)
    np.testing.assert_array_equal(ours.absmax.reshape(-1), absmax)
    np.testing.assert_array_equal(ours.scales, scales)
    assert np.abs(absmax.astype(int) - state.absmax.numpy()).max() <= 1
    np.testing.assert_allclose(ours.scales, state.state2.absmax.numpy(), rtol=1e-6)
    state.absmax[:] = as_torch(absmax)
    theirs = bitsandbytes.dequantize_4bit(codes, state).float().numpy()
    values = np.asarray(dequantized(ours, dtype), np.float32)
    # An absmax is a sum, `code * scale + offset`, which one compiler rounds once and another one twice. A bfloat16 is
    # rounded from there, now and then to the other side.
    few_ulp = 2e-7 * float(np.abs(ours.scales).max() + ours.offset)
    np.testing.assert_allclose(values, theirs, rtol=5e-7 if dtype == np.float32 else 2**-7, atol=few_ulp)
    assert dtype == np.float32 or np.mean(values != theirs) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_the_nearest_of_the_values_in_its_block(dtype):
    weights = random_weights(40, 320, dtype=dtype)
    ours = quantized(weights, "nf4")
    codes, absmax = formula(weights)
    both = np.stack([ours.codes >> 4, ours.codes & 15], axis=-1).reshape(codes.shape)
    scaled = weights.astype(np.float64).reshape(codes.shape) / np.maximum(absmax, 1e-30)[..., None]
    distances = [np.abs(scaled - NF4_VALUES[each]) for each in (both, codes)]
    np.testing.assert_allclose(*distances, atol=1e-7)
    assert np.mean(both != codes) < 1e-3  # only where a number lies in the middle
    expected, scales = formula_of_absmax(absmax, ours.offset)
    np.testing.assert_array_equal(ours.absmax.reshape(-1), expected)
    np.testing.assert_array_equal(ours.scales, scales)
    np.testing.assert_allclose(ours.offset, absmax.mean(dtype=np.float64), rtol=1e-7)
    restored = DYNAMIC_VALUES[expected].reshape(absmax.shape) * np.repeat(scales, 256)[: absmax.size].reshape(
        absmax.shape
    ) + np.asarray(ours.offset)
    np.testing.assert_allclose(jax.jit(dequantize_absmax)(ours), restored, rtol=3e-7, atol=1e-9)
    values = (NF4_VALUES[both] * restored[..., None]).reshape(weights.shape)
    np.testing.assert_allclose(dequantized(ours, np.float32), values, rtol=5e-7, atol=1e-9)


def test_each_matrix_of_a_stack_is_quantised_by_itself():
    weights = random_weights(2, 3, 8, 128)
    stacked = quantized(weights, "nf4")
    assert [each.shape for each in stacked] == [(2, 3, 8, 64), (2, 3, 8, 2), (2, 3, 1), (2, 3)]
    for layer, expert in np.ndindex(2, 3):
        alone = quantized(weights[layer, expert], "nf4")
        for of_all, of_one in zip(stacked, alone, strict=True):
            np.testing.assert_array_equal(of_all[layer, expert], of_one)
    np.testing.assert_array_equal(
        dequantized(stacked, np.float32)[1, 2], dequantized(quantized(weights[1, 2], "nf4"), np.float32)
    )


def test_nf4_takes_at_most_052_bytes_a_number():
    for shape in [(576, 576), (192, 576), (576, 1536), (4096, 14336)]:
        packed = jax.eval_shape(functools.partial(quantize, kind="nf4"), jax.ShapeDtypeStruct(shape, jnp.float32))
        assert sum(each.size * each.dtype.itemsize for each in packed) <= 0.517 * np.prod(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_that_of_bitsandbytes_to_the_bit(bitsandbytes, dtype):
    weights = random_weights(40, 100, dtype=dtype)[1:]  # whose formula gives NaN for a row of zeros
    codes, absmax, _ = bitsandbytes.int8_vectorwise_quant(as_torch(weights).float())
    ours = quantized(weights, "int8")
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    np.testing.assert_array_equal(ours.absmax, absmax.numpy())
    theirs = bitsandbytes.int8_vectorwise_dequant(codes, absmax).numpy()
    np.testing.assert_allclose(dequantized(ours, np.float32), theirs, rtol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_off_by_half_a_step_at_most(dtype):
    weights = random_weights(40, 100, dtype=dtype)
    ours = quantized(weights, "int8")
    step = np.abs(weights.astype(np.float64)).max(axis=-1, keepdims=True) / 127
    off = np.abs(np.asarray(dequantized(ours, np.float32), np.float64) - weights.astype(np.float64))
    assert np.all(off <= 0.5001 * step)
    assert ours.codes.dtype == np.int8 and np.asarray(ours.codes).min() == -127
