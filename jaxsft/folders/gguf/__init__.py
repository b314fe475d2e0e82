"""GGUF files, as if they were Hugging Face folders.

In: a .gguf file, or a folder whose only weights are one. Out: what the `config.json`, the tensors and the tokenizer of
a Hugging Face folder would be. `file.py` reads what stands in a file, `metadata.py` and `config.py` make a
`config.json` of it, `tokenizer.py` a tokenizer; `model.py` is the way through.
"""
