#!/usr/bin/env bash
# bitsandbytes: on CPUs, blockwise 8-bit codes are not always those of the nearest value of the code.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0, numpy 2.3.5, Python 3.11, x86-64.
# Behaviour: quantize_blockwise on a CPU first rounds each number, divided by its block's absmax, to a grid of 65,536
# steps, and looks the code up by that. Numbers near the middle between two values of the code get the farther one. The
# absmax of NF4 weights go the same way (double quantisation), so a folder that was quantised on a CPU differs in some
# bytes from one that was made by the nearest values, as the same library's PyTorch code makes it.
# Output seen, of 1,048,576 numbers drawn evenly, with a 1 in each block of 256 (so that absmax is 1):
#   codes that are not the nearest: 970 of 1048576
#   farther than the nearest by at most: 1.0 / 32768
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 bitsandbytes==0.50.2
cat > "$folder/codes.py" <<'PYTHON'
import bitsandbytes.functional as functional
import numpy as np
import torch

code = functional.create_dynamic_map().float()
numbers = np.random.default_rng(0).uniform(-1, 1, (4096, 256)).astype(np.float32)
numbers[:, 0] = 1.0
given, _ = functional.quantize_blockwise(torch.from_numpy(numbers), code=code, blocksize=256)
given = given.numpy().reshape(-1).astype(int)
values, x = code.numpy().astype(np.float64), numbers.reshape(-1).astype(np.float64)
after = np.clip(np.searchsorted(values, x), 1, 255)
nearest = np.where(x - values[after - 1] < values[after] - x, after - 1, after)
farther = np.abs(x - values[given]) > np.abs(x - values[nearest])
print(f"codes that are not the nearest: {farther.sum()} of {x.size}")
excess = np.abs(x - values[given]) - np.abs(x - values[nearest])
print(f"farther than the nearest by at most: {excess.max() * 32768:.1f} / 32768")
PYTHON
"$folder/venv/bin/python" "$folder/codes.py" | tee "$folder/seen"
sed -n 's/^#   \(codes that.*\|farther than.*\)$/\1/p' "$0" | diff - "$folder/seen"
