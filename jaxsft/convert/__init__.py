"""Configs of TRL, axolotl and LLaMA-Factory become ours, key by key, and every key of theirs is accounted for.

In: a file as these projects read it (YAML, JSON, a saved command line, a Python script with an `SFTConfig`). Out: the
text of a config of ours, and a report. Read `make.py` first, then `conversion.py` (what is kept of a key),
`training.py` (what all three share) and one of `trl.py`, `axolotl.py`, `llama_factory.py` (rows, masks, templates).
What a name of theirs is called here, or why it has no counterpart, is the table `jaxsft/foreign_keys.py`.
"""
