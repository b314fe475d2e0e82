#!/usr/bin/env bash
# jax: on CPUs, the largest entry of an array that devices share is not NaN where an entry is NaN.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, Python 3.11, four simulated CPU devices.
# Behaviour: jnp.max and jnp.min give NaN for an array on one device that holds one, as NumPy does. The same call on the
# same array, cut over devices, gives the largest and the smallest of the other entries: each device's own result is NaN
# where it should be, but the reduction over devices (also jax.lax.pmax and pmin) passes it over. Sums and argmax keep it.
# So a NaN can be seen on one device and be gone on several, which a check by max or min does not notice.
# Output seen, of the entries 1, 2, 3, 4 with a NaN in place of each in turn:
#   NaN at 0: one device max nan min nan, four devices max 4.0 min 2.0 sum nan argmax 0
#   NaN at 1: one device max nan min nan, four devices max 4.0 min 1.0 sum nan argmax 1
#   NaN at 2: one device max nan min nan, four devices max 4.0 min 1.0 sum nan argmax 2
#   NaN at 3: one device max nan min nan, four devices max 3.0 min 1.0 sum nan argmax 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/largest.py" <<'PYTHON'
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("x",))
reductions = {name: jax.jit(getattr(jnp, name)) for name in ("max", "min", "sum", "argmax")}
for at in range(4):
    values = np.arange(1.0, 5.0, dtype=np.float32)
    values[at] = np.nan
    cut = jax.device_put(values, NamedSharding(mesh, PartitionSpec("x")))
    here = [f"{name} {reductions[name](values)}" for name in ("max", "min")]
    there = [f"{name} {reduction(cut)}" for name, reduction in reductions.items()]
    print(f"NaN at {at}: one device {' '.join(here)}, four devices {' '.join(there)}")
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
"$folder/venv/bin/python" "$folder/largest.py" | tee "$folder/seen"
sed -n 's/^#   \(NaN at .*\)$/\1/p' "$0" | diff - "$folder/seen"
