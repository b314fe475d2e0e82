#!/usr/bin/env bash
# libtpu: for TPU v6e no gather of weights overlaps with computing unless two flags are given, of which either alone does
# nothing; for v5e it does by itself.
#
# Versions: jax 0.10.2, libtpu 0.0.42.1, Python 3.11 on Linux x86-64; compiled ahead of time, no TPU is needed.
# Behaviour: a scan over 8 layers whose weights are cut over 4 chips, gradients included. The compiler's program for v5e
# gathers while it computes. For v6e all gathers stand still until they are done, with the defaults, with
# xla_enable_async_all_gather and with xla_tpu_enable_async_collective_fusion_fuse_all_gather; with both they overlap.
# So whoever tries one flag after the other finds that none helps.
# Output seen (instructions of the program that belong to an asynchronous collective):
#   v5e, no flags: some
#   v6e, no flags: none
#   v6e, xla_enable_async_all_gather: none
#   v6e, xla_tpu_enable_async_collective_fusion_fuse_all_gather: none
#   v6e, both: some
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$folder/gathers.py" <<'PYTHON'
import numpy as np
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH, LAYERS, TOKENS = 1024, 8, 4096
FLAGS = ["xla_enable_async_all_gather", "xla_tpu_enable_async_collective_fusion_fuse_all_gather"]


def loss(weights, x):
    def layer(x, pair):
        up, down = pair
        return x + jax.nn.gelu(x @ up) @ down, None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)


def kinds_of(family, flags):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{family}:2x2").devices
    mesh = Mesh(np.array(devices), ("x",))
    rows, cut = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec(None, "x"))
    up, down = ((LAYERS, WIDTH, 4 * WIDTH), (LAYERS, 4 * WIDTH, WIDTH))
    weights = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=cut) for shape in (up, down)]
    x = jax.ShapeDtypeStruct((4 * TOKENS, WIDTH), jnp.bfloat16, sharding=rows)
    step = jax.jit(jax.grad(loss), out_shardings=[cut, cut], compiler_options=dict.fromkeys(flags, "true"))
    lines = step.lower(weights, x).compile().as_text().splitlines()
    return sum("all-gather-start" in line or "async_collective_fusion_config" in line for line in lines)


for family, flags in [("v5e", []), ("v6e", []), ("v6e", FLAGS[:1]), ("v6e", FLAGS[1:]), ("v6e", FLAGS)]:
    named = {0: "no flags", 1: "".join(flags), 2: "both"}[len(flags)]
    print(f"{family}, {named}: {'some' if kinds_of(family, flags) else 'none'}", flush=True)
PYTHON
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v6e-4
"$folder/venv/bin/python" "$folder/gathers.py" 2> "$folder/errors" | tee "$folder/seen" || tail -20 "$folder/errors"
sed -n 's/^#   \(v[56]e, .*\)$/\1/p' "$0" | diff - "$folder/seen"
