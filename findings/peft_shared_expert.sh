#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: who asks for adapters on the shared expert of a Hunyuan mixture, by its full name
# (`shared_mlp.down_proj`), gets them on the routed experts, and none on the shared one. The names of targets are
# translated by their last word alone.
#
# Ends with 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "peft==0.21.2" "transformers==5.24.0" "torch==2.13.0" 2> "$folder/pip.log" \
  || { cat "$folder/pip.log"; exit 2; }

"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import peft
import transformers

warnings.simplefilter("ignore")
config = transformers.HunYuanMoEV1Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts=4, moe_topk=[2], num_shared_expert=[1],
)
model = transformers.AutoModelForCausalLM.from_config(config)
weight = "model.layers.0.mlp.shared_mlp.down_proj.weight"
assert weight in dict(model.named_parameters())
adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["shared_mlp.down_proj"]))
names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
print(f"peft {peft.__version__}: asked for shared_mlp.down_proj, adapters on:", *names)
assert names and all(".experts." in name and "shared_mlp" not in name for name in names)
PYTHON
# Seen: base_model.model.model.layers.0.mlp.experts.lora_A.default.weight
