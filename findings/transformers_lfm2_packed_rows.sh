#!/usr/bin/env bash
# transformers 5.24.0 keeps the examples of a packed row apart where positions begin anew (`position_ids`), in attention.
# The short convolutions of LFM2 run on over the border: what an example gets depends on the one before it in the row.
# A row of two random examples: the logits of the second one differ from those that it has alone, those of Llama do not.
#
# Ends with 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "transformers==5.24.0" "torch==2.13.0" 2> "$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }

"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers

transformers.logging.set_verbosity_error()
shape = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.3,
)
torch.manual_seed(0)
first, second = torch.randint(3, 64, (1, 6)), torch.randint(3, 64, (1, 7))
positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
kinds = ["conv", "full_attention"] * 2
configs = {
    "llama": transformers.LlamaConfig(num_hidden_layers=4, **shape),
    "lfm2": transformers.Lfm2Config(num_hidden_layers=4, layer_types=kinds, **shape),
}
apart = {}
for name, config in configs.items():
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits[:, 6:]
        alone = model(second, use_cache=False).logits
    apart[name] = ((packed - alone).abs().max() / alone.abs().max()).item()
print(f"transformers {transformers.__version__}, of the largest logit apart:", {k: f"{v:.1e}" for k, v in apart.items()})
assert apart["llama"] < 1e-5 < 1e-2 < apart["lfm2"]
PYTHON
# Seen: llama 1.3e-06, lfm2 1.4e+00
