#!/usr/bin/env bash
# jax: an entry of the persistent compilation cache that is cut short is never written again.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, on a CPU, Python 3.11.
# Behaviour: an entry is written to its final name, and a name that is there is not written again. An entry of which only a
# part is there (a full disk, a process that ended while it wrote) is noticed at every later start: a warning, and the
# program is compiled anew. What was compiled is not put in its place, so every start from then on pays for it again.
# Output seen, of five starts with one folder (entries warned of, bytes of the entry against those of the whole one):
#   whole: 0 warnings
#   cut to half: 1 warnings, still half
#   again: 1 warnings, still half
#   removed: 0 warnings, whole
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/start.py" <<'PYTHON'
import jax, jax.numpy as jnp

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@jax.jit
def named_program(x):
    return jnp.sin(x) @ x


named_program(jnp.ones((8, 8))).block_until_ready()
PYTHON
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$folder/cache"
start() { "$folder/venv/bin/python" "$folder/start.py" 2>&1 | grep -c "compilation cache entry for 'jit_named_program'" || true; }
size() { stat -c %s "$folder"/cache/jit_named_program-*-cache; }

start > /dev/null
whole=$(size)
warned=$(start)
echo "whole: $warned warnings"
[ "$warned" = 0 ]
half=$((whole / 2))
truncate -s "$half" "$folder"/cache/jit_named_program-*-cache
for round in "cut to half" "again"; do
  warned=$(start)
  echo "$round: $warned warnings, $([ "$(size)" = "$half" ] && echo 'still half' || echo 'written again')"
  [ "$warned" = 1 ]
  [ "$(size)" = "$half" ]
done
rm "$folder"/cache/jit_named_program-*-cache
start > /dev/null
warned=$(start)
echo "removed: $warned warnings, $([ "$(size)" = "$whole" ] && echo whole || echo 'of another size')"
[ "$warned" = 0 ]
[ "$(size)" -gt "$half" ]
