#!/usr/bin/env bash
# Two saves of one state by Orbax have other bytes, sizes, names and numbers of files, in one process and one second.
# The arrays of all are equal. So a hash of a checkpoint's folder says nothing about whether two runs are in one state,
# and deduplicating storage or rsync by name sees new files each time; compare what `restore` gives.
# Seen with orbax-checkpoint 0.12.8, jax 0.10.2: 3 saves of the same 8 arrays had 12 to 17 files, of which few were equal
# to a file of the first save. The arrays' own files are named at random and cut by what was ready first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import hashlib
import importlib.metadata
import pathlib
import sys

import jax
import orbax.checkpoint as ocp

base = pathlib.Path(sys.argv[1]) / "checkpoints"
state = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 64)) for i in range(8)}
contents, restored = [], []
for number in range(3):
    path = base / str(number)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, state)
    checkpointer.wait_until_finished()
    restored.append(checkpointer.restore(path))
    contents.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in path.rglob("*") if file.is_file()])
print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"), "jax", jax.__version__)
for number, files in enumerate(contents):
    same = len(set(files) & set(contents[0]))
    print(f"save {number}: {len(files)} files, {same} of them with the bytes of one of save 0")
equal = all((restored[0][name] == each[name]).all() for each in restored for name in state)
print("all arrays are equal:", equal)
assert equal
assert all(set(files) != set(contents[0]) for files in contents[1:]), "this has changed"
PY
