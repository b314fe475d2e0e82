"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, in and out.

`places.py` says what PEFT calls our maps and how A and B lie in its tensors, `settings.py` reads adapter_config.json
and writes it, `read.py` and `write.py` are the two ways. A model into which its adapters are added is `merge.py`'s.
"""
