#!/usr/bin/env bash
# libtpu: for TPU v5p, float32 weights that a scan over layers rounds to bfloat16 are rounded for all layers before the
# first, and a second copy of the model is held; an optimization barrier in the loop does not prevent it.
#
# Versions: jax 0.10.2, libtpu 0.0.42.1, Python 3.11 on Linux x86-64; compiled ahead of time, no TPU is needed.
# Behaviour: a scan over 32 layers, each one matmul in bfloat16 by a float32 weight of 1,024 x 1,024, cast inside the
# loop. The program for v5p holds 64 MiB of temporary memory, which is all weights in bfloat16; those for v5e and v6e
# hold nothing. An optimization_barrier on the weight inside the loop changes nothing. Rounding by reduce_precision, and
# then casting what is a bfloat16 already, keeps the cast inside the loop. Sharded training in mixed precision so keeps
# its weights one and a half times on v5p alone.
# Output seen (MiB of temporary memory, whole):
#   v5p, cast in the loop: 64
#   v5p, behind an optimization barrier: 64
#   v5p, reduce_precision and then cast: 0
#   v5e, cast in the loop: 0
#   v6e, cast in the loop: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$folder/rounding.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

LAYERS, WIDTH, TOKENS = 32, 1024, 256
WAYS = {
    "cast in the loop": lambda weight: weight.astype(jnp.bfloat16),
    "behind an optimization barrier": lambda weight: jax.lax.optimization_barrier(weight).astype(jnp.bfloat16),
    "reduce_precision and then cast": lambda weight: jax.lax.reduce_precision(weight, 8, 7).astype(jnp.bfloat16),
}


def temporary_mib(topology, rounded):
    place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=place)
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16, sharding=place)

    @jax.jit
    def run(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ rounded(weight)), None), x, weights)[0]

    return run.lower(weights, x).compile().memory_analysis().temp_size_in_bytes // 2**20


for topology, way in [("v5p:2x2x1", way) for way in WAYS] + [("v5e:2x2", "cast in the loop"), ("v6e:2x2", "cast in the loop")]:
    print(f"{topology[:3]}, {way}: {temporary_mib(topology, WAYS[way])}", flush=True)
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5p-8
"$folder/venv/bin/python" "$folder/rounding.py" 2> "$folder/errors" | tee "$folder/seen" || tail -20 "$folder/errors"
sed -n 's/^#   \(v[56][pe], .*\)$/\1/p' "$0" | diff - "$folder/seen"
