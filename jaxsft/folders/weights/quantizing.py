"""Weights of files that lie quantised on the devices: quantised layer by layer, or taken as files have them.

In: a weight, how it is read layer by layer, and the tensors of the files. Out: the arrays of its `QuantizedWeight`. The
codes of each layer's matrices are those of these by themselves, and the same on every mesh.
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.folders.weights.bnb4 import Bnb4Tensor
from jaxsft.folders.weights.layout import Weight
from jaxsft.folders.weights.stored import StoredTensor
from jaxsft.model.quantize import RECORDS, quantize
from jaxsft.model.quantized import Layout


def quantized_arrays(
    weight: Weight,
    variables: Mapping[str, nnx.Variable],
    places: Mapping[str, jax.sharding.Sharding],
    layer_of: Callable[[int], jax.Array],
    *,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, jax.Array]:
    """The arrays of a quantised weight by path.

    Args:
        weight: that they stand for.
        variables: of the whole model, abstract, by path.
        places: their shardings.
        layer_of: reads a layer of the weight, float32 [1, ...] with its axes, cut over the mesh. One is asked for at a
            time, and none where the files have the codes.
        tensors: of the files, by name.
    """
    layout: Layout = variables[f"{weight.path}.codes"].get_metadata("layout")
    fields = RECORDS[layout.kind]._fields
    paths = [f"{weight.path}.{field}" for field in fields]
    if layout.kind == "nf4" and _lie_as_ours(weight, layout, tensors):
        return {
            path: _as_stored(weight, field, variables[path], places[path], tensors)
            for path, field in zip(paths, fields, strict=True)
        }
    of_paths = {path: places[path] for path in paths}

    def zeros() -> dict[str, jax.Array]:
        return {path: jnp.zeros(variables[path].shape, variables[path].dtype) for path in paths}

    put = jax.jit(functools.partial(_put_layer, layout, paths), donate_argnums=0, out_shardings=of_paths)
    with jax.set_mesh(places[paths[0]].mesh):  # type: ignore[attr-defined]
        arrays = jax.jit(zeros, out_shardings=of_paths)()
        for layer in range(weight.shape[0]):
            arrays = put(arrays, layer_of(layer), layer)
    return arrays


def _put_layer(
    layout: Layout, paths: list[str], arrays: dict[str, jax.Array], values: jax.Array, layer: jax.Array
) -> dict[str, jax.Array]:
    quantized = quantize(layout.matrices(values), layout.kind)
    return {
        path: jax.lax.dynamic_update_slice_in_dim(arrays[path], part, layer, axis=0)
        for path, part in zip(paths, quantized, strict=True)
    }


def _lie_as_ours(weight: Weight, layout: Layout, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether files hold the very codes that are wanted, each matrix in a tensor of its own."""
    letters = " ".join(factor.letter or "" for factor in weight.factors)
    found = [tensors[weight.name(index)] for index in weight.indices()]
    return (
        letters == layout.of_matrix
        and all(factor.size == factor.length for factor in weight.factors)
        and all(isinstance(tensor, Bnb4Tensor) and tensor.is_ours for tensor in found)
    )


def _as_stored(
    weight: Weight,
    field: str,
    variable: nnx.Variable,
    place: jax.sharding.Sharding,
    tensors: Mapping[str, StoredTensor],
) -> jax.Array:
    """One array of a quantised weight, each device's part of it read by itself."""

    def part(at: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        tensor = tensors[weight.name(at)]
        assert isinstance(tensor, Bnb4Tensor)
        return tensor.part(field, index)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        stack = [
            range(*each.indices(size))
            for each, size in zip(index[: weight.split], variable.shape[: weight.split], strict=True)
        ]
        parts = [part(at, index[weight.split :]) for at in itertools.product(*stack)]
        return np.stack(parts).reshape(*map(len, stack), *parts[0].shape)

    return jax.make_array_from_callback(variable.shape, place, read)
