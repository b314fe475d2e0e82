"""Self-attention of packed rows on TPUs, by the splash kernels that come with JAX.

In and out as in `attention.py`, which calls this where it can be had. Scores stay on the chip, and blocks (queries x
keys) in which no query sees a key by its place in the row are passed over; forward and backward are kernels.

On a mesh each device calls them on its own rows, heads and queries. Keys and values are gathered over `context`, put
into the order of the row, and held whole for one layer. What a query sees goes by its place in the row, which the
kernels are told: queries may lie in any order (`balance.py`). So a window counts places, not positions, which is the
same where positions grow by exactly 1 from one token of an example to the next.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxsft.mesh import num_parts, partition_spec
from jaxsft.model.keys import in_order_of_row, whole_rows
from jaxsft.model.needed import Rule
from jaxsft.model.pairs import LANES
from jaxsft.model.remat import Name

KEPT_AS: Name = "attention"
"""What the forward kernel makes, by which the backward kernels need not run it again."""

SCORED_AT_ONCE = 512
"""Keys of a block whose scores are there at once; the rest of the block follows."""

FUSED_BYTES = 2**28
"""One backward kernel in place of two does 5 matmuls a block in place of 7, but writes the gradients by queries once
for every block of keys, to be added up: bytes of these gradients that are spent on it at most."""


def splash_attention(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segment_ids: tuple[jax.Array, jax.Array],
    *,
    order: Sequence[int] | None,
    largest_block: int,
    interpret: bool,
) -> jax.Array:
    """As `attention.attention` of T queries to the T keys of the same tokens.

    Args:
        rule: scale, window and soft cap.
        q: [B, T, N, H], which the mesh in scope cuts evenly.
        k: [B, T, K, H], as is `v`.
        sinks: [N], or none.
        segment_ids: int32 [B, T] of queries, and of keys.
        order: chunks of the row in the order in which devices hold them; as they are in the row if left out.
        largest_block: queries, and keys, of a block at most.
        interpret: run without a TPU, for tests.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    order = tuple(range(num_parts("t")) if order is None else order)
    places = Places(order, num_parts("t"), q.shape[1], largest_block, rule.window)
    own_bytes = q.nbytes // math.prod(map(num_parts, "btn"))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([places]),  # one for all heads
        block_sizes=block_sizes(places, own_bytes),
        head_shards=1,
        q_seq_shards=places.num_devices,
        attn_logits_soft_cap=rule.soft_cap,
        residual_checkpoint_name=KEPT_AS,
        interpret=interpret,
    )
    local, inputs = functools.partial(_local, rule.scale, places), (kernel, q, k, v, sinks, *segment_ids)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*inputs)
    # Of an axis alone: a mesh of which some axes are under way already is too much for what looks at shapes here.
    context = AbstractMesh((places.num_devices,), ("context",))
    of_kernel = kernel.manual_sharding_spec(NamedSharding(context, PartitionSpec(None, "context")))
    in_specs = (of_kernel, *map(partition_spec, ("b t n h", "b t k h", "b t k h", "n", "b t", "b s")))
    return jax.shard_map(local, in_specs=in_specs, out_specs=partition_spec("b t n h"), check_vma=False)(*inputs)


@dataclasses.dataclass(frozen=True)
class Places(masks.Mask):
    """Where in the row queries and keys lie, filled up to whole blocks, and by that which keys a query sees.

    With order (0, 3, 1, 2) on 2 devices and a row of 8, the queries' places are 0 1 6 7 on one device and 2 3 4 5 on
    the other; what fills them up stands in the last one's place. Keys lie in the order of the row.
    """

    order: tuple[int, ...]
    num_devices: int
    length: int
    largest_block: int
    window: int | None

    @property
    def num_queries(self) -> int:
        """Of a device, without what fills them up."""
        return self.length // self.num_devices

    @property
    def blocks(self) -> tuple[int, int]:
        """Queries, and keys, of a block."""
        return even_block(self.num_queries, self.largest_block), even_block(self.length, self.largest_block)

    @property
    def filled(self) -> tuple[int, int]:
        """Queries of a device, and keys, in whole blocks."""
        sizes = zip((self.num_queries, self.length), self.blocks, strict=True)
        return tuple(-(-size // block) * block for size, block in sizes)  # type: ignore[return-value]

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """int32, by device: for the kernels, the places of queries."""
        places = np.arange(self.length, dtype=np.int32).reshape(len(self.order), -1)[list(self.order)]
        fill = self.filled[0] - self.num_queries
        return np.pad(places.reshape(self.num_devices, -1), [(0, 0), (0, fill)], mode="edge").reshape(-1)

    @property
    def mask_function(self) -> "Sees":
        """For the kernels."""
        return Sees(self.window)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_devices * self.filled[0], self.filled[1]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """Which of some queries sees which of some keys: bool [queries, keys], or [1, 1] where it is all of one kind.

        Of the blocks of long rows, nearly all are, and the kernels then ask no more of them.
        """
        queries, keys = self.q_sequence[index[0]], np.arange(index[1].start, index[1].stop)
        first, last, window = queries.min(), queries.max(), self.window or self.length + 1
        if last < keys[0] or first - keys[-1] >= window:
            return np.zeros((1, 1), np.bool_)
        if first >= keys[-1] and last - keys[0] < window:
            return np.ones((1, 1), np.bool_)
        return np.asarray(self.mask_function(queries[:, None], keys[None]))


@dataclasses.dataclass(frozen=True)
class Sees:
    """Whether a query may see a key, both given by their place in the row, where they are of one example."""

    window: int | None

    def __call__(self, query: Any, key: Any) -> Any:
        sees = query >= key
        return sees if self.window is None else sees & (query < key + self.window)


def even_block(size: int, largest: int) -> int:
    """Of the largest block, and 3/4 and 1/2 of it, that which fills up least. What fits into 1/2 takes a smaller one.

    With 512 the largest, 4,096 and 3,000 go in blocks of 512 (and are 3,072 then), 2,176 in blocks of 384 (2,304), and
    100 in one of 128.
    """
    while largest > LANES and size <= largest // 2:
        largest //= 2
    blocks = [block for block in (largest, 3 * largest // 4, largest // 2) if block % LANES == 0]
    return min(blocks, key=lambda block: -(-size // block) * block)  # the first of those that fill up as little


def block_sizes(places: Places, own_bytes: int) -> kernels.BlockSizes:
    """Blocks of all kernels; one backward kernel in place of two where it costs little memory.

    Args:
        places: of queries and keys.
        own_bytes: of the queries of a device.
    """
    (block_q, block_kv), num_keys = places.blocks, places.filled[1]
    at_once = block_kv if block_kv <= SCORED_AT_ONCE else block_kv // 2
    is_fused = num_keys // block_kv * own_bytes <= FUSED_BYTES
    return kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=at_once,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=at_once,
        block_q_dq=None if is_fused else block_q,
        block_kv_dq=None if is_fused else block_kv,
        use_fused_bwd_kernel=is_fused,
    )


def largest_block(device_kind: str, head_dim: int) -> int:
    """Queries, and keys, of a block at most, by what a chip computes.

    A step of a kernel costs about 0.35 microseconds beside its work: as long as a block of 512 x 512 of 128 takes on
    chips of 200 to 300 TFLOP/s (v4, v5e: 0.5 to 0.7), and longer than that on faster ones, which take four times as
    much at once. Wider heads go in smaller blocks, as memory on the chip (VMEM) does not hold larger ones: of 256, a
    block of 1,024 does not compile for v5p. None of this was measured on a TPU.
    """
    if head_dim > 128:
        return 512 if head_dim <= 256 else 256
    return 512 if device_kind in ("TPU v4", "TPU v5 lite") else 1024


def _local(
    scale: float,
    places: Places,
    kernel: kernels.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
) -> jax.Array:
    """One device's part, [B, T, N, H]; segments of keys are those of the whole row."""
    q_fill, kv_fill = (filled - size for filled, size in zip(places.filled, (q.shape[1], places.length), strict=True))
    # What fills up queries sees what the last of them sees, so that no query sees nothing.
    segment_ids = kernels.SegmentIds(
        jnp.pad(q_segment_ids, [(0, 0), (0, q_fill)], mode="edge"),
        jnp.pad(in_order_of_row(kv_segment_ids, places.order), [(0, 0), (0, kv_fill)], constant_values=-1),
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    k, v = (_by_head(whole_rows(x, places.order, places.num_devices), kv_fill) for x in (k, v))
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    out: Any = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(_by_head(scaled, q_fill), k, v, segment_ids, sinks)
    return jnp.swapaxes(out, 1, 2)[:, : q.shape[1]]


def _by_head(x: jax.Array, fill: int) -> jax.Array:
    """[B, T, N, H] to [B, N, T, H], filled up with zeros."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, fill), (0, 0)])
