"""Models on disk, in and out.

In: a Hugging Face folder, a GGUF file, or a name on the hub. Out: a tokenizer, a model, its parameters on a mesh; and,
at the end of a run, the folder that transformers and others open.

To read: `pretrained.py` is the way through; `hf.py` finds and reads folders, `special_tokens.py` sees to control
tokens, `weights/` moves tensors between files and meshes, `gguf/` makes a folder of a GGUF file; `export.py` writes,
with `config_words.py` and `tokenizer_files.py` for the words that others expect. `mirror.py` and `bucket_export.py` are
for models and exports in buckets.
"""
