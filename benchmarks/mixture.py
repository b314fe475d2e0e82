"""Experts of a mixture on a TPU, two ways: our loop over blocks of rows, and the grouped matmul kernels of JAX.

Run as `python benchmarks/mixture.py [--topology v5p:2x2x1]`; needs `pip install libtpu`, which has the real compiler.
One device's part of a layer, forward and backward, is compiled and not run: that of Qwen3-30B-A3B with `mesh.expert=8`,
16 of 128 experts and the tokens of 8 rows of 4,096. Then both are run on a few tokens, the kernels in interpret mode,
and held against every expert on every token.

The kernels (`jax.experimental.pallas.ops.tpu.megablox`) want all rows that any expert gets in one array, whose size is
known when the program is compiled. With room for every choice of every token no token is dropped, however they choose;
with room for twice the mean some may be.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.megablox import ops
from jax.sharding import SingleDeviceSharding

from jaxsft.model.dispatch import ExpertWeights, experts_of_tokens
from jaxsft.training.matmuls import read_matmuls

Sizes = dict[str, int]
"""m tokens, k choices of each, e experts of all, l on this device, d and f as in the glossary."""

QWEN3 = {"m": 32768, "k": 8, "e": 128, "l": 16, "d": 2048, "f": 768}
FEW = {"m": 256, "k": 2, "e": 8, "l": 8, "d": 128, "f": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--topology", default="v5p:2x2x1")
    args = parser.parse_args()
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    everything = QWEN3["m"] * QWEN3["k"]
    mean = everything * QWEN3["l"] // QWEN3["e"]
    ways = {
        "loop over blocks": by_blocks,
        "kernels, room for all choices": functools.partial(by_kernels, room=everything),
        "kernels, room for twice the mean": functools.partial(by_kernels, room=2 * mean),
    }
    print(f"{'one layer, forward and backward':<36}{'temporary GiB':>15}{'products of a row':>20}")
    for name, experts in ways.items():
        temporary, products = compiled(experts, QWEN3, args.topology)
        print(f"{name:<36}{temporary / 2**30:>15.2f}{products:>20}")
    for name, experts in (("loop", by_blocks), ("kernels", functools.partial(by_kernels, room=512, interpret=True))):
        print(f"{name}: apart from every expert on every token by {apart(experts):.1e} at most")


def gating(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def by_blocks(x: jax.Array, chosen: jax.Array, scores: jax.Array, maps: list[jax.Array], sizes: Sizes) -> jax.Array:
    """As a step does it: x [1, M, D], chosen and scores [1, M, K] to [1, M, D]; choices from L on are others'."""
    return experts_of_tokens(x, chosen, scores, ExpertWeights(*maps, None, None, None), gating=gating)


def by_kernels(
    x: jax.Array,
    chosen: jax.Array,
    scores: jax.Array,
    maps: list[jax.Array],
    sizes: Sizes,
    *,
    room: int,
    interpret: bool = False,
) -> jax.Array:
    """The same by kernels, with `room` for so many rows."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)[:room]
    group_sizes = jnp.bincount(flat, length=sizes["l"]).astype(jnp.int32)
    gate, up, down = (each.astype(x.dtype) for each in maps)

    def products(rows: jax.Array, of_experts: jax.Array) -> jax.Array:
        tiling = (min(512, room), min(512, rows.shape[1]), min(512, of_experts.shape[2]))
        return ops.gmm(rows, of_experts, group_sizes, jnp.float32, tiling, interpret=interpret)

    token = order // sizes["k"]
    rows = x[0][token]
    y = products(gating(products(rows, gate), products(rows, up)).astype(x.dtype), down)
    is_own = jnp.arange(room) < group_sizes.sum()  # what comes after them was never written
    y = jnp.where(is_own[:, None], y * scores.reshape(-1)[order][:, None], 0)
    return jnp.zeros(x.shape[1:], jnp.float32).at[token].add(y)[None].astype(x.dtype)


def by_all(x: jax.Array, chosen: jax.Array, scores: jax.Array, maps: list[jax.Array], sizes: Sizes) -> jax.Array:
    """Every expert on every token, those that were not chosen with score 0."""
    gate, up, down = maps
    of_expert = (jax.nn.one_hot(chosen, sizes["l"]) * scores[..., None]).sum(axis=2)
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    inner = gating(einsum("bmd,edf->bmef", x, gate), einsum("bmd,edf->bmef", x, up))
    return einsum("bmef,efd,bme->bmd", inner, down, of_expert)


def gradients_of(experts: Callable[..., jax.Array], sizes: Sizes) -> Callable[..., Any]:
    def loss(x: jax.Array, scores: jax.Array, maps: list[jax.Array], chosen: jax.Array) -> jax.Array:
        return jnp.sin(experts(x, chosen, scores, maps, sizes).astype(jnp.float32)).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def compiled(experts: Callable[..., jax.Array], sizes: Sizes, topology: str) -> tuple[int, int]:
    """Temporary bytes of a layer, forward and backward, and how many matrix products each row of an expert is in."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def array(letters: str, dtype: Any) -> Any:
        shape = tuple(sizes.get(letter, 1) for letter in letters)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    maps = [array(letters, jnp.float32) for letters in ("ldf", "ldf", "lfd")]
    arrays = array("bmd", jnp.bfloat16), array("bmk", jnp.float32), maps, array("bmk", jnp.int32)
    traced = gradients_of(experts, sizes).trace(*arrays)
    return traced.lower().compile().memory_analysis().temp_size_in_bytes, len(read_matmuls(traced))


def apart(experts: Callable[..., jax.Array]) -> float:
    """The largest difference of gradients from those by all experts, relative to the largest of each."""
    keys = jax.random.split(jax.random.key(0), 6)
    m, k, e, d, f = (FEW[letter] for letter in "mkedf")
    x, scores = jax.random.normal(keys[0], (1, m, d)), jax.random.uniform(keys[1], (1, m, k))
    shapes = ((e, d, f), (e, d, f), (e, f, d))
    maps = [0.1 * jax.random.normal(key, shape) for key, shape in zip(keys[2:5], shapes, strict=True)]
    chosen = jax.lax.top_k(jax.random.normal(keys[5], (1, m, e)), k)[1]
    ours, theirs = (jax.tree.leaves(gradients_of(each, FEW)(x, scores, maps, chosen)) for each in (experts, by_all))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
