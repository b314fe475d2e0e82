"""Weights that lie quantised in memory: their variables, how a mesh cuts them, and products with them.

In: a decoder whose linear maps have a weight each. Out: the same decoder with what `quantize.py` makes of these, and
products of tokens with them, which a layer computes without making the weights of any other layer.

A weight lies as in files, outputs before inputs. Where a mesh cuts the outputs of a map over `tensor`, it cuts rows of
codes over all axes; where it cuts the inputs over `tensor`, it cuts the bytes of a row over it, and rows over the
others; the absmax of a row stay together. A layer gathers the bytes of its own weights over all axes but `tensor`, and
only then makes numbers of them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.mesh import cut_axes, is_cut_evenly, partition_spec
from jaxsft.model.adapter import Frozen, of_layers
from jaxsft.model.products import gradient_by_x, precision
from jaxsft.model.quantize import NF4, RECORDS, Int8, Kind, Place, Quantized, dequantize, quantize


class Layout(NamedTuple):
    """How a weight of ours, `"l d n h"`, is a stack of matrices [O, I] with O = (n h) and I = d."""

    kind: Kind
    leading: str
    """Letters of the stack: "l", or "l e" of experts."""
    inputs: str
    outputs: str
    sizes: tuple[int, ...]
    """Of the outputs, then of the inputs."""

    @property
    def axes(self) -> dict[str, str]:
        """Field of the record -> its letters: rows `o` or as they are, inputs `i` where a mesh cuts them, `j` else."""
        rows, inputs = ("o", "j") if self.is_by_rows else (self.outputs, "i")
        assert " " not in rows, self
        codes = f"{self.leading} {rows} {inputs}"
        if self.kind == "int8":
            return {"codes": codes, "absmax": f"{self.leading} {rows}"}
        absmax = f"{self.leading} {rows} j"
        return {"codes": codes, "absmax": absmax, "scales": f"{self.leading} j", "offset": self.leading}

    @property
    def is_by_rows(self) -> bool:
        """Whether it is the outputs that a mesh cuts over `tensor`."""
        return any("tensor" in axes for axes in cut_axes(self.outputs))

    @property
    def num_outputs(self) -> int:
        return math.prod(self.sizes[: len(self.outputs.split())])

    @property
    def num_inputs(self) -> int:
        return math.prod(self.sizes[len(self.outputs.split()) :])

    @property
    def ours(self) -> str:
        """The axes of the weight: stack, inputs, outputs."""
        return f"{self.leading} {self.inputs} {self.outputs}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight of one layer, inputs before outputs."""
        count = len(self.outputs.split())
        return (*self.sizes[count:], *self.sizes[:count])

    @property
    def of_matrix(self) -> str:
        """Letters of the weight of one layer, as `unpacked` gives it."""
        return f"{self.outputs} {self.inputs}"

    def matrices(self, weight: jax.Array) -> jax.Array:
        """[..., O, I] of a weight of ours with any number of layers."""
        count, num_inputs = len(self.leading.split()), len(self.inputs.split())
        dims = range(weight.ndim)
        turned = weight.transpose(*dims[:count], *dims[count + num_inputs :], *dims[count : count + num_inputs])
        return turned.reshape(*turned.shape[:count], self.num_outputs, self.num_inputs)


class QuantizedWeight(nnx.Module):
    """A weight that is not trained, quantised; of all layers, or (inside the scan) of one."""

    def __init__(self, weight: nnx.Variable, inputs: str, kind: Kind):
        """Of a weight with axes, whose inputs have the letters `inputs`."""
        letters = weight.get_metadata("axes").split()
        first = letters.index(inputs.split()[0])
        leading, outputs = letters[:first], letters[first + len(inputs.split()) :]
        sizes = dict(zip(letters, weight.shape, strict=True))
        sizes_in_order = tuple(sizes[letter] for letter in (*outputs, *inputs.split()))
        self.layout = Layout(kind, " ".join(leading), inputs, " ".join(outputs), sizes_in_order)
        found = quantize(self.layout.matrices(weight[...]), kind)
        parts = {
            name: Frozen(array, axes=self.layout.axes[name], **of_layers(weight))
            for name, array in zip(found._fields, found, strict=True)
        }
        for name, part in parts.items():
            part.set_metadata(layout=self.layout if name == "codes" else None)
        self.codes, self.absmax = parts["codes"], parts["absmax"]
        self.scales, self.offset = parts.get("scales"), parts.get("offset")

    @property
    def arrays(self) -> Quantized:
        """What a product is computed from."""
        if self.scales is None or self.offset is None:
            return Int8(self.codes[...], self.absmax[...])
        return NF4(self.codes[...], self.absmax[...], self.scales[...], self.offset[...])

    def values(self, dtype: jnp.dtype, *, after: jax.Array) -> jax.Array:
        """The weight of one layer, inputs before outputs; not made before `after` is there."""
        num_outputs = len(self.layout.outputs.split())
        (arrays,) = _after(after, f"b t {self.layout.inputs}", [self.arrays])
        weight = unpacked(self.layout, arrays, dtype)
        return weight.transpose(*range(num_outputs, weight.ndim), *range(num_outputs))


def dims_of(variable: nnx.Variable) -> dict[str, int] | None:
    """Letter -> size of each dim of a weight; of one that lies quantised, those of its numbers, for its codes.

    None for scales, which are no numbers of a model.
    """
    letters, metadata = variable.get_metadata("axes").split(), variable.get_metadata()
    sizes = dict(zip(letters, variable.shape, strict=True))
    if "layout" not in metadata:
        return sizes
    layout: Layout | None = metadata["layout"]
    if layout is None:
        return None
    leading = {letter: sizes[letter] for letter in layout.leading.split()}
    return leading | dict(zip(layout.of_matrix.split(), layout.sizes, strict=True))


def norms_of(parts: Mapping[str, nnx.Variable]) -> jax.Array:
    """float32 [L, outputs]: the norm of each output's numbers, of the Variables of a quantised weight by name."""
    layout: Layout = parts["codes"].get_metadata("layout")
    record = RECORDS[layout.kind]
    over = tuple(range(len(layout.outputs.split()), len(layout.sizes)))
    # One layer after the other, so that no more is unpacked.
    return jax.lax.map(
        lambda quantized: jnp.sqrt(jnp.sum(jnp.square(unpacked(layout, quantized, jnp.dtype(jnp.float32))), axis=over)),
        record(*(parts[name].get_value() for name in record._fields)),
    )


@functools.partial(jax.jit, static_argnums=0)
def _layer(layout: Layout, quantized: Quantized, layer: int) -> jax.Array:
    one = dequantize(jax.tree.map(lambda array: array[layer], quantized), jnp.dtype(jnp.float32))
    leading, count = one.ndim - 2, len(layout.outputs.split())
    turned = one.reshape(*one.shape[:leading], *layout.sizes)
    dims = range(turned.ndim)
    return turned.transpose(*dims[:leading], *dims[leading + count :], *dims[leading : leading + count])[None]


def unpacked_layer(parts: Mapping[str, nnx.Variable], layer: int) -> jax.Array:
    """float32 [1, ...] with the axes of the weight: one layer, of the Variables of a quantised weight by name."""
    layout: Layout = parts["codes"].get_metadata("layout")
    record = RECORDS[layout.kind]
    return _layer(layout, record(*(parts[name].get_value() for name in record._fields)), layer)


def unpacked(layout: Layout, quantized: Quantized, dtype: jnp.dtype) -> jax.Array:
    """The weight of one layer, outputs before inputs, whole but for what `tensor` cuts."""
    axes = {name: letters.removeprefix(layout.leading).strip() for name, letters in layout.axes.items()}
    gathered = quantized._replace(**{name: _gathered(getattr(quantized, name), each) for name, each in axes.items()})
    return _gathered(dequantize(gathered, dtype).reshape(layout.sizes), layout.of_matrix)


def _gathered(x: jax.Array, axes: str) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty or not axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, over=("tensor",)))


# Experts, whose weights are gathered and unpacked within `dispatch.py`.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class QuantizedExperts:
    """The quantised weights of some experts of one layer, [E, I, O] once they are numbers."""

    arrays: Any
    """A `Quantized`, with a leading E."""
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers of whole experts."""
        return (self.arrays.codes.shape[0], self.layout.num_inputs, self.layout.num_outputs)

    @property
    def size(self) -> int:
        """Numbers that are here."""
        return self.arrays.codes.size * (2 if self.layout.kind == "nf4" else 1)

    def specs(self) -> "QuantizedExperts":
        """The PartitionSpec of each array."""
        axes = self.layout.axes
        specs = {name: partition_spec(axes[name].removeprefix("l ")) for name in self.arrays._fields}
        return QuantizedExperts(self.arrays._replace(**specs), self.layout)

    def numbers(self, dtype: jnp.dtype, *, over: tuple[str, ...]) -> jax.Array:
        """[E, I, O]: gathered packed over the mesh axes `over`, where these are; whole but for what `tensor` cuts."""
        arrays, place = self.arrays, None
        if over:
            gathered = {
                name: jax.lax.all_gather(getattr(arrays, name), over, axis=1, tiled=True)
                for name in ("codes", "absmax")
            }
            arrays = arrays._replace(**gathered)
            at, (_, num_rows, num_bytes) = jax.lax.axis_index("tensor"), arrays.codes.shape
            is_by_rows = self.layout.is_by_rows
            place = Place(
                self.layout.num_outputs,
                first_row=at * num_rows if is_by_rows else 0,
                first_byte=0 if is_by_rows else at * num_bytes,
            )
        return dequantize(arrays, dtype, place=place).swapaxes(1, 2)

    def after(self, x: jax.Array, axes: str) -> "QuantizedExperts":
        """The same, not unpacked before `x` is there."""
        return QuantizedExperts(_after(x, axes, [self.arrays])[0], self.layout)


# Products. What is quantised has no gradient, and what a product keeps for its backward pass is the quantised weight.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_products(layouts: tuple[Layout, ...], x: jax.Array, weights: list[Quantized]) -> list[jax.Array]:
    """What maps with quantised weights make of the same x [B, T, inputs], in the dtype of `x`.

    On a mesh with `tensor`, their gradients by `x` are reduced over it together.
    """
    return _forward(layouts, x, weights)[0]


def _forward(
    layouts: tuple[Layout, ...], x: jax.Array, weights: list[Quantized]
) -> tuple[list[jax.Array], list[Quantized]]:
    ready = _after(x, f"b t {layouts[0].inputs}", weights)
    return [
        jnp.einsum(_dims(layout), x, unpacked(layout, weight, x.dtype), precision=precision(x.dtype))
        for layout, weight in zip(layouts, ready, strict=True)
    ], weights


def _backward(layouts: tuple[Layout, ...], weights: list[Quantized], gradients: list[jax.Array]) -> Any:
    weights = _after(gradients[0], f"b t {layouts[0].outputs}", weights)
    dtype = gradients[0].dtype
    numbers = [unpacked(layout, weight, dtype) for layout, weight in zip(layouts, weights, strict=True)]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["tensor"] > 1 and all(layout.is_by_rows for layout in layouts):
        return gradient_by_x(tuple(map(_dims, layouts)), numbers, gradients), None
    summands = [
        jnp.einsum(
            f"b t {layout.outputs}, {layout.of_matrix} -> b t {layout.inputs}",
            gradient,
            weight,
            precision=precision(dtype),
        )
        for layout, weight, gradient in zip(layouts, numbers, gradients, strict=True)
    ]
    return sum(summands), None


quantized_products.defvjp(_forward, _backward)


def _after(x: jax.Array, axes: str, weights: list[Quantized]) -> list[Quantized]:
    """The weights, which are not there before `x` is: no layer is unpacked before its turn, nor kept for the backward
    pass because that unpacks the same bytes again.

    Their codes are changed by a zero that is computed from `x`. An optimization barrier is not enough: compiled for
    CPU, it is gone before the order of operations is found (jax 0.10.2).
    """
    mesh = jax.sharding.get_abstract_mesh()
    zero = _zero
    if not mesh.empty and is_cut_evenly(x.shape, axes):
        # Each device takes its own first number, so that nothing is sent.
        spec = partition_spec(axes)
        zero = jax.shard_map(_zero, in_specs=spec, out_specs=jax.sharding.PartitionSpec(), check_vma=False)
    nothing = zero(jax.lax.stop_gradient(x))
    return [weight._replace(codes=weight.codes ^ nothing.astype(weight.codes.dtype)) for weight in weights]


def _zero(x: jax.Array) -> jax.Array:
    """0 whatever is in `x`, which compilers do not know: a number times 0 may be NaN."""
    product = x[(0,) * x.ndim].astype(jnp.float32) * 0
    return jnp.where(jnp.isnan(product), 0, product).astype(jnp.uint8)


def _dims(layout: Layout) -> str:
    return f"b t {layout.inputs}, {layout.of_matrix} -> b t {layout.outputs}"
