"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, in and out.

`places.py` says what PEFT calls our maps and how A and B lie in its tensors, `settings.py` reads adapter_config.json,
`read.py` with `assemble.py` and `write.py` are the two ways. `source.py` finds the base model of a folder. A model
with its adapters in its weights is `folders/merge.py`'s.
"""
