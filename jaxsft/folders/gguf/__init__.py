"""GGUF files, as if they were Hugging Face folders.

`file.py` reads what stands in one, `metadata.py` and `config.py` make a `config.json` of it, `tokenizer.py` a
tokenizer; `model.py` is the way through.
"""
