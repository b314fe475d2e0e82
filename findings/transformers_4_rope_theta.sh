#!/usr/bin/env bash
# transformers 4.57.1 reads a config.json saved by transformers 5.24.0 with rope_theta 10000, whatever it says, and
# warns of nothing: the number stands in `rope_parameters`, a name that only the newer version knows. A model whose
# base is another one is computed with wrong rotations.
#
# Ends with 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "transformers==$version" 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
done

"$folder/5.24.0/bin/python" - "$folder/model" <<'PYTHON'
import json, pathlib, sys
import transformers

rope = {"rope_type": "default", "rope_theta": 100000.0}
transformers.LlamaConfig(rope_parameters=rope).save_pretrained(sys.argv[1])
written = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
again = transformers.AutoConfig.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__} writes", {key: written[key] for key in written if "rope" in key})
assert again.rope_parameters["rope_theta"] == 100000.0 and "rope_theta" not in written
PYTHON

"$folder/4.57.1/bin/python" - "$folder/model" 2> "$folder/warnings" <<'PYTHON'
import sys
import transformers

config = transformers.AutoConfig.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__} reads {{'rope_theta': {config.rope_theta}, 'rope_scaling': {config.rope_scaling}}}")
assert config.rope_theta == 10000.0
PYTHON

# Without PyTorch it says that there is none; of the config it says nothing.
if grep -i rope "$folder/warnings"; then
  echo "it warns now"
  exit 1
fi
echo "and warns of nothing"
